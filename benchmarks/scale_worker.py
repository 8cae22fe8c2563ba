"""One rank of a layout that is measured: `python -m benchmarks.scale_worker SPEC`, started with a launcher's variables.

Rank 0 tells what was found in lines of JSON, each as soon as it is known:

    {"opened": {"dtype", "threads", "seconds"}}
    {"scaling": {"from", "to", "skipped"}}                     fp16: how an overflow was met
    {"check": {"first", "losses", "applied"}}                  the first loss, then updates on one batch
    {"memory": {"weights", "optimizer", "between", "peak", "resident": [...]}}
    {"traffic": {"mode", "sent": {...}, "calls": {...}}}       of one update
    {"time": {"mode", "seconds", "loss"}}                      of an update; one line a round and mode
    {"done": true}  or  {"error": reason}
"""

import contextlib
import json
import math
import os
import sys
import time
import traceback
from typing import Any, TextIO

LEARNING_UPDATES = 4  # on one batch; memory is that of the second
OVERFLOWING = 2.0**40  # a loss scale that no fp16 gradient survives
MOST_SKIPPED = 40  # updates, after each of which it is halved
TURN_SECONDS, MAX_UPDATES = 0.3, 50  # a turn is as many updates as fill so many seconds


def main(text: str) -> int:
    """Measure one layout."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    from fastgpt.cli import before_pytorch

    before_pytorch()
    worker = None
    try:
        worker = Worker(json.loads(text), answers)
        worker.measure()
    except Exception as problem:  # whatever ends a layout is told, and the others are measured
        from benchmarks.step_worker import reason_of

        traceback.print_exc()
        tell(answers, {"error": reason_of(problem)})
        return 1
    if worker.ranks.rank == 0:
        tell(answers, {"done": True})
    worker.ranks.barrier()
    os._exit(0)  # what has been told is all: destructors of process groups may abort a process that is done


def tell(answers: TextIO, answer: dict[str, Any]) -> None:
    """One line."""
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


class Worker:
    """What a rank does."""

    def __init__(self, spec: dict[str, Any], answers: TextIO) -> None:
        import torch

        from fastgpt.config import Config
        from fastgpt.engine.precision import resolve_device
        from fastgpt.engine.ranks import Ranks, join
        from fastgpt.launchers import find_launch
        from fastgpt.train.start import set_up

        launch = find_launch()
        assert launch
        config = Config.model_validate(spec["config"])
        self.single = config.engine.kind == "single"
        self.device = resolve_device(config.engine.device, launch.local_rank)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        self.ranks = Ranks() if self.single else join(launch, self.device, config.engine.timeout_minutes)
        self.config = set_up(config, self.device, self.ranks, threads=config.engine.threads)
        self.modes: dict[str, int] = spec["modes"]  # micro-batches of an update over all ranks, by mode
        self.rounds: int = spec["rounds"]
        self.until: float = spec["until"]
        self.answers = answers

    def tell(self, what: str, found: dict[str, Any]) -> None:
        """A finding, by rank 0."""
        if self.ranks.rank == 0:
            tell(self.answers, {what: found})

    def measure(self) -> None:
        """Everything, what matters most first."""
        from benchmarks.live_bytes import LiveBytes

        # a GPU's allocator counts by itself, and a CUDA graph can hold no Python
        self.live = LiveBytes() if self.device.type == "cpu" else None
        with self.live or contextlib.nullcontext():
            self.open()
            first = self.first_loss()
            if self.config.engine.precision == "fp16":
                self.overflow()
            self.check(first)
        for mode in self.modes:
            if self.ranks.world_size > 1:
                self.count_traffic(mode)
        self.time_rounds()

    def open(self) -> None:
        """Build the model and its engine."""
        import torch
        from fastgpt_kernels import load_ops

        from benchmarks.resident import resident_set
        from fastgpt.engine.prepare import prepare
        from fastgpt.model.gpt import GPT

        self.before = resident_set()
        start = time.perf_counter()
        ops, precision = load_ops(self.config.kernels.backend), self.config.engine.precision
        self.engine: Any = prepare(
            lambda: GPT(self.config.model, ops),
            self.config,
            kind="single" if self.single else "deepspeed",
            precision=precision,
            device=self.device,
            ranks=self.ranks,
        )
        self.batches = {mode: self.source(number).batches(0) for mode, number in self.modes.items()}
        seconds = time.perf_counter() - start
        self.tell("opened", {"dtype": precision, "threads": torch.get_num_threads(), "seconds": seconds})

    def source(self, micro_batches: int) -> Any:
        """The same random tokens for every layout with so many micro-batches an update."""
        from fastgpt.data.source import RandomSource

        model, train = self.config.model, self.config.train
        place = (self.ranks.rank, self.ranks.world_size)
        return RandomSource(model.vocab_size, model.context, train.micro_batch_size, micro_batches, train.seed, *place)

    def overflow(self) -> None:
        """Begin with a loss scale that is too large: updates are skipped until it has been halved often enough."""
        from fastgpt.engine.precision import LossScale

        batch = next(self.source(self.config.micro_batches).batches(0))
        if self.single:
            self.engine._scale.scale = OVERFLOWING
        else:
            self.engine._layout.set_loss_scale(LossScale(OVERFLOWING))
        skipped = 0
        while not self.engine.update(batch).update.applied:
            skipped += 1
            if skipped == MOST_SKIPPED:
                raise RuntimeError(f"{skipped} updates in a row were skipped")
        scale = self.engine._scale if self.single else self.engine._layout.loss_scale()
        self.tell("scaling", {"from": OVERFLOWING, "to": scale.scale, "skipped": skipped})

    def first_loss(self) -> float:
        """The loss of one sequence, the same on every rank, before any update."""
        import torch

        from fastgpt.data.source import RandomSource
        from fastgpt.engine.base import evaluation_loss

        model, train = self.config.model, self.config.train
        source = RandomSource(model.vocab_size, model.context, train.micro_batch_size, 1, train.seed)
        tokens = torch.from_numpy(next(source.batches(0)).tokens[0, :1])
        return evaluation_loss(self.engine, tokens[:, :-1], tokens[:, 1:]) / model.context

    def check(self, first: float) -> None:
        """Updates on one batch, and the memory of the second."""
        from benchmarks.resident import resident_bytes, resident_set

        batch = next(self.source(self.config.micro_batches).batches(0))
        updates = []
        for number in range(LEARNING_UPDATES):
            if number == 1:  # there are moments by now
                self.reset_peak()
            updates.append(self.engine.update(batch).update)
            if number == 1:
                found = resident_bytes(self.engine)
                now, most = self.allocated()
                found |= {"between": now, "peak": most, "resident_set_growth": resident_set()[1] - self.before[0]}
        applied = [update.applied for update in updates]
        self.tell("check", {"first": first, "losses": [update.loss for update in updates], "applied": applied})
        by_rank = self.ranks.gather(found)
        memory = {kind: max(each[kind] for each in by_rank) for kind in found}  # the fullest rank counts
        self.tell("memory", memory | {"resident_set_growth": [each["resident_set_growth"] for each in by_rank]})

    def count_traffic(self, mode: str) -> None:
        """What an update sends."""
        from benchmarks.traffic import Traffic

        with Traffic(self.ranks.world_size) as traffic:
            self.engine.update(next(self.batches[mode]))
        self.tell("traffic", {"mode": mode, "sent": traffic.sent, "calls": dict(traffic.calls)})

    def time_rounds(self) -> None:
        """Rounds of all modes in turn; the first is taken however late it is."""
        calls = {}
        for number in range(self.rounds):
            for mode in self.modes:
                if number and not self.ranks.broadcast(time.time() < self.until):
                    return
                if mode not in calls:
                    seconds, _ = self.time(mode, 1)  # which does not count
                    calls[mode] = self.ranks.broadcast(max(1, min(MAX_UPDATES, math.ceil(TURN_SECONDS / seconds))))
                seconds, loss = self.time(mode, calls[mode])
                self.tell("time", {"mode": mode, "seconds": seconds, "loss": loss, "calls": calls[mode]})

    def time(self, mode: str, updates: int) -> tuple[float, float]:
        """Seconds of an update, data included, from the moment at which all ranks are ready; and the last loss."""
        self.ranks.barrier()
        self.wait()
        start = time.perf_counter()
        last = None
        for _ in range(updates):
            before, last = last, self.engine.update(next(self.batches[mode]))
            if before is not None:
                _ = before.update  # as the training loop does: one update late
        assert last
        loss = last.update.loss
        self.wait()
        self.ranks.barrier()
        return (time.perf_counter() - start) / updates, loss

    def wait(self) -> None:
        """Let the device come to the end of its work."""
        import torch

        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def reset_peak(self) -> None:
        """Forget what was the most so far."""
        import torch

        if self.live:
            self.live.peak = self.live.live
        else:
            torch.cuda.reset_peak_memory_stats()

    def allocated(self) -> tuple[int, int]:
        """Bytes of tensors now, and at most since the reset."""
        import torch

        if self.live:
            return self.live.live, self.live.peak
        return torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
