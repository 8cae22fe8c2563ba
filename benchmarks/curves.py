"""`fastgpt bench curves`: the loss of a real training run, ours laid over plain PyTorch's.

Ours is the single engine with its fused operations, AdamW, clipping and schedule. Plain PyTorch is `PlainGPT` under
`torch.optim.AdamW` and `clip_grad_norm_`, with the same initial weights, the same batches of real text in the order of
`fastgpt train`, and the same learning rates; then the same from other initialisation seeds. How far apart the seeds lie
is the measure for how far ours may lie from plain: `benchmarks.spread`. There is no dropout.

Plain comes first: where it is stopped by the time, it says how many updates are compared. One after the other they
train in this process, in fp32 and in bf16 where `engine.precision` is auto.
"""

import gc
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from fastgpt_kernels import UnsupportedInput

from benchmarks import environment, gpu, session, spread
from benchmarks.contenders import Unavailable
from benchmarks.results import NO_TIME, Record
from benchmarks.session import Keeping, say, timed
from benchmarks.shapes import Scale
from benchmarks.step_contenders import Job, Ours, Peer, Trainer, adamw, check_available
from benchmarks.step_models import PlainGPT
from fastgpt.config import Config, only_transformers
from fastgpt.data.prefetch import prefetch
from fastgpt.data.shards import TokenShards
from fastgpt.data.source import Batch, ShardSource
from fastgpt.engine.precision import resolve_device
from fastgpt.engine.ranks import Ranks
from fastgpt.engine.schedule import learning_rate
from fastgpt.errors import UserError
from fastgpt.model.seeds import fold
from fastgpt.ramp import batch_tokens, micro_batches
from fastgpt.settings import load_config
from fastgpt.sizes import parameter_count
from fastgpt.train.command import ORDER
from fastgpt.train.corpus import prepare_corpus
from fastgpt.train.display import display_for
from fastgpt.train.evaluation import sample_text

SEEDS = 4
TOY_PARAMETERS = 1_000_000  # below it a run shows that all works, and measures nothing
TELL_EVERY = 50  # updates
# a GPT-2 that two CPU cores train a dozen times in some minutes
SMALL = "gpt2-small"
SMALL_GPT2 = (
    "model.n_layer=4", "model.n_head=4", "model.n_embd=128", "model.context=128", "model.vocab_size=4096",
    "data.path=stdlib", "data.tokenizer=auto", "data.validation_fraction=0.02",
    "train.steps=200", "train.batch_tokens=1024", "train.micro_batch_size=4", "train.lr=1e-3", "train.min_lr=1e-4",
    "train.warmup_steps=20", "train.eval_tokens=32768", "train.sample_tokens=48", "engine.precision=auto",
)  # fmt: skip


class Case(NamedTuple):
    """What is trained."""

    name: str
    part: str
    job: Job
    precisions: tuple[str, ...]
    scale: Scale


@dataclass
class Curve:
    """One training run, and what is known of it."""

    name: str
    precision: str
    seed: int  # of the initial weights; the batches are the settings'
    losses: list[float] = field(default_factory=list)  # update by update, nats per token
    seconds: list[float] = field(default_factory=list)
    validation: dict[int, float] = field(default_factory=dict)  # by updates done
    sample: str | None = None
    dtype: str = ""
    outcome: str | None = None  # where it has come to nothing
    reason: str | None = None


class Plain(Peer):
    """Plain PyTorch by the schedule of the settings, from initial values that are rounded as ours are."""

    def __init__(self, job: Job, seed: int) -> None:
        model = PlainGPT(job.config.model, seed)
        autocast = None if job.config.engine.precision == "fp32" else torch.bfloat16
        if autocast:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.copy_(parameter.to(autocast))
        model = model.to(job.device)
        super().__init__(job, model, model, adamw(model, job.config), autocast)

    def update(self, batch: Batch) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(batch.step, self.job.config.train)
        super().update(batch)


