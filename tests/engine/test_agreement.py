"""Fifty updates on one, two and four ranks at every ZeRO stage, beside those of one process on the same batches."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

PROGRAM = Path(__file__).with_name("agreement_program.py")
STAGES, PRECISIONS, WORLD_SIZES = (0, 1, 2, 3), ("fp32", "bf16"), (1, 2, 4)
STEPS = 50
# in fp32 with dropout, whose masks must not depend on the ranks; plain PyTorch's masks would be others
DROPOUT = {"model.dropout": 0.1}
Losses = dict[str, list[float]]


@pytest.fixture(scope="module")
def losses(tmp_path_factory: pytest.TempPathFactory, command: Callable[..., Any]) -> dict[int, Losses]:
    """Losses by world size and run; one launch for each world size."""
    folder = tmp_path_factory.mktemp("agreement")
    found = {}
    for world_size in WORLD_SIZES:
        runs: list[dict[str, Any]] = [{"name": kind, "kind": kind} for kind in ("plain", "plain-low")]
        if world_size == 1:
            runs += [{"name": f"single-{p}", "kind": "single", "precision": p} for p in PRECISIONS]
        # stage 3 last: from then on its process computes linear layers by DeepSpeed's own function
        runs += [
            {"name": f"zero{stage}-{precision}", "kind": "deepspeed", "stage": stage, "precision": precision}
            for stage in STAGES
            for precision in PRECISIONS
        ]
        runs = [run | {"overrides": DROPOUT if run.get("precision") == "fp32" else {}} for run in runs]
        wanted, written = folder / "runs.json", folder / f"losses-{world_size}.json"
        wanted.write_text(json.dumps(runs))
        launcher = [sys.executable] if world_size == 1 else ["torchrun", "--nproc-per-node", str(world_size)]
        outcome: subprocess.CompletedProcess[str] = command(*launcher, PROGRAM, wanted, written, timeout=1200)
        # judged by what it wrote: DeepSpeed's ranks have been seen to abort after they had finished
        assert written.exists(), outcome.stderr[-4000:]
        found[world_size] = json.loads(written.read_text())
    return found


def largest_difference(one: list[float], other: list[float]) -> float:
    assert len(one) == len(other) == STEPS
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("stage", STAGES)
def test_fp32_losses_are_those_of_one_process(stage: int, world_size: int, losses: dict[int, Losses]) -> None:
    alone = losses[1]["single-fp32"]
    assert alone[-1] < alone[0]
    assert largest_difference(alone, losses[world_size][f"zero{stage}-fp32"]) <= 1e-5


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("stage", (1, 2, 3))
def test_bf16_losses_are_as_near_as_those_of_plain_data_parallelism(
    stage: int, world_size: int, losses: dict[int, Losses]
) -> None:
    """PyTorch's DistributedDataParallel on as many ranks beside itself on one; on one rank, beside that of two."""
    ranks = max(world_size, 2)
    theirs = largest_difference(losses[1]["plain"], losses[ranks]["plain"])
    ours = largest_difference(losses[1]["single-bf16"], losses[world_size][f"zero{stage}-bf16"])
    print(f"stage {stage}, {world_size} ranks: {ours:.2e}, plain {theirs:.2e}")
    assert ours <= 2 * theirs


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_stage_0_in_bf16_is_as_near_as_plain_data_parallelism_with_gradients_in_bf16(
    world_size: int, losses: dict[int, Losses]
) -> None:
    """DeepSpeed adds up and reduces them in bf16 there, as PyTorch does for a model in bf16; one process does not."""
    alone = losses[1]["single-bf16"]
    theirs = largest_difference(alone, losses[world_size]["plain-low"])
    ours = largest_difference(alone, losses[world_size]["zero0-bf16"])
    print(f"stage 0, {world_size} ranks: {ours:.2e}, plain {theirs:.2e}")
    assert ours <= 2 * theirs


def test_plain_data_parallelism_trains_the_same_model(losses: dict[int, Losses]) -> None:
    plain, ours = losses[1]["plain"], losses[1]["single-bf16"]
    assert plain[-1] < plain[0]
    assert plain[0] == pytest.approx(ours[0], rel=2**-8)  # a unit of bf16's precision
