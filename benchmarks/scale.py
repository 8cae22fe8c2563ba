"""`fastgpt bench scale`: one engine beside ZeRO's stages on one rank and on several, and the plan beside the measured.

A layout is an engine on a number of ranks. Each has fresh processes, one layout after the other from start to end: they
would not fit beside each other. Strong scaling shares the settings' batch among the ranks; weak scaling gives each as
much as one has of it. Before its first turn a layout must show that it trains, and begins with the losses of the first.

The results file is rewritten with everything that a layout tells: a run cut short loses nothing.
"""

import importlib.util
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import ValidationError

from benchmarks import environment, gpu, session
from benchmarks.contenders import Unavailable
from benchmarks.results import NO_TIME, Record
from benchmarks.scale_engines import ENGINES, with_engine
from benchmarks.scale_group import Group
from benchmarks.session import Keeping, say, timed
from benchmarks.shapes import Scale
from benchmarks.step import TOY_PARAMETERS, allowed_difference
from benchmarks.step_process import ContenderFailed, TimeIsOver
from fastgpt.config import Config, only_transformers
from fastgpt.engine.host import available_cores
from fastgpt.engine.precision import resolve_device
from fastgpt.errors import UserError, did_you_mean
from fastgpt.plan.layout import as_configured
from fastgpt.plan.memory import needed
from fastgpt.plan.speed import collectives
from fastgpt.settings import load_config
from fastgpt.sizes import parameter_count

ROUNDS = 5
DEFAULT_RANKS = (1, 2, 4)


@dataclass
class Layout:
    """An engine on some ranks, and what is known of it."""

    engine: str
    ranks: int
    config: Config
    modes: dict[str, int]  # micro-batches of an update over all ranks
    found: dict[str, Any] = field(default_factory=dict)  # as the worker tells it
    traffic: dict[str, Any] = field(default_factory=dict)  # by mode
    seconds: dict[str, list[float]] = field(default_factory=dict)  # of an update, round by round, by mode
    calls: dict[str, int] = field(default_factory=dict)
    outcome: str | None = None  # where it is not measured, or wrong
    reason: str | None = None

    @property
    def name(self) -> str:
        """What people call it."""
        return f"{self.engine} on {self.ranks} rank{'s' if self.ranks > 1 else ''}"

    def direction(self, mode: str) -> str:
        """The mode, as a row of results has it: on one rank both are the same."""
        return "1 rank" if self.ranks == 1 else f"{mode}, {self.ranks} ranks"

    def batch(self, mode: str) -> Config:
        """The settings with the batch of a mode and nothing left on `auto`, for the plan."""
        config = with_engine(self.config, self.engine, self.found["opened"]["dtype"])
        unit = config.train.micro_batch_size * config.model.context
        train = config.train.model_copy(update={"batch_tokens": self.modes[mode] * unit})
        return config.model_copy(update={"train": train})


class Case(NamedTuple):
    """What is measured."""

    name: str
    part: str
    config: Config
    scale: Scale
    on_gpu: bool
    settings: Sequence[str]  # the file's name without its ending, and what replaces its settings


def run(
    config: str,
    overrides: Sequence[str] = (),
    *,
    ranks: str | None = None,
    engines: str | None = None,
    rounds: int = ROUNDS,
    **keeping: Any,
) -> int:
    """Measure, keep what was found, and print it.

    Args:
        config: a file of settings.
        overrides: settings that replace the file's.
        ranks: numbers of ranks, separated by commas; by default 1, 2 and 4, on GPUs as many as there are.
        engines: names of `ENGINES`, separated by commas; by default the single engine and every ZeRO stage.
        rounds: turns of each.
        keeping: the fields of `Keeping`.

    Returns:
        The exit code: 1 where a layout failed.

    Raises:
        UserError: settings, names or numbers that cannot be.
    """
    if rounds < 1:
        raise UserError(f"--rounds must be at least 1, not {rounds}")
    kept = Keeping(**keeping)
    case = case_of(config, overrides)
    return Session(case, chosen_engines(engines, case), chosen_ranks(ranks, case), rounds, kept.end).carry_out(kept)


