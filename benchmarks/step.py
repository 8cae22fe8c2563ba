"""`fastgpt bench step`: whole training updates, ours and others', each in a process of its own, in turns.

An update is forward, loss, backward, clipping and AdamW on random tokens of the settings' shape. Threads, allocators
and compilers' caches belong to a process, so each contender has one; all of them are alive, and in each round every one
takes its turn while the others wait, so that what happens to the machine happens to all. Before its first turn each
must show that it trains. Phases are measured in turns of their own, because looking at them costs time.

The results file is rewritten after every round: a run cut short loses nothing.
"""

import math
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import environment, gpu, session, step_contenders
from benchmarks.contenders import Unavailable
from benchmarks.results import NO_TIME, Record
from benchmarks.session import Keeping, say, timed
from benchmarks.shapes import Scale
from benchmarks.step_contenders import ABOUT, NAMES, SAME_WEIGHTS, Job
from benchmarks.step_process import ContenderFailed, Process, TimeIsOver
from fastgpt.config import Config, only_transformers
from fastgpt.engine.precision import resolve_device
from fastgpt.errors import UserError, did_you_mean
from fastgpt.settings import load_config
from fastgpt.sizes import flops_per_token, parameter_count

ROUNDS = 10
SPLIT_EVERY = 3  # rounds
TURN_SECONDS, MAX_UPDATES = 0.3, 50  # a turn is as many updates as fill so many seconds
BEGIN_SHARE = 0.6  # of the time, for building and checking: who is not ready then leaves the rest to the others
TOY_PARAMETERS = 1_000_000  # below it a run shows that all works, and measures nothing
FORMULA = "6 N + 12 L C T operations a token, N the weights in matrix products, attention counted in full"


@dataclass
class Contender:
    """How one of them stands."""

    name: str
    process: Process | None = None
    opened: dict[str, Any] = field(default_factory=dict)
    check: dict[str, Any] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)  # of an update, round by round
    splits: list[dict[str, float]] = field(default_factory=list)
    updates: int = 1  # of a turn
    peak_bytes: int = 0
    outcome: str | None = None  # where it is not measured any more
    reason: str | None = None

    def end(self, outcome: str | None = None, reason: str | None = None) -> None:
        """Take no part any more."""
        self.outcome, self.reason = outcome, reason
        if self.process:
            self.process.close()
            self.process = None


class Case(NamedTuple):
    """What is measured."""

    name: str
    part: str
    job: Job
    scale: Scale


def run(
    config: str,
    overrides: Sequence[str] = (),
    *,
    contenders: str | None = None,
    peer_path: str | None = None,
    rounds: int = ROUNDS,
    label: str = "",
    one_at_a_time: bool = False,
    **keeping: Any,
) -> int:
    """Measure, keep what was found, and print it.

    Args:
        config: a file of settings.
        overrides: settings that replace the file's.
        contenders: names, separated by commas; by default all that the device can run.
        peer_path: nanoGPT's folder.
        rounds: turns of each.
        label: of letters, digits and hyphens; keeps it beside other measurements of the same file in the results.
        one_at_a_time: one after the other from start to end, for a GPU whose memory does not hold all.
        keeping: the fields of `Keeping`.

    Returns:
        The exit code: 1 where ours failed.

    Raises:
        UserError: settings, names or folders that cannot be.
    """
    if rounds < 1:
        raise UserError(f"--rounds must be at least 1, not {rounds}")
    if not re.fullmatch(r"[a-zA-Z0-9-]*", label):
        raise UserError(f"--label: {label!r} must be of letters, digits and hyphens")
    kept = Keeping(**keeping)
    case = case_of(config, overrides, peer_path, label)
    names = chosen(contenders, case.job)
    return Session(case, names, rounds, kept.end, one_at_a_time=one_at_a_time).carry_out(kept)


def case_of(path: str, overrides: Sequence[str], peer_path: str | None, label: str = "") -> Case:
    """The settings as they are measured: the learning rate constant, so that the first updates change weights."""
    config = load_config(path, overrides)
    only_transformers(config.model, "this benchmark")
    tree = config.model_dump()
    tree["train"] |= {"schedule": "constant", "warmup_steps": 0}
    tree["engine"]["kind"] = "single"
    config = Config.model_validate(tree)
    folder = None
    if peer_path is not None:
        folder = Path(peer_path).resolve()
        if not step_contenders.is_nanogpt(folder):
            raise UserError(f"--peer-path: {peer_path} is not a folder with nanoGPT's model.py")
    model = config.model
    stem = Path(path).stem
    name = f"{stem} T={model.context}" + (" dropout" if model.dropout else "")
    device = resolve_device(config.engine.device)
    scale: Scale = "gpu" if device.type == "cuda" else "cpu"
    if parameter_count(model) < TOY_PARAMETERS:
        scale = "toy"
    part = f"step-{stem}"
    if label:
        name, part = f"{name}, {label}", f"{part}-{label}"
    return Case(name, part, Job(config, device, folder), scale)


