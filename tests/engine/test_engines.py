"""Two engines, one numerics: DeepSpeed on two ranks against the single process, and every state read by every other."""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.distributed

PROGRAM = Path(__file__).with_name("ranks_program.py")
STAGES, PRECISIONS = (0, 1, 2, 3), ("fp32", "bf16")
MIDDLE, END = 3, 6
CHANGES = ((1, 3), (2, 1), (3, 2))  # of the stage, from two ranks to one: the first is read into
Results = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def results(
    tmp_path_factory: pytest.TempPathFactory, command: Callable[..., subprocess.CompletedProcess[str]]
) -> Results:
    """One process first, then two ranks that also read its state, then one process that reads theirs."""
    folder = tmp_path_factory.mktemp("states")
    found: Results = {}

    def go(launcher: list[str], scenarios: list[dict[str, Any]]) -> None:
        wanted, written = folder / "scenarios.json", folder / "results.json"
        wanted.write_text(json.dumps(scenarios))
        written.unlink(missing_ok=True)
        outcome = command(*launcher, PROGRAM, wanted, written)
        # judged by what it wrote: DeepSpeed's ranks have been seen to abort after they had finished
        assert written.exists(), outcome.stderr[-4000:]
        found.update(json.loads(written.read_text()))

    def moved(source: str, target: str) -> dict[str, str]:
        """A state is read, and written again before anything is done with it."""
        return {"read": str(folder / source), "copy": str(folder / f"{target}-from-{source}")}

    alone, pair = [sys.executable], ["torchrun", "--nproc-per-node", "2"]
    single: list[dict[str, Any]] = []
    for precision in (*PRECISIONS, "fp16"):
        base = {"kind": "single", "stage": 0, "precision": precision}
        state = str(folder / f"single-{precision}")
        single += [
            {**base, "name": f"single-{precision}", "steps": END},
            {**base, "name": f"single-{precision}-half", "steps": MIDDLE, "write": state},
            {**base, "name": f"single-{precision}-resumed", "steps": END, "read": state},
        ]
    # 2, 4 and then 6 micro-batches: for each of two ranks one, two and three
    ramp = {"train.batch_tokens": 192, "train.batch_ramp_start": 64, "train.batch_ramp_tokens": 320}
    single += [
        {**s, "name": f"{s['name']}-ramp", "overrides": ramp}
        for s in single
        if s["name"] in ("single-fp32", "single-bf16")
    ]
    recomputed = {"train.activation_checkpointing": True}
    single.append({**single[0], "name": "single-recomputed", "overrides": recomputed})
    go(alone, single)
    deepspeed: list[dict[str, Any]] = []
    # stage 3 last: from then on its process computes linear layers by DeepSpeed's own function, which rounds once more
    for stage in STAGES:
        for precision in PRECISIONS:
            base = {"kind": "deepspeed", "stage": stage, "precision": precision}
            name, state = f"zero{stage}-{precision}", str(folder / f"zero{stage}-{precision}")
            deepspeed += [
                {**base, "name": name, "steps": END},
                {**base, "name": f"{name}-half", "steps": MIDDLE, "write": state},
                {**base, "name": f"{name}-resumed", "steps": END, "read": state},
                {**base, "name": f"{name}-from-single", "steps": END, **moved(f"single-{precision}", name)},
            ]
            grown = {**base, "name": f"{name}-ramp", "steps": END, "overrides": ramp}
            if precision == "fp32":
                deepspeed.append(grown)
            elif stage in (1, 3):
                deepspeed += [
                    grown,
                    {**grown, "name": f"{name}-ramp-half", "steps": MIDDLE, "write": f"{state}-ramp"},
                    {**grown, "name": f"{name}-ramp-resumed", "read": f"{state}-ramp"},
                ]
    for precision in PRECISIONS:
        third = next(s for s in deepspeed if s["name"] == f"zero3-{precision}")
        deepspeed += [
            {**third, "name": f"zero3-{precision}-sharded", "sharded": True},
            {**third, "name": f"zero3-{precision}-recomputed", "sharded": True, "overrides": recomputed},
        ]
    offloaded = {"engine.offload_optimizer": "cpu", "engine.offload_parameters": "cpu", **recomputed}
    deepspeed.append({**third, "name": "zero3-bf16-offloaded", "sharded": True, "overrides": offloaded})
    deepspeed.append({**deepspeed[-1], "name": "zero3-fp32-offloaded", "precision": "fp32"})
    go(pair, deepspeed)
    back = [
        {
            "name": f"single-from-zero{stage}-{precision}",
            "kind": "single",
            "stage": 0,
            "precision": precision,
            "steps": END,
            **moved(f"zero{stage}-{precision}", "single"),
        }
        for precision in PRECISIONS
        for stage in STAGES
    ]
    # two ranks' parts to one, and from one stage to another
    back += [
        {
            "name": f"zero{stage}-on-one-from-zero{other}-bf16",
            "kind": "deepspeed",
            "stage": stage,
            "precision": "bf16",
            "steps": END,
            **moved(f"zero{other}-bf16", f"zero{stage}-on-one"),
        }
        for stage, other in CHANGES
    ]
    go(alone, back)
    return found