def run(
    config: str | None = None,
    overrides: Sequence[str] = (),
    *,
    seeds: int = SEEDS,
    each: float | None = None,
    **keeping: Any,
) -> int:
    """Train, keep the curves, and print what comes of them.

    Args:
        config: a file of settings; by default a small GPT-2.
        overrides: settings that replace the file's.
        seeds: further initialisation seeds of plain PyTorch.
        each: ours and plain train no longer than so many seconds each; ours then goes on after the last common update.
        keeping: the fields of `Keeping`; what time is left is shared by the curves to come.

    Returns:
        The exit code: 1 where ours is further from plain PyTorch than seeds are, or a loss is no number.

    Raises:
        UserError: an option, settings or a text that cannot be.
    """
    if seeds < spread.LEAST_SEEDS:
        raise UserError(f"--seeds must be at least {spread.LEAST_SEEDS}, not {seeds}")
    if each is not None and not each > 0:
        raise UserError(f"--each must be above 0, not {each:g}")
    kept = Keeping(**keeping)
    if config is not None and "=" in config and not Path(config).exists():
        config, overrides = None, (config, *overrides)
    try:
        return Session(case_of(config, overrides), seeds, each, kept.end).carry_out(kept)
    except UnsupportedInput as problem:
        raise UserError(f"kernels.backend: {' '.join(str(problem).split())}") from problem


def case_of(path: str | None, overrides: Sequence[str]) -> Case:
    """The settings as they are trained: in one process, without dropout."""
    if path is None:
        stem, config = SMALL, load_config(gpu.ROOT / "configs" / "gpt2-124m.yaml", (*SMALL_GPT2, *overrides))
    else:
        stem, config = Path(path).stem, load_config(path, overrides)
    only_transformers(config.model, "this benchmark")
    precision = config.engine.precision
    if precision == "fp16":
        raise UserError("engine.precision: fp16 is not compared with plain PyTorch; use bf16, fp32 or auto for both")
    if config.train.optimizer != "adamw":
        raise UserError(f"train.optimizer: PyTorch has no {config.train.optimizer}; use adamw")
    for key, usual in (("layer_lr_decay", 1.0), ("unfreeze_every", None), ("init", None)):
        if getattr(config.train, key) != usual:
            raise UserError(f"train.{key}: is not compared with plain PyTorch; leave it out")
    tree = config.model_dump()
    tree["engine"] |= {"kind": "single", "offload_optimizer": "none", "offload_parameters": "none", "nvme_folder": None}
    tree["model"]["dropout"] = 0.0
    config = Config.model_validate(tree)
    job = Job(config, resolve_device(config.engine.device), None)
    try:
        check_available("plain", job)
    except Unavailable as problem:
        raise UserError(f"model: plain PyTorch cannot be compared: {problem}") from None
    scale: Scale = "gpu" if job.device.type == "cuda" else "cpu"
    if parameter_count(config.model) < TOY_PARAMETERS:
        scale = "toy"
    precisions = ("fp32", "bf16") if precision == "auto" else (precision,)
    return Case(f"{stem} T={config.model.context}", f"curves-{stem}", job, precisions, scale)