def chosen(asked: str | None, job: Job) -> list[str]:
    """Names of contenders, ours first."""
    if asked is None:
        return step_contenders.defaults(job.device.type, job.peer_path)
    names = list(dict.fromkeys(word.strip() for word in asked.split(",") if word.strip()))
    for name in names:
        if name not in NAMES:
            near = did_you_mean(name, NAMES) or f" There are {', '.join(NAMES)}"
            raise UserError(f"--contenders: there is no '{name}'.{near}")
        if name.startswith("nanogpt") and job.peer_path is None:
            raise UserError(f"--contenders: {name} needs --peer-path, a folder with nanoGPT's model.py")
    if not names:
        raise UserError(f"--contenders: nobody is named. There are {', '.join(NAMES)}")
    return sorted(names, key=NAMES.index)


class Session(session.Session):
    """A run of all contenders."""

    def __init__(
        self, case: Case, names: Sequence[str], rounds: int, end: float = math.inf, *, one_at_a_time: bool = False
    ) -> None:
        super().__init__(case.part, case.scale, end, on_gpu=case.job.device.type == "cuda")
        self.case, self.rounds, self.one_at_a_time = case, rounds, one_at_a_time
        self.contenders = [Contender(name) for name in names]
        self.roofs: dict[str, Any] | None = None

    def measure(self) -> None:
        """Let everybody take their turns."""
        try:
            self.measure_roofs()
            for each in self.contenders:
                self.guarded(each, lambda each: step_contenders.check_available(each.name, self.case.job))
            if self.one_at_a_time:
                for number, each in enumerate(self.contenders):
                    self.begin([each])
                    left = len(self.contenders) - number
                    self.take_turns([each], time.time() + (self.end - time.time()) / left)
                    self.leave(each)
            else:
                self.begin(self.contenders)
                self.take_turns(self.contenders, self.end)
        finally:
            for each in self.contenders:
                self.leave(each)
            self.keep()

    def measure_roofs(self) -> None:
        """The roofs, by a process that has the device for itself."""
        process = self.start("roofs")
        try:
            self.roofs = process.ask("roofs", self.end, scale=self.case.scale)
        except TimeIsOver:
            pass
        except ContenderFailed as problem:
            raise UserError(f"the roofs of {self.case.job.device} cannot be measured: {problem}") from None
        finally:
            process.close()

    def begin(self, contenders: Sequence[Contender]) -> None:
        """Build all models at once, then see one after the other that each trains."""
        for each in contenders:
            if each.outcome is None:
                each.process = self.start(each.name)
                each.process.begin("open")
        ready_by = time.time() + BEGIN_SHARE * (self.end - time.time())
        for each in contenders:
            self.guarded(each, lambda each: self.open_and_check(each, ready_by))

    def open_and_check(self, each: Contender, ready_by: float) -> None:
        """Build, update on one batch, and judge what came of it."""
        assert each.process
        each.opened = each.process.answer(ready_by)
        each.check = each.process.ask("check", ready_by)
        if wrong := self.wrong_with(each):
            raise ContenderFailed(wrong)
        each.updates = max(1, min(MAX_UPDATES, math.ceil(TURN_SECONDS / each.check["seconds"])))
        first, *later = each.check["losses"]
        say(f"{each.name}: loss {each.check['first']:.4f}; on one batch {first:.4f} to {min(later):.4f}")

    def wrong_with(self, each: Contender) -> str | None:
        """Why its numbers show that it does not train a GPT, or None."""
        first, losses = each.check["first"], each.check["losses"]
        even = math.log(self.case.job.config.model.output_rows)
        if not all(map(math.isfinite, (first, *losses))):
            return f"its losses are {[first, *losses]}"
        if abs(first - even) > 1.0:
            return f"its first loss is {first:.4f}; random weights give about ln V = {even:.4f}"
        # the best of them: with a full learning rate from the start, a loss may fall, leap, and fall again
        if not min(losses[1:]) < losses[0]:
            return f"it does not learn: from loss {losses[0]:.4f} to {min(losses[1:]):.4f} in {len(losses)} updates"
        ours = self.contenders[0]
        if ours.name == "ours" and ours.check and each.name in SAME_WEIGHTS:
            theirs = ours.check["first"]
            if abs(first - theirs) > allowed_difference(theirs):
                return f"its first loss is {first:.4f}, and ours with the same weights {theirs:.4f}"
        return None

    def take_turns(self, contenders: Sequence[Contender], end: float) -> None:
        """Rounds, each contender once in each; the first round is taken however late it is."""
        for number in range(self.rounds):
            taking = [each for each in contenders if each.process]
            if not taking or (number and time.time() >= end):
                break
            for each in taking:
                self.guarded(each, self.take_turn)
                if number % SPLIT_EVERY == 0 and each.process:
                    self.guarded(each, self.take_split)
            times = ", ".join(f"{each.name} {1e3 * each.seconds[-1]:.4g} ms" for each in taking if each.seconds)
            if times:
                say(f"round {number + 1} of {self.rounds}: {times}")
            self.keep()

    def take_turn(self, each: Contender) -> None:
        """Some updates, timed together."""
        assert each.process
        found = each.process.ask("time", self.end, updates=each.updates)
        if not math.isfinite(found["loss"]):
            raise ContenderFailed(f"its loss has become {found['loss']}")
        each.seconds.append(found["seconds"])
        each.peak_bytes = found["peak_bytes"]

    def take_split(self, each: Contender) -> None:
        """The same, phase by phase."""
        assert each.process
        each.splits.append(each.process.ask("split", self.end, updates=each.updates))

    def guarded(self, each: Contender, do: Callable[[Contender], None]) -> None:
        """Let one do something; what ends it does not end the others."""
        if each.outcome is not None:
            return
        try:
            do(each)
        except Unavailable as problem:
            each.end("skipped", str(problem))
        except TimeIsOver:
            each.end(None if each.seconds else "skipped", None if each.seconds else NO_TIME)
        except ContenderFailed as problem:
            printed = each.process.printed() if each.process else ""
            each.end("failed", str(problem))
            print(printed, file=sys.stderr)
        else:
            return
        if each.reason:
            say(f"{each.name}: {each.outcome}: {each.reason}")
        self.keep()

    def leave(self, each: Contender) -> None:
        """Let its process go."""
        if each.process:
            each.end()

    def start(self, name: str) -> Process:
        """A process that knows the job."""
        job = self.case.job
        spec = {
            "contender": name,
            "config": job.config.model_dump(),
            "device": str(job.device),
            "peer_path": None if job.peer_path is None else str(job.peer_path),
        }
        return Process(spec, cwd=str(gpu.ROOT), environment=gpu.child_environment())

    def lines(self) -> list[Record]:
        """Everything found so far, a line for each contender that has come to something."""
        return [self.line(each) for each in self.contenders if each.outcome or each.seconds]

    def failure(self) -> str | None:
        """Ours, where it failed."""
        ours = next((each for each in self.contenders if each.name == "ours"), None)
        return f"ours: {ours.reason}" if ours and ours.outcome == "failed" else None

    def line(self, each: Contender) -> Record:
        """A contender's line of results."""
        config = self.case.job.config
        about = {
            "test": f"{self.case.name} {each.name}",
            "outcome": each.outcome or "passed",
            "seconds": self.seconds,
            "operation": "step",
            "case": self.case.name,
            "direction": "update",
            "contender": each.name,
            "about": ABOUT[each.name],
        }
        if each.outcome:
            about["reason"] = each.reason or ""
        if each.outcome or not each.seconds:
            return about
        assert self.roofs
        median = statistics.median(each.seconds)
        work = flops_per_token(config.model) * config.train.batch_tokens
        rate, gemm, peak = work / median, self.roofs["gemm"], self.roofs["peak"]
        same = each.name in SAME_WEIGHTS and each.name != "ours" and self.contenders[0].name == "ours"
        return about | {
            "shapes": [[config.micro_batches, config.train.micro_batch_size, config.model.context]],
            "dtype": each.opened["dtype"],
            "threads": each.opened["threads"],
            "tokens": config.train.batch_tokens,
            "tokens_per_second": config.train.batch_tokens / median,
            **timed(each.seconds),
            "calls": each.updates,
            "timed_by": "updates, with the host's part",
            "split": {
                name: statistics.median(split.get(name, 0.0) for split in each.splits)
                for name in dict.fromkeys(name for split in each.splits for name in split)
            },
            "peak_bytes": each.peak_bytes,
            "work": work,
            "unit": "FLOP",
            "formula": FORMULA,
            "rate": rate,
            "roof": gemm,
            "roof_share": rate / gemm,
            "peak": peak,
            "peak_share": peak and rate / peak,
            "first_loss": each.check["first"],
            "losses": each.check["losses"],
            "numbers": "learns" + (", and begins as ours" if same else ""),
            "load": environment.load(),
            "session": self.roofs,
        }


def allowed_difference(loss: float) -> float:
    """One unit of bfloat16's precision: what the rounding of weights and activations may do to a mean loss."""
    return torch.finfo(torch.bfloat16).eps * abs(loss)