def case_of(path: str, overrides: Sequence[str]) -> Case:
    """The settings as they are measured: the learning rate constant, so that the first updates change weights."""
    config = load_config(path, overrides)
    only_transformers(config.model, "this benchmark")
    tree = config.model_dump()
    tree["train"] |= {"schedule": "constant", "warmup_steps": 0, "batch_ramp_tokens": None, "batch_ramp_start": None}
    config = Config.model_validate(tree)
    model, train, precision = config.model, config.train, config.engine.precision
    stem = Path(path).stem
    words = [
        *(["dropout"] if model.dropout else []),
        *([precision] if precision in ("fp16", "fp32") else []),
        *(["recomputed"] if train.activation_checkpointing else []),
        *(["offload"] if config.engine.offloads else []),
    ]
    on_gpu = resolve_device(config.engine.device).type == "cuda"
    scale: Scale = "gpu" if on_gpu else "cpu"
    if parameter_count(model) < TOY_PARAMETERS:
        scale = "toy"
    return Case(
        " ".join([stem, f"N={model.n_embd}", f"T={model.context}", *words]),
        "-".join(["scale", stem, *words]),
        config,
        scale,
        on_gpu,
        (stem, *overrides),
    )


def chosen_engines(asked: str | None, case: Case) -> list[str]:
    """Names, the single engine first."""
    if asked is None:
        return [name for name in ENGINES if name != "single-no-graph" and against(name, case) is None]
    names = words_of(asked)
    for name in names:
        if name not in ENGINES:
            near = did_you_mean(name, ENGINES) or f" There are {', '.join(ENGINES)}"
            raise UserError(f"--engines: there is no '{name}'.{near}")
        if problem := against(name, case):
            raise UserError(f"--engines: {name} cannot be measured with these settings: {problem}")
    if not names:
        raise UserError(f"--engines: nobody is named. There are {', '.join(ENGINES)}")
    return sorted(names, key=list(ENGINES).index)


def against(engine: str, case: Case) -> str | None:
    """Why an engine cannot do what the settings ask for; None where it can."""
    try:
        with_engine(case.config, engine)
    except ValidationError as problem:
        return problem.errors()[0]["msg"]
    return None


def chosen_ranks(asked: str | None, case: Case) -> list[int]:
    """Numbers of ranks, the smallest first."""
    if asked is None:
        most = torch.cuda.device_count() if case.on_gpu else max(DEFAULT_RANKS)
        return [number for number in DEFAULT_RANKS if number <= most and case.config.micro_batches % number == 0]
    words = words_of(asked)
    if not words or not all(word.isdecimal() and int(word) > 0 for word in words):
        raise UserError(f"--ranks: '{asked}' is not a list of numbers above 0, as 1,2,4 is")
    numbers = sorted({int(word) for word in words})
    for number in numbers:
        if case.config.micro_batches % number:
            raise UserError(
                f"--ranks: {case.config.micro_batches} micro-batches an update cannot be shared by {number} ranks; "
                "give a train.batch_tokens of more micro-batches"
            )
    return numbers


def words_of(text: str) -> list[str]:
    """A list separated by commas, each word once."""
    return list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))