class Session(session.Session):
    """All curves, one after the other."""

    def __init__(self, case: Case, seeds: int, each: float | None, end: float = math.inf) -> None:
        super().__init__(case.part, case.scale, end, on_gpu=case.job.device.type == "cuda")
        self.case, self.each = case, each
        seed = case.job.config.train.seed
        further = [(f"plain seed {seed + number}", seed + number) for number in range(1, seeds + 1)]
        self.groups = {
            precision: [Curve(name, precision, s) for name, s in (("plain", seed), ("ours", seed), *further)]
            for precision in case.precisions
        }
        self.session: Record = {}
        self.text: Record = {}

    def measure(self) -> None:
        """Prepare the text, and train everybody on it."""
        config = self.case.job.config
        if config.engine.threads:
            torch.set_num_threads(config.engine.threads)
        self.session = {"load": environment.load(), "clocks": {}, "threads": torch.get_num_threads()}
        corpus = prepare_corpus(config, Ranks(), display_for(0))
        self.training, self.validation = (
            TokenShards.open(corpus.folder, split, verify=False) for split in ("train", "validation")
        )
        self.windows = validation_rows(self.validation, config)
        corpus.verified()
        self.text = {
            "name": Path(config.data.path).name,
            "fingerprint": corpus.fingerprint,
            "tokens": len(self.training),
            "validation_tokens": self.windows[:, 1:].size,
        }
        try:
            for group in self.groups.values():
                for curve in group:
                    self.take_turn(curve, group)
                    self.keep()
        finally:
            self.keep()

    def take_turn(self, curve: Curve, group: Sequence[Curve]) -> None:
        """Build, train and validate one."""
        plain, ours = group[:2]
        config = self.case.job.config
        if curve is not plain and (plain.outcome or (curve is not ours and ours.outcome)):
            curve.outcome, curve.reason = "skipped", "there is nothing to compare"
            return
        if time.time() >= self.end:
            curve.outcome, curve.reason = "skipped", NO_TIME
            return
        common = min((len(other.losses) for other in (plain, ours) if other.losses), default=config.train.steps)
        most = config.train.steps if curve is ours and self.each else common
        trainer = self.trainer(curve)
        curve.dtype = trainer.dtype
        try:
            self.train(trainer, curve, most, common)
            if curve.outcome is None:
                self.validate(trainer, curve)
            if isinstance(trainer, Ours) and curve.outcome is None and config.train.sample_tokens:
                curve.sample = sample_text(trainer.engine, self.training.tokenizer(), config)
        finally:
            del trainer
            gc.collect()
            if self.on_gpu:
                torch.cuda.empty_cache()

    def train(self, trainer: Trainer, curve: Curve, most: int, common: int) -> None:
        """Update once, and until `most` are done or the time is over; ours is validated where plain was, too."""
        limited = self.each is not None and curve.name in ("ours", "plain")
        deadline = self.end if limited else time.time() + self.share_of(curve)
        with prefetch(self.batches()) as batches:
            while not curve.losses or (len(curve.losses) < most and time.time() < deadline):
                batch = next(batches)
                start = time.perf_counter()
                trainer.update(batch)
                loss = trainer.loss()
                curve.seconds.append(time.perf_counter() - start)
                if not math.isfinite(loss):
                    curve.outcome, curve.reason = "failed", f"its loss is {loss} at update {batch.step}"
                    say(f"{curve.precision} {curve.name}: {curve.reason}")
                    return
                curve.losses.append(loss)
                if batch.step == 1 and limited:  # which may have compiled kernels
                    deadline = min(self.end, time.time() + (self.each or 0.0))
                if batch.step == common < most:
                    self.validate(trainer, curve)
                if batch.step % TELL_EVERY == 0 or batch.step in (1, most):
                    say(f"{curve.precision} {curve.name}: update {batch.step} of {most}, loss {loss:.4f}")

    def share_of(self, curve: Curve) -> float:
        """Seconds of those that are left for a curve and all after it."""
        curves = [other for group in self.groups.values() for other in group]
        waiting = len(curves) - next(n for n, other in enumerate(curves) if other is curve)
        return max(0.0, self.end - time.time()) / waiting

    def trainer(self, curve: Curve) -> Trainer:
        """Who trains a curve."""
        job = self.case.job
        tree = job.config.model_dump()
        tree["engine"]["precision"] = curve.precision
        job = job._replace(config=Config.model_validate(tree))
        return Ours(job, "ours") if curve.name == "ours" else Plain(job, curve.seed)

    def batches(self) -> Iterator[Batch]:
        """Those of `fastgpt train`, from the first."""
        config = self.case.job.config
        sizes, order = micro_batches(config), fold(config.train.seed, ORDER)
        source = ShardSource(self.training, config.model.context, config.train.micro_batch_size, sizes, order)
        return source.batches(0)

    def validate(self, trainer: Trainer, curve: Curve) -> None:
        """The mean loss over the validation windows."""
        size = self.case.job.config.train.micro_batch_size
        batches = [torch.from_numpy(self.windows[at : at + size]) for at in range(0, len(self.windows), size)]
        summed = math.fsum(trainer.evaluate(batch) * len(batch) for batch in batches)
        curve.validation[len(curve.losses)] = summed / len(self.windows)

    def comparison(self, precision: str) -> spread.Comparison | None:
        """Ours beside plain, where both have trained, with the spread of the seeds that have."""
        plain, ours, *others = self.groups[precision]
        if not (plain.losses and ours.losses) or plain.outcome or ours.outcome:
            return None
        return spread.compare(ours.losses, plain.losses, [each.losses for each in others if each.losses])

    def lines(self) -> list[Record]:
        """A line for each curve that has come to something; the comparison is with ours."""
        return [
            self.line(curve) for group in self.groups.values() for curve in group if curve.outcome or curve.validation
        ]

    def line(self, curve: Curve) -> Record:
        """A curve's line of results."""
        config = self.case.job.config
        found: Record = {
            "test": f"{self.case.name} {curve.precision} {curve.name}",
            "outcome": curve.outcome or "passed",
            "seconds": self.seconds,
            "operation": "curves",
            "case": f"{self.case.name} {curve.precision}",
            "direction": "train",
            "contender": curve.name,
        }
        if curve.outcome:
            return found | {"reason": curve.reason, "losses": curve.losses}
        times = timed(curve.seconds)
        del times["times"]
        found |= {
            "dtype": curve.dtype,
            "seed": curve.seed,
            "updates": len(curve.losses),
            "tokens": batch_tokens(config).before(len(curve.losses) + 1),
            "losses": curve.losses,
            "validation": [{"updates": updates, "loss": loss} for updates, loss in curve.validation.items()],
            **times,
            "timed_by": "updates, each waited for",
            "tokens_per_second": config.train.batch_tokens / times["median"],
            "text": self.text,
            "settings": {"model": config.model.model_dump(), "train": config.train.model_dump()},
            "session": self.session,
        }
        if curve.name == "ours" and (comparison := self.comparison(curve.precision)):
            found |= {"comparison": comparison.record(), "sample": curve.sample}
        return found

    def failure(self) -> str | None:
        """The first curve that failed, or the first comparison that does."""
        for precision, group in self.groups.items():
            for curve in group:
                if curve.outcome == "failed":
                    return f"{precision} {curve.name}: {curve.reason}"
            comparison = self.comparison(precision)
            if comparison and (step := comparison.first_outside):
                difference, allowed = comparison.differences[step - 1], comparison.spread[step - 1]
                return (
                    f"{precision}: at update {step} ours differs from plain PyTorch by {difference:.3g}, "
                    f"and seeds by {allowed:.3g}"
                )
        return None


def validation_rows(shards: TokenShards, config: Config) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Windows of the validation text that follow one another, (rows, T + 1), at most `train.eval_tokens` tokens.

    Raises:
        UserError: the text has not enough tokens for one.
    """
    context, limit = config.model.context, config.train.eval_tokens
    rows = (len(shards) - 1) // context
    if limit is not None:
        rows = min(rows, max(1, limit // context))
    if rows < 1:
        raise UserError(
            f"{shards.folder}: the validation split has {len(shards)} tokens, and one window of context {context} "
            f"needs {context + 1}; give more text or a larger data.validation_fraction"
        )
    return shards.gather(np.arange(rows, dtype=np.int64) * context, context + 1)
