"""Compiled blocks under DeepSpeed's real ranks, at every stage: few graphs, and the updates of plain blocks."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.distributed

PROGRAM = Path(__file__).with_name("ranks_program.py")
STEPS = 3
GRAPHS = 2  # of a pre-LN stack: its first block has no branch to add
Command = Callable[..., subprocess.CompletedProcess[str]]
Results = dict[str, dict[str, Any]]


def results_of(scenarios: list[dict[str, Any]], folder: Path, command: Command) -> Results:
    wanted, written = folder / "scenarios.json", folder / "results.json"
    wanted.write_text(json.dumps(scenarios))
    outcome = command("torchrun", "--nproc-per-node", "2", PROGRAM, wanted, written, timeout=900)
    # judged by what it wrote: DeepSpeed's ranks have been seen to abort after they had finished
    assert written.exists(), outcome.stderr[-4000:]
    found: Results = json.loads(written.read_text())
    return found


def scenario(name: str, stage: int, precision: str, compiler: str | None, **more: Any) -> dict[str, Any]:
    overrides = {"engine.compile": compiler is not None, **more.pop("overrides", {})}
    return {
        "name": name,
        "kind": "deepspeed",
        "stage": stage,
        "precision": precision,
        "steps": STEPS,
        "compiler": compiler,
        "overrides": overrides,
        "sharded": stage == 3,
        **more,
    }


def test_two_graphs_update_as_plain_blocks_do_where_parameters_are_gathered(tmp_path: Path, command: Command) -> None:
    """Stage 3, no parameter kept: a block gathers its own around the graph, in the forward and for the backward."""
    found = results_of(
        [scenario("plain", 3, "bf16", None), scenario("ours", 3, "bf16", "aot_eager")], tmp_path, command
    )
    plain, ours = found["plain"], found["ours"]
    assert (plain["graphs"], ours["graphs"]) == (0, GRAPHS)
    assert ours["kept_gathered"] == 0
    assert ours["updates"] == plain["updates"]
    assert ours["end"] == plain["end"]


@pytest.mark.slow
def test_every_stage_updates_as_plain_blocks_do(tmp_path: Path, command: Command) -> None:
    recomputed = {"overrides": {"train.activation_checkpointing": True}}
    scenarios = []
    # stage 3 last: from then on its process computes linear layers by DeepSpeed's own function
    for stage in range(4):
        for precision in ("fp32", "bf16"):
            for name, compiler in (("plain", None), ("traced", "aot_eager"), ("ours", "inductor")):
                scenarios.append(scenario(f"{name}-{stage}-{precision}", stage, precision, compiler))
        scenarios.append(scenario(f"recomputed-{stage}", stage, "fp32", "inductor", **recomputed))
    state = str(tmp_path / "state")
    for name, more in (("half", {"steps": 2, "write": state}), ("resumed", {"read": state})):
        scenarios.append(scenario(name, 3, "bf16", "inductor", **more))
    found = results_of(scenarios, tmp_path, command)

    def furthest(one: str, other: str) -> float:
        pairs = zip(found[one]["updates"], found[other]["updates"], strict=True)
        return max(abs(a["loss"] - b["loss"]) for a, b in pairs)

    for stage in range(4):
        for precision in ("fp32", "bf16"):
            plain, traced, ours = (found[f"{name}-{stage}-{precision}"] for name in ("plain", "traced", "ours"))
            assert (plain["graphs"], traced["graphs"], ours["graphs"]) == (0, GRAPHS, GRAPHS)
            assert traced["updates"] == plain["updates"]
        assert furthest(f"ours-{stage}-fp32", f"plain-{stage}-fp32") <= 1e-5
        rounding = furthest(f"plain-{stage}-bf16", f"plain-{stage}-fp32")
        assert furthest(f"ours-{stage}-bf16", f"plain-{stage}-bf16") <= 2 * rounding
        assert found[f"recomputed-{stage}"]["updates"] == found[f"ours-{stage}-fp32"]["updates"]
    assert found["resumed"]["updates"] == found["ours-3-bf16"]["updates"][2:]
    assert found["resumed"]["end"] == found["ours-3-bf16"]["end"]