class Session(session.Session):
    """A run of all layouts."""

    def __init__(
        self, case: Case, engines: Sequence[str], ranks: Sequence[int], rounds: int, end: float = math.inf
    ) -> None:
        super().__init__(case.part, case.scale, end, on_gpu=case.on_gpu)
        self.case, self.rounds = case, rounds
        self.layouts = [
            self.layout(name, number)
            for number in ranks
            for name in engines
            if number == 1 or ENGINES[name]["kind"] != "single"
        ]
        self.session = {"load": environment.load(), "clocks": {}, "threads": self.threads(ranks)}

    def threads(self, ranks: Sequence[int]) -> int:
        """CPU threads of each rank: as many whether few ranks or many are measured, or they would not compare."""
        return self.case.config.engine.threads or max(1, len(available_cores()) // max(ranks))

    def layout(self, engine: str, ranks: int) -> Layout:
        """An engine on some ranks."""
        micro_batches = self.case.config.micro_batches
        modes = {"strong": micro_batches} | ({"weak": micro_batches * ranks} if ranks > 1 else {})
        return Layout(engine, ranks, with_engine(self.case.config, engine), modes)

    def measure(self) -> None:
        """One layout after the other, each with its share of the time that is left."""
        try:
            for number, each in enumerate(self.layouts):
                left = len(self.layouts) - number
                self.guarded(each, time.time() + (self.end - time.time()) / left)
        finally:
            self.keep()

    def guarded(self, each: Layout, until: float) -> None:
        """Measure one; what ends it does not end the others."""
        try:
            if time.time() >= self.end:
                raise TimeIsOver
            check_available(each, on_gpu=self.case.on_gpu)
            self.listen(each, until)
        except Unavailable as problem:
            each.outcome, each.reason = "skipped", str(problem)
        except TimeIsOver:
            if not each.seconds:
                each.outcome, each.reason = "skipped", NO_TIME
        except ContenderFailed as problem:
            each.outcome, each.reason = "failed", str(problem)
        if each.reason:
            say(f"{each.name}: {each.outcome}: {each.reason}")
        self.keep()

    def listen(self, each: Layout, until: float) -> None:
        """Start its ranks, and take down what they tell."""
        spec = {
            "config": threaded(each.config, self.session["threads"]).model_dump(),
            "modes": each.modes,
            "rounds": self.rounds,
            "until": until,
        }
        group = Group(spec, each.ranks, cwd=str(gpu.ROOT), environment=gpu.child_environment())
        try:
            # one that is late with its first turn may take what time there is
            for found in group.answers(self.end):
                self.take_down(each, found)
                self.keep()
        except ContenderFailed:
            print(group.printed(), file=sys.stderr)
            raise
        finally:
            group.close()

    def take_down(self, each: Layout, found: dict[str, Any]) -> None:
        """A line of a layout's."""
        [(what, about)] = found.items()
        if what == "time":
            if not math.isfinite(about["loss"]):
                raise ContenderFailed(f"its loss has become {about['loss']}")
            each.seconds.setdefault(about["mode"], []).append(about["seconds"])
            each.calls[about["mode"]] = about["calls"]
            say(f"{each.name}, {about['mode']}: {1e3 * about['seconds']:.4g} ms an update")
        elif what == "traffic":
            each.traffic[about["mode"]] = about
        else:
            each.found[what] = about
            if what == "check":
                self.judge(each)

    def judge(self, each: Layout) -> None:
        """See that it trains, and as the first that was measured does."""
        first, losses = each.found["check"]["first"], each.found["check"]["losses"]
        even = math.log(self.case.config.model.vocab_size)
        if not all(map(math.isfinite, (first, *losses))):
            raise ContenderFailed(f"its losses are {[first, *losses]}")
        if abs(first - even) > 1.0:
            raise ContenderFailed(f"its first loss is {first:.4f}; random weights give about ln V = {even:.4f}")
        if not min(losses[1:]) < losses[0]:
            raise ContenderFailed(f"it does not learn: its losses on one batch are {losses}")
        other = next(one for one in self.layouts if "check" in one.found)
        theirs = other.found["check"]["losses"][0]
        # an overflow has been met before, and where it was met more often the weights are the same all the same
        if abs(losses[0] - theirs) > allowed_difference(theirs):
            raise ContenderFailed(f"its first batch has loss {losses[0]:.6f}, and {theirs:.6f} on {other.name}")
        say(f"{each.name}: loss {first:.4f}; on one batch {losses[0]:.4f} to {min(losses):.4f}")

    def lines(self) -> list[Record]:
        """Everything found so far: a line for each mode of each layout that has come to something."""
        return [line for each in self.layouts for line in self.lines_of(each)]

    def lines_of(self, each: Layout) -> Iterator[Record]:
        """The lines of a layout; what was measured before it failed is among them, unless its numbers are wrong."""
        if each.outcome:
            mode = next((mode for mode in each.modes if mode not in each.seconds), next(iter(each.modes)))
            yield self.common(each, mode) | {"outcome": each.outcome, "reason": each.reason or ""}
        for mode, seconds in each.seconds.items():
            config = each.batch(mode)
            tokens = config.train.batch_tokens
            about = timed(seconds)
            line = self.common(each, mode) | {
                "dtype": each.found["opened"]["dtype"],
                "threads": each.found["opened"]["threads"],
                "start_seconds": each.found["opened"]["seconds"],
                "settings": list(self.case.settings),
                "parameters": parameter_count(config.model),
                "shapes": [[config.micro_batches, config.train.micro_batch_size, config.model.context]],
                "tokens": tokens,
                "tokens_per_second": tokens / about["median"],
                **about,
                "calls": each.calls[mode],
                "timed_by": "updates, with the host's part, until the last rank is done",
                "efficiency": self.efficiency(each, mode),
                "communication": communication(each, mode),
                "memory": memory(each, mode),
                "first_loss": each.found["check"]["first"],
                "losses": each.found["check"]["losses"],
                "load": environment.load(),
                "session": self.session,
            }
            if "scaling" in each.found:
                line["scaling"] = each.found["scaling"]
            yield line

    def common(self, each: Layout, mode: str) -> Record:
        """What every line has."""
        return {
            "test": f"{self.case.name} {each.name} {mode}",
            "outcome": "passed",
            "seconds": self.seconds,
            "operation": "scale",
            "case": self.case.name,
            "direction": each.direction(mode),
            "contender": each.engine,
            "ranks": each.ranks,
            "mode": mode,
        }

    def efficiency(self, each: Layout, mode: str) -> float | None:
        """The work of a rank by that of the same engine on one rank, in the same time; None where that is not known."""
        one = next((one for one in self.layouts if one.engine == each.engine and one.ranks == 1), None)
        if one is None or not one.seconds or each.ranks == 1:
            return None
        alone, together = (session.median(seconds) for seconds in (one.seconds["strong"], each.seconds[mode]))
        work = each.modes[mode] / one.modes["strong"] / each.ranks
        return alone * work / together

    def failure(self) -> str | None:
        """The first layout that failed."""
        failed = (each for each in self.layouts if each.outcome == "failed")
        return next((f"{each.name}: {each.reason}" for each in failed), None)


def check_available(each: Layout, *, on_gpu: bool) -> None:
    """Refuse a layout that cannot be here.

    Raises:
        Unavailable: with the reason.
    """
    if each.config.engine.kind == "deepspeed" and not importlib.util.find_spec("deepspeed"):
        raise Unavailable("deepspeed is not installed")
    if each.config.engine.precision == "fp16" and not on_gpu:
        raise Unavailable("fp16 needs a GPU")
    if each.engine == "single-no-graph" and not on_gpu:
        raise Unavailable("the single engine has no CUDA graph on a CPU")
    if on_gpu and each.ranks > torch.cuda.device_count():
        raise Unavailable(f"it needs {each.ranks} GPUs; there are {torch.cuda.device_count()}")


def threaded(config: Config, threads: int) -> Config:
    """The settings with a number of threads for each rank."""
    tree = config.model_dump()
    tree["engine"]["threads"] = threads
    return Config.model_validate(tree)


def communication(each: Layout, mode: str) -> Record:
    """Bytes that each rank sends in an update: by collective as they were counted, and as the plan has them."""
    config = each.batch(mode)
    layout = as_configured(config, each.ranks)
    planned = {c.name: c.volume(each.ranks) for c in collectives(config, layout)}
    counted = each.traffic.get(mode, {"sent": {}, "calls": {}})
    return {
        "counted": counted["sent"],
        "calls": counted["calls"],
        "planned": planned,
        "counted_total": sum(counted["sent"].values()),
        "planned_total": sum(planned.values()),
    }


def memory(each: Layout, mode: str) -> Record:
    """Bytes of a rank: as they were counted, of the strong batch, and at the fullest moment of the plan."""
    config = each.batch(mode)
    planned = needed(config, as_configured(config, each.ranks))
    return {"counted": each.found.get("memory", {}), "planned": planned._asdict() | {"total": planned.total}}