def largest_difference(one: dict[str, Any], other: dict[str, Any], key: str) -> float:
    rows = {u["step"]: u[key] for u in one["updates"]}
    shared = [(rows[u["step"]], u[key]) for u in other["updates"] if u["step"] in rows]
    assert shared
    return max(abs(a - b) for a, b in shared)


@pytest.mark.parametrize("stage", STAGES)
def test_fp32_losses_agree_with_one_process(stage: int, results: Results) -> None:
    one, two = results["single-fp32"], results[f"zero{stage}-fp32"]
    assert len(two["updates"]) == END
    assert largest_difference(one, two, "loss") <= 1e-5
    assert largest_difference(one, two, "grad_norm") <= 1e-5


@pytest.mark.parametrize("stage", STAGES)
def test_a_growing_batch_gives_the_losses_of_one_process(stage: int, results: Results) -> None:
    one, two = results["single-fp32-ramp"], results[f"zero{stage}-fp32-ramp"]
    assert one["micro_batches"] == two["micro_batches"] == [2, 2, 2, 4, 6, 6]
    assert len(two["updates"]) == END
    assert largest_difference(one, two, "loss") <= 1e-5
    assert largest_difference(one, two, "grad_norm") <= 1e-5


@pytest.mark.parametrize("stage", (1, 3))
def test_so_it_does_in_bf16_but_for_its_rounding(stage: int, results: Results) -> None:
    rounding = largest_difference(results["single-fp32-ramp"], results["single-bf16-ramp"], "loss")
    assert largest_difference(results["single-bf16-ramp"], results[f"zero{stage}-bf16-ramp"], "loss") <= 2 * rounding


@pytest.mark.parametrize("stage", STAGES)
def test_bf16_starts_from_the_same_rounded_weights(stage: int, results: Results) -> None:
    one, two = results["single-bf16"], results[f"zero{stage}-bf16"]
    assert two["dtype"] == "torch.bfloat16"
    # the first forward pass knows no gradient yet: the losses are the same numbers
    assert one["first_forward"] == two["first_forward"]
    assert one["updates"][0]["loss"] == two["updates"][0]["loss"]


@pytest.mark.parametrize("stage", (1, 2, 3))
def test_bf16_stays_as_near_to_one_process_as_bf16_is_to_fp32(stage: int, results: Results) -> None:
    rounding = largest_difference(results["single-fp32"], results["single-bf16"], "loss")
    assert largest_difference(results["single-bf16"], results[f"zero{stage}-bf16"], "loss") <= 2 * rounding


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("stage", STAGES)
def test_a_resumed_run_repeats_every_bit(stage: int, precision: str, results: Results) -> None:
    whole, half, resumed = (results[f"zero{stage}-{precision}{part}"] for part in ("", "-half", "-resumed"))
    assert resumed["first_forward"] == half["last_forward"]
    assert resumed["updates"] == whole["updates"][MIDDLE:]
    assert resumed["end"] == whole["end"]


@pytest.mark.parametrize("stage", (1, 3))
def test_a_run_resumed_where_its_batch_grows_repeats_every_bit(stage: int, results: Results) -> None:
    whole, resumed = results[f"zero{stage}-bf16-ramp"], results[f"zero{stage}-bf16-ramp-resumed"]
    assert resumed["micro_batches"] == [4, 6, 6]
    assert resumed["updates"] == whole["updates"][MIDDLE:]
    assert resumed["end"] == whole["end"]


