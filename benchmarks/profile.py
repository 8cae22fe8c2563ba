"""`fastgpt bench profile`: where the time of an update of the single engine goes, kind of work by kind of work.

PyTorch's profiler tells the time of each operation without the operations within it; each is counted with the kind that
its name, or that of an operation around it, says. What the matrix products take is compared with the GEMM roof that was
measured just before; all else is what an update at that roof would not have. To be looked at costs time: how long an
update takes unobserved is measured by `fastgpt bench step`.
"""

import time
from collections.abc import Iterator, Sequence
from typing import Any

from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

from benchmarks import environment, roofs, session, step
from benchmarks.results import Record
from benchmarks.session import Keeping, median, say, timed
from benchmarks.step_contenders import Job
from fastgpt.config import Config
from fastgpt.data.source import RandomSource
from fastgpt.engine.backend import ops_for
from fastgpt.engine.precision import DTYPES
from fastgpt.engine.prepare import prepare
from fastgpt.engine.ranks import Ranks
from fastgpt.errors import UserError
from fastgpt.model.gpt import GPT
from fastgpt.sizes import flops_per_token
from fastgpt.train.start import set_up

ROUNDS = 5
WARM_UP = 3
PRODUCTS, OTHER, HOST = "matrix products", "other operations", "between operations"
GENERAL = (PRODUCTS, "bias gradients", "sums and copies")
# the first of these words that is in the name of an operation, or else of one around it
KINDS = {
    "attention": ("attention",),
    "cross-entropy": ("cross_entropy", "OnePass", "CrossEntropy"),
    "embedding": ("embedding", "Embedding"),
    "optimizer": ("Optimizer.step", "adamw"),
    "gradient norm": ("vector_norm", "gradient_norm"),
    "normalisation": ("layer_norm", "LayerNorm"),
    "GELU": ("gelu", "Gelu"),
    PRODUCTS: ("native_linear", "aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::linear", "Linear"),
    "bias gradients": ("aten::sum",),
    "sums and copies": ("aten::add", "aten::copy_", "aten::_foreach", "aten::zero_", "aten::fill_"),
}


def run(config: str, overrides: Sequence[str] = (), *, rounds: int = ROUNDS, **keeping: Any) -> int:
    """Measure, keep what was found, and print it.

    Args:
        config: a file of settings.
        overrides: settings that replace the file's.
        rounds: updates that are looked at.
        keeping: the fields of `Keeping`.

    Returns:
        The exit code, 0.

    Raises:
        UserError: settings or options that cannot be.
    """
    if rounds < 1:
        raise UserError(f"--rounds must be at least 1, not {rounds}")
    kept = Keeping(**keeping)
    case = step.case_of(config, [*overrides, "engine.cuda_graph=false"], None)
    return Session(case, rounds, kept.end).carry_out(kept)


class Session(session.Session):
    """Updates of one engine."""

    def __init__(self, case: step.Case, rounds: int, end: float) -> None:
        super().__init__(
            case.part.replace("step-", "profile-", 1), case.scale, end, on_gpu=case.job.device.type == "cuda"
        )
        self.case, self.rounds = case, rounds
        self.found: list[dict[str, float]] = []
        self.session: Record = {}

    def measure(self) -> None:
        """Look at some updates, after others that nobody looks at."""
        job: Job = self.case.job
        config = set_up(job.config, job.device)
        self.config = config
        measured = roofs.measure(job.device.type, self.case.scale, DTYPES[config.engine.precision])
        self.session = {**measured.record(), "load": environment.load(), "threads": config.engine.threads}
        engine = prepare(
            lambda: GPT(config.model, ops_for(config.kernels.backend, job.device)),
            config,
            kind="single",
            precision=config.engine.precision,
            device=job.device,
            ranks=Ranks(),
        )
        batches = RandomSource(
            config.model.vocab_size,
            config.model.context,
            config.train.micro_batch_size,
            config.micro_batches,
            config.train.seed,
        ).batches(0)
        for _ in range(WARM_UP):
            _ = engine.update(next(batches)).update
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.on_gpu else [])]
        while len(self.found) < self.rounds and (not self.found or time.time() < self.end):
            batch = next(batches)
            with profile(activities=activities) as seen:
                start = time.perf_counter()
                _ = engine.update(batch).update
                seconds = time.perf_counter() - start
            self.found.append(by_kind(seen.events() or [], seconds, on_gpu=self.on_gpu))
            say(f"round {len(self.found)} of {self.rounds}: {1e3 * seconds:.0f} ms")
            self.keep()

    def lines(self) -> list[Record]:
        """A line for each kind of work, the longest first."""
        kinds = {kind for found in self.found for kind in found}
        times = {kind: [found.get(kind, 0.0) for found in self.found] for kind in kinds}
        whole = median([sum(found.values()) for found in self.found]) if self.found else 0.0
        return [self.line(kind, times[kind], whole) for kind in sorted(kinds, key=lambda kind: -median(times[kind]))]

    def line(self, kind: str, seconds: list[float], whole: float) -> Record:
        """A line of results."""
        config = self.config
        row: Record = {
            "test": f"{self.case.name} {kind}",
            "outcome": "passed",
            "seconds": self.seconds,
            "operation": "profile",
            "case": self.case.name,
            "direction": "update",
            "contender": kind,
            "shapes": [[config.micro_batches, config.train.micro_batch_size, config.model.context]],
            "dtype": config.engine.precision,
            **timed(seconds),
            "share": median(seconds) / whole,
            "timed_by": "PyTorch's profiler, each operation without those in it",
            "load": environment.load(),
            "session": self.session,
        }
        if kind == PRODUCTS:
            work = product_flops(config)
            row |= {"work": work, "roof_share": work / median(seconds) / self.session["gemm"]}
        return row


def by_kind(events: Sequence[FunctionEvent], seconds: float, *, on_gpu: bool) -> dict[str, float]:
    """Seconds of an update by kind of work, on the device; they add up to `seconds`, or on a GPU to its busy time."""
    found: dict[str, float] = {}
    for event in events:
        own = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if own > 0:
            kind = kind_of(event)
            found[kind] = found.get(kind, 0.0) + own * 1e-6
    found[HOST] = max(0.0, seconds - sum(found.values()))
    return found


def kind_of(event: FunctionEvent) -> str:
    """What an operation is counted with."""
    names = list(around(event))
    for kind, words in KINDS.items():
        # of what any operation may be made of, its own name counts, and that of the one around it
        seen = names[:2] if kind in GENERAL else names
        if any(word in name for name in seen for word in words):
            return kind
    return OTHER


def around(event: FunctionEvent) -> Iterator[str]:
    """The operation's name, and of those around it, from the inside."""
    while event is not None:
        yield event.name
        event = event.cpu_parent


def product_flops(config: Config) -> int:
    """Operations of an update's matrix products, attention's apart: 6 for each weight and token."""
    model = config.model
    attention = 12 * model.n_layer * model.n_embd * model.context
    return (flops_per_token(model) - attention) * config.micro_batches * config.train.micro_batch_size * model.context
