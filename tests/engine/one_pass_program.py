"""Run by torchrun: ZeRO-1 in bf16 by our update, by DeepSpeed's own, and by the single engine; on one rank others too.

usage: one_pass_program.py RESULTS
"""

import hashlib
import json
import math
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import torch
from fastgpt_kernels import FusedAdamW, load_ops
from ranks_program import CONTEXT, MICRO_BATCH, VOCABULARY, settings
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastgpt.config import Config
from fastgpt.data.source import Batch, RandomSource
from fastgpt.engine.deepspeed_settings import deepspeed_settings
from fastgpt.engine.optimizer import updates_applied
from fastgpt.engine.prepare import prepare
from fastgpt.engine.ranks import Ranks, join, leave
from fastgpt.engine.zero import DeepSpeedZero
from fastgpt.launchers import find_launch
from fastgpt.model.gpt import GPT

Kind = Literal["ours", "deepspeed", "single"]
POISONED = "blocks.1.mlp.up.weight"


def build(
    kind: Kind, clip: float | None, ranks: Ranks, stage: int = 1, precision: str = "bf16"
) -> tuple[Any, Iterator[Batch]]:
    """An engine, and this rank's batches."""
    overrides = {"train.clip": clip, "train.schedule": "constant", "train.warmup_steps": 0, "model.dropout": 0.0}
    config = settings({"stage": stage, "overrides": overrides})
    with ExitStack() as patches:
        if kind == "deepspeed":
            patches.enter_context(mock.patch("fastgpt.engine.layouts.in_one_pass"))
            patches.enter_context(mock.patch("fastgpt.engine.zero.deepspeed_settings", without_our_bf16))
        engine = prepare(
            lambda: GPT(config.model, load_ops("torch")),
            config,
            kind="single" if kind == "single" else "deepspeed",
            precision=precision,
            device=torch.device("cpu"),
            ranks=ranks,
        )
    source = RandomSource(VOCABULARY, CONTEXT, MICRO_BATCH, config.micro_batches, 7, ranks.rank, ranks.world_size)
    return engine, source.batches(0)


def without_our_bf16(config: Config, precision: str, world_size: int, **more: Any) -> dict[str, Any]:
    return deepspeed_settings(config, precision, world_size, **more) | {"bf16": {"enabled": True}}


def train(
    kind: Kind, ranks: Ranks, clip: float | None = None, *, left_out: int = -1, poisoned: int = -1, **wanted: Any
) -> dict[str, Any]:
    """Four updates, without that of one batch, or with a gradient of rank 0 that is not a number in one."""
    engine, batches = build(kind, clip, ranks, **wanted)
    updates, phases = [], []

    @contextmanager
    def phase(name: str) -> Iterator[None]:
        phases.append(name)
        yield

    engine.phases = phase
    for number, batch in zip(range(4), batches, strict=False):
        if number == left_out:
            continue
        with poison(engine) if number == poisoned and ranks.rank == 0 else nullcontext():
            updates.append(engine.update(batch).update._asdict())
    return {
        "updates": updates,
        "phases": phases,
        "state": state_of(engine),
        "weights": {name: digest(weight) for name, weight in engine._weights.items()},
    }


@contextmanager
def poison(engine: Any) -> Iterator[None]:
    """One gradient is not a number."""
    hook = engine._weights[POISONED].register_hook(lambda gradient: gradient * math.nan)
    yield
    hook.remove()


def state_of(engine: Any) -> dict[str, Any]:
    """Digests of this rank's masters and moments by the name of the weight, and the updates that Adam has counted."""
    if isinstance(engine, DeepSpeedZero):
        fragments, optimizer = list(engine._layout.fragments()), engine._layout.optimizer
    else:
        fragments, optimizer = engine._fragments(), engine._optimizer
    found: dict[str, Any] = {"applied": updates_applied(optimizer)}
    for piece in fragments:
        state = optimizer.state[piece.master]
        whole = (piece.master.detach(), state["exp_avg"], state["exp_avg_sq"])
        found[piece.parameter] = [digest(x.view(-1)[piece.offset : piece.offset + piece.length]) for x in whole]
    return found


def digest(x: Tensor) -> str:
    return hashlib.sha256(x.detach().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


class Questions(TorchDispatchMode):
    """Counts how often the host asks for a number that a device would have to compute first."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.asked += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def questions(kind: Kind, ranks: Ranks) -> int:
    """In an update, but for those of the optimizer and the norm, whose forms for a CPU ask."""
    engine, batches = build(kind, 0.5, ranks)
    _ = engine.update(next(batches)).update
    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(FusedAdamW, "step"))
        for module in ("single", "one_pass"):
            norm = mock.Mock(return_value=torch.tensor(2.0))
            patches.enter_context(mock.patch(f"fastgpt.engine.{module}.grad_norm", norm))
        mode = patches.enter_context(Questions())
        engine.update(next(batches))
    return mode.asked


def main() -> None:
    torch.set_num_threads(1)
    launch = find_launch()
    assert launch
    ranks = join(launch, torch.device("cpu"), 5)
    results: dict[str, Any] = {
        "ours": train("ours", ranks),
        "deepspeed": train("deepspeed", ranks),
        "ours-clipped": train("ours", ranks, 0.5),
        "deepspeed-clipped": train("deepspeed", ranks, 0.5),
        "poisoned": train("ours", ranks, 0.5, poisoned=1),
        "left-out": train("ours", ranks, 0.5, left_out=1),
        "questions": {kind: questions(kind, ranks) for kind in ("ours", "deepspeed")},
    }
    if ranks.world_size == 1:
        results |= {"single": train("single", ranks)}
        for precision in ("fp32", "bf16"):
            for stage in (0, 1, 2):
                results[f"{stage}-{precision}"] = train("ours", ranks, 0.5, stage=stage, precision=precision)
            results[f"single-{precision}"] = train("single", ranks, 0.5, precision=precision)
        results["questions"]["single"] = questions("single", ranks)
    if ranks.rank == 0:
        Path(sys.argv[1]).write_text(json.dumps(results))
    leave()


if __name__ == "__main__":
    main()