@pytest.mark.parametrize("precision", (*PRECISIONS, "fp16"))
def test_a_resumed_single_run_repeats_every_bit(precision: str, results: Results) -> None:
    whole, half, resumed = (results[f"single-{precision}{part}"] for part in ("", "-half", "-resumed"))
    assert resumed["first_forward"] == half["last_forward"]
    assert resumed["updates"] == whole["updates"][MIDDLE:]
    assert resumed["end"] == whole["end"]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("stage", STAGES)
def test_a_state_moves_between_the_engines(stage: int, precision: str, results: Results) -> None:
    name = f"zero{stage}-{precision}"
    moves = (
        (results[f"single-{precision}-half"], results[f"{name}-from-single"]),
        (results[f"{name}-half"], results[f"single-from-{name}"]),
    )
    for written, read in moves:
        assert read["changed"] == []  # of masters and both moments
        assert read["start"] == written["end"]
        if stage < 3:
            # what the next forward pass really uses, not what a getter says
            assert read["first_forward"] == written["last_forward"]
        if precision == "fp32":
            assert largest_difference(results["single-fp32"], read, "loss") <= 1e-5


@pytest.mark.parametrize(("stage", "other"), CHANGES)
def test_a_state_of_two_ranks_is_taken_up_by_one_at_another_stage(stage: int, other: int, results: Results) -> None:
    """Every pair of stages and world sizes, also of three and four ranks: test_reshape.py."""
    written, read = results[f"zero{other}-bf16-half"], results[f"zero{stage}-on-one-from-zero{other}-bf16"]
    assert read["changed"] == []
    assert read["start"] == written["end"]
    assert [update["step"] for update in read["updates"]] == [*range(MIDDLE + 1, END + 1)]


def test_recomputed_activations_change_no_bit(results: Results) -> None:
    assert results["single-recomputed"]["updates"] == results["single-fp32"]["updates"]
    for precision in PRECISIONS:
        assert results[f"zero3-{precision}-recomputed"]["updates"] == results[f"zero3-{precision}"]["updates"]


def test_what_is_offloaded_changes_no_loss_but_by_rounding(results: Results) -> None:
    """With activation checkpointing, and no parameter kept gathered; all other cases are in test_offload.py."""
    assert largest_difference(results["zero3-fp32"], results["zero3-fp32-offloaded"], "loss") <= 1e-5
    assert largest_difference(results["single-fp32"], results["zero3-fp32-offloaded"], "loss") <= 1e-5
    rounding = largest_difference(results["single-fp32"], results["single-bf16"], "loss")
    assert largest_difference(results["zero3-bf16"], results["zero3-bf16-offloaded"], "loss") <= 2 * rounding


@pytest.mark.parametrize("precision", PRECISIONS)
def test_parameters_that_are_gathered_for_their_modules_only_change_no_bit(precision: str, results: Results) -> None:
    kept, sharded = results[f"zero3-{precision}"], results[f"zero3-{precision}-sharded"]
    assert (kept["kept_gathered"] > 0, sharded["kept_gathered"]) == (True, 0)
    assert sharded["updates"] == kept["updates"]
    assert sharded["end"] == kept["end"]


def test_samples_after_an_update_come_from_the_new_weights(results: Results) -> None:
    """Keys and values are kept from one token of a sample to the next, but not from one update to the next."""
    for name, result in results.items():
        assert result["sampling_moved"] > 0.01, name
        if "fp32" in name:
            assert max(result["sampling_errors"]) <= 1e-5, name


def test_an_engine_announces_the_gradient_that_comes(results: Results) -> None:
    """So that the loss is one pass over the logits, and its gradient rounded once."""
    for name, result in results.items():
        ranks = 1 if name.startswith("single") or "on-one" in name else 2
        assert len(result["loss_gradients"]) == sum(result["micro_batches"]) // ranks, name
        assert all(came == announced for came, announced in result["loss_gradients"]), name


def test_gradients_were_clipped(results: Results) -> None:
    """The scenarios' clip is below the norms, so the agreement above covers clipping."""
    assert all(u["grad_norm"] > 0.5 for u in results["single-fp32"]["updates"])


def test_every_loss_is_finite(results: Results) -> None:
    assert all(math.isfinite(u["loss"]) and u["applied"] for r in results.values() for u in r["updates"])
