"""The process of one contender: `python -m benchmarks.step_worker`, asked in lines of JSON, answering in the same.

The first line says who it is and for what job. Then come requests, each of which gets one answer:

    {"do": "open"}                  build the model            -> {"threads", "dtype"}
    {"do": "check"}                 first loss, then updates   -> {"first", "losses", "seconds"}
    {"do": "time", "updates": n}    n updates in one go        -> {"seconds", "loss", "peak_bytes"}
    {"do": "split", "updates": n}   their phases               -> {"data", "forward", "backward", "optimizer", ...}
    {"do": "roofs", "scale": s}     the device's roofs         -> {"gemm", "copy", ..., "peak"}

An answer {"error": reason} ends a contender. What libraries print goes to stderr.
"""

import json
import os
import resource
import sys
import time
import traceback
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

ZERO = {f"zero{stage}": stage for stage in range(4)}
OURS = ("ours", "ours-compile", "ours-no-graph", "reference", *ZERO)
LEARNING_UPDATES = 4  # on one batch; those after the first tell how long an update takes


def main() -> int:
    """Answer until nobody asks any more."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    spec = json.loads(sys.stdin.readline())
    if spec["contender"] in OURS:
        from fastgpt.cli import before_pytorch

        before_pytorch()
    worker = Worker(spec)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = getattr(worker, request.pop("do"))(**request)
        except Exception as problem:  # whatever ends a contender is told, and the others go on
            traceback.print_exc()
            tell(answers, {"error": reason_of(problem)})
            return 1
        tell(answers, answer)
    return 0


def tell(answers: TextIO, answer: dict[str, Any]) -> None:
    """One line."""
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


def reason_of(problem: Exception) -> str:
    """An error in one line."""
    import torch

    if isinstance(problem, torch.OutOfMemoryError):
        return "out of memory"
    lines = str(problem).strip().splitlines()
    return f"{type(problem).__name__}: {lines[0][:200] if lines else ''}"


class Worker:
    """What a process does for its parent."""

    def __init__(self, spec: dict[str, Any]) -> None:
        # PyTorch is loaded after our own start has set what it reads then
        import torch

        from benchmarks.step_contenders import Job
        from fastgpt.config import Config

        self.name: str = spec["contender"]
        self.device = torch.device(spec["device"])
        peer_path = spec["peer_path"]
        self.job = Job(Config.model_validate(spec["config"]), self.device, Path(peer_path) if peer_path else None)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)

    def open(self) -> dict[str, Any]:
        """Build the model and its optimizer."""
        import torch

        from benchmarks.step_contenders import load
        from fastgpt.data.prefetch import prefetch

        self.trainer = load(self.name, self.job)
        self.batches = prefetch(self.source().batches(1))
        return {"threads": torch.get_num_threads(), "dtype": self.trainer.dtype}

    def source(self) -> Any:
        """The same random tokens for everybody."""
        from fastgpt.data.source import RandomSource

        config = self.job.config
        model, train = config.model, config.train
        return RandomSource(model.vocab_size, model.context, train.micro_batch_size, config.micro_batches, train.seed)

    def check(self) -> dict[str, Any]:
        """The loss of one sequence before any update, then that of updates on one batch."""
        import torch

        batch = next(self.source().batches(0))
        first = self.trainer.evaluate(torch.from_numpy(batch.tokens[0, :1]))
        losses, seconds = [], []
        for _ in range(LEARNING_UPDATES):
            start = time.perf_counter()
            self.trainer.update(batch)
            self.wait()
            seconds.append(time.perf_counter() - start)
            losses.append(self.trainer.loss())
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        return {"first": first, "losses": losses, "seconds": min(seconds[1:])}

    def time(self, updates: int) -> dict[str, Any]:
        """Seconds of an update, data included."""
        self.wait()
        start = time.perf_counter()
        for _ in range(updates):
            self.trainer.update(next(self.batches))
        self.wait()
        seconds = (time.perf_counter() - start) / updates
        return {"seconds": seconds, "loss": self.trainer.loss(), "peak_bytes": self.peak_bytes()}

    def split(self, updates: int) -> dict[str, float]:
        """Seconds of each phase of an update, the device at rest between them."""
        from fastgpt.engine.phases import unobserved

        seconds: dict[str, float] = defaultdict(float)

        @contextmanager
        def stopwatch(name: str) -> Iterator[None]:
            self.wait()
            start = time.perf_counter()
            yield
            self.wait()
            seconds[name] += time.perf_counter() - start

        self.trainer.phases = stopwatch
        for _ in range(updates):
            with stopwatch("data"):
                batch = next(self.batches)
            self.trainer.update(batch)
        self.trainer.phases = unobserved
        return {name: total / updates for name, total in seconds.items()}

    def roofs(self, scale: str) -> dict[str, Any]:
        """The roofs in the format that ours computes in, with as many threads as ours."""
        import torch
        from fastgpt_kernels.native.library import reasons_against
        from fastgpt_kernels.native.peak import peak_flops as native_peak_flops

        from benchmarks import roofs
        from fastgpt.engine.precision import DTYPES
        from fastgpt.train.hardware import peak_flops
        from fastgpt.train.start import set_up

        config = set_up(self.job.config, self.device, threads=self.job.config.engine.threads)
        dtype = DTYPES[config.engine.precision]
        found = roofs.measure(self.device.type, scale, dtype)  # type: ignore[arg-type]
        peak = peak_flops(self.device) if dtype != torch.float32 else None
        if dtype == torch.bfloat16 and self.device.type == "cpu" and not reasons_against():
            peak = native_peak_flops()
        return found.record() | {"peak": peak, "threads": torch.get_num_threads()}

    def wait(self) -> None:
        """Let the device come to the end of its work."""
        import torch

        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def peak_bytes(self) -> int:
        """A GPU's memory allocated at most since the check; on a CPU the most that this process has ever had."""
        import torch

        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated()
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


if __name__ == "__main__":
    sys.exit(main())
