"""An LSTM under DeepSpeed's real ranks: the updates of one process, weights sharded too, and exact resumes."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

PROGRAM = Path(__file__).with_name("ranks_program.py")
# two layers and a projection
LSTM = {"model.kind": "lstm", "model.n_head": None, "model.n_units": 40, "model.dropout": 0.1}
RECOMPUTED = LSTM | {"train.activation_checkpointing": True}
OFFLOADED = RECOMPUTED | {"engine.offload_optimizer": "cpu", "engine.offload_parameters": "cpu"}
MIDDLE, END = 3, 6
STAGES = (0, 1, 2, 3)
Results = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def results(
    tmp_path_factory: pytest.TempPathFactory, command: Callable[..., subprocess.CompletedProcess[str]]
) -> Results:
    """One process first, then two ranks that also read its state."""
    folder = tmp_path_factory.mktemp("states")

    def run(launcher: list[str], scenarios: list[dict[str, Any]]) -> Results:
        wanted, written = folder / "scenarios.json", folder / "results.json"
        wanted.write_text(json.dumps([{"overrides": LSTM, "steps": END} | s for s in scenarios]))
        written.unlink(missing_ok=True)
        outcome = command(*launcher, PROGRAM, wanted, written)
        # judged by what it wrote: DeepSpeed's ranks have been seen to abort after they had finished
        assert written.exists(), outcome.stderr[-4000:]
        found: Results = json.loads(written.read_text())
        return found

    alone, ranks = [], []
    for precision in ("fp32", "bf16"):
        single = {"kind": "single", "stage": 0, "precision": precision}
        state = str(folder / f"single-{precision}")
        alone += [
            {**single, "name": f"single-{precision}"},
            {**single, "name": f"single-{precision}-half", "steps": MIDDLE, "write": state},
        ]
        for stage in STAGES:
            base = {"kind": "deepspeed", "stage": stage, "precision": precision, "sharded": stage == 3}
            name, state_here = f"zero{stage}-{precision}", str(folder / f"zero{stage}-{precision}")
            ranks += [
                {**base, "name": name},
                {**base, "name": f"{name}-half", "steps": MIDDLE, "write": state_here},
                {**base, "name": f"{name}-resumed", "read": state_here},
                {**base, "name": f"{name}-from-single", "read": state},
            ]
        ranks.append({**base, "name": f"zero3-{precision}-recomputed", "overrides": RECOMPUTED})
    ranks.append({**base, "name": "zero3-fp32-offloaded", "precision": "fp32", "overrides": OFFLOADED})
    return run([sys.executable], alone) | run(["torchrun", "--nproc-per-node", "2"], ranks)


def largest_difference(one: dict[str, Any], other: dict[str, Any], key: str) -> float:
    rows = {u["step"]: u[key] for u in one["updates"]}
    shared = [(rows[u["step"]], u[key]) for u in other["updates"]]
    assert shared
    return max(abs(a - b) for a, b in shared)


@pytest.mark.parametrize("stage", STAGES)
def test_fp32_losses_agree_with_one_process(stage: int, results: Results) -> None:
    for name in (f"zero{stage}-fp32", f"zero{stage}-fp32-from-single"):
        assert results[name]["updates"][-1]["step"] == END
        for key in ("loss", "grad_norm"):
            assert largest_difference(results["single-fp32"], results[name], key) <= 1e-5


@pytest.mark.parametrize("stage", (1, 2, 3))
def test_bf16_stays_as_near_to_one_process_as_bf16_is_to_fp32(stage: int, results: Results) -> None:
    one, two = results["single-bf16"], results[f"zero{stage}-bf16"]
    assert two["dtype"] == "torch.bfloat16" and two["updates"][0]["loss"] == one["updates"][0]["loss"]
    assert largest_difference(one, two, "loss") <= 2 * largest_difference(results["single-fp32"], one, "loss")


@pytest.mark.parametrize("precision", ("fp32", "bf16"))
@pytest.mark.parametrize("stage", STAGES)
def test_a_resumed_run_repeats_every_bit(stage: int, precision: str, results: Results) -> None:
    whole, half, resumed = (results[f"zero{stage}-{precision}{part}"] for part in ("", "-half", "-resumed"))
    assert resumed["first_forward"] == half["last_forward"]
    assert resumed["updates"] == whole["updates"][MIDDLE:]
    assert resumed["end"] == whole["end"]


@pytest.mark.parametrize("precision", ("fp32", "bf16"))
def test_sharded_weights_and_recomputed_activations_change_no_bit(precision: str, results: Results) -> None:
    kept, recomputed = results[f"zero3-{precision}"], results[f"zero3-{precision}-recomputed"]
    assert kept["kept_gathered"] == recomputed["kept_gathered"] == 0
    assert recomputed["updates"] == kept["updates"]
    assert recomputed["end"] == kept["end"]


def test_what_is_offloaded_changes_no_loss_but_by_rounding(results: Results) -> None:
    assert largest_difference(results["single-fp32"], results["zero3-fp32-offloaded"], "loss") <= 1e-5


def test_samples_come_from_a_state_that_is_carried_on_with_the_new_weights(results: Results) -> None:
    for name, result in results.items():
        assert result["sampling_moved"] > 1e-4, name
        if "fp32" in name:
            assert max(result["sampling_errors"]) <= 1e-5, name
