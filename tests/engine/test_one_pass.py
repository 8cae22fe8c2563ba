"""ZeRO-1 in bf16: our update beside DeepSpeed's own and the single engine's, from the same weights and batches."""

import json
import logging
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fastgpt.engine.one_pass import in_one_pass

PROGRAM = Path(__file__).with_name("one_pass_program.py")
MICRO_BATCHES = 4
Results = dict[str, Any]


@pytest.fixture(scope="module")
def of_ranks(
    tmp_path_factory: pytest.TempPathFactory, command: Callable[..., subprocess.CompletedProcess[str]]
) -> Callable[[int], Results]:
    """What a number of ranks wrote."""

    @cache
    def go(ranks: int) -> Results:
        written = tmp_path_factory.mktemp("one-pass") / "results.json"
        outcome = command("torchrun", "--nproc-per-node", str(ranks), PROGRAM, written)
        # judged by what it wrote: DeepSpeed's ranks have been seen to abort after they had finished
        assert written.exists(), outcome.stderr[-4000:]
        return {"ranks": ranks} | json.loads(written.read_text())

    return go


@pytest.fixture(params=[1, 2])
def results(request: pytest.FixtureRequest, of_ranks: Callable[[int], Results]) -> Results:
    """What one rank wrote, and what two did."""
    return of_ranks(request.param)


@pytest.mark.distributed
def test_without_clipping_every_bit_is_that_of_deepspeeds_update(results: Results) -> None:
    ours, theirs = results["ours"], results["deepspeed"]
    assert ours["state"] == theirs["state"] and ours["state"]["applied"] == 4
    assert ours["weights"] == theirs["weights"]
    assert [u["loss"] for u in ours["updates"]] == [u["loss"] for u in theirs["updates"]]


@pytest.mark.distributed
def test_without_clipping_one_rank_has_every_bit_of_the_single_engine(of_ranks: Callable[[int], Results]) -> None:
    ours, single = (of_ranks(1)[kind] for kind in ("ours", "single"))
    assert ours["state"] == single["state"] and ours["weights"] == single["weights"]
    assert [u["loss"] for u in ours["updates"]] == [u["loss"] for u in single["updates"]]


@pytest.mark.distributed
def test_the_norm_is_deepspeeds_but_for_the_order_of_its_sum(results: Results) -> None:
    for kind in ("", "-clipped"):
        ours, theirs = (results[f"{name}{kind}"]["updates"][0] for name in ("ours", "deepspeed"))
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-6) and ours["grad_norm"] > 0.5
    # the weights after a clipped update differ by its last bits, and the losses by the rounding of those weights
    for ours, theirs in zip(*(results[f"{name}-clipped"]["updates"] for name in ("ours", "deepspeed")), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=2**-8)


@pytest.mark.distributed
def test_an_update_whose_gradient_is_not_a_number_changes_nothing(results: Results) -> None:
    poisoned, left_out = results["poisoned"], results["left-out"]
    assert [u["applied"] for u in poisoned["updates"]] == [True, False, True, True]
    assert poisoned["updates"][1]["grad_norm"] == float("inf")
    assert poisoned["state"] == left_out["state"] and left_out["state"]["applied"] == 3
    assert poisoned["weights"] == left_out["weights"]


@pytest.mark.distributed
def test_the_host_asks_the_device_for_nothing_before_the_update_is_read(results: Results) -> None:
    asked = results["questions"]
    assert asked["ours"] == 0 and asked.get("single", 0) == 0
    assert asked["deepspeed"] > 0  # so they would have been seen


@pytest.mark.distributed
def test_the_engine_tells_its_phases_in_order(results: Results) -> None:
    own = MICRO_BATCHES // results["ranks"]
    assert results["ours"]["phases"] == [*("data", "forward", "backward") * own, "optimizer"] * 4


@pytest.mark.distributed
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_one_rank_that_reduces_nothing_trains_as_the_single_engine(
    stage: int, of_ranks: Callable[[int], Results]
) -> None:
    results = of_ranks(1)
    theirs, ours = (results[name]["updates"] for name in ("single-fp32", f"{stage}-fp32"))
    for one, other in zip(theirs, ours, strict=True):
        assert abs(one["loss"] - other["loss"]) <= 1e-5 and abs(one["grad_norm"] - other["grad_norm"]) <= 1e-5
    theirs, ours, fp32 = (results[name]["updates"] for name in ("single-bf16", f"{stage}-bf16", "single-fp32"))
    assert ours[0]["loss"] == theirs[0]["loss"]
    if stage > 0:  # stage 0 sums gradients in bf16
        rounding = max(abs(a["loss"] - b["loss"]) for a, b in zip(theirs, fp32, strict=True))
        assert max(abs(a["loss"] - b["loss"]) for a, b in zip(theirs, ours, strict=True)) <= 2 * rounding


def test_a_wrapper_that_is_built_otherwise_keeps_its_own_update(caplog: pytest.LogCaptureFixture) -> None:
    class Other(SimpleNamespace):
        def step(self) -> None: ...

    wrapper = Other(dp_rank=0, bf16_partitioned_groups=[])
    with caplog.at_level(logging.WARNING):
        in_one_pass(wrapper)
    assert type(wrapper) is Other
    assert "this DeepSpeed's Other has no optimizer: its own update is used" in caplog.text
