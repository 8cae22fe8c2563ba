"""One table of tokens and positions under DeepSpeed's real ranks: at every stage the updates of one process."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

PROGRAM = Path(__file__).with_name("ranks_program.py")
TABLE = {"model.embedding": "table", "model.norm": "post", "model.dropout": 0.1}
STEPS = 4


def test_every_stage_updates_a_table_as_one_process_does(
    tmp_path: Path, command: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    def run(launcher: list[str], scenarios: list[dict[str, Any]]) -> dict[str, Any]:
        wanted, written = tmp_path / "scenarios.json", tmp_path / "results.json"
        wanted.write_text(
            json.dumps([{"precision": "fp32", "steps": STEPS, "overrides": TABLE} | s for s in scenarios])
        )
        written.unlink(missing_ok=True)
        outcome = command(*launcher, PROGRAM, wanted, written)
        # judged by what it wrote: DeepSpeed's ranks have been seen to abort after they had finished
        assert written.exists(), outcome.stderr[-4000:]
        found: dict[str, Any] = json.loads(written.read_text())
        return found

    one = run([sys.executable], [{"name": "one", "kind": "single", "stage": 0}])["one"]["updates"]
    stages = [{"name": str(n), "kind": "deepspeed", "stage": n, "sharded": n == 3} for n in range(4)]
    two = run(["torchrun", "--nproc-per-node", "2"], stages)
    assert len(one) == STEPS
    for stage in range(4):
        for alone, shared in zip(one, two[str(stage)]["updates"], strict=True):
            assert abs(alone["loss"] - shared["loss"]) <= 1e-5
            assert abs(alone["grad_norm"] - shared["grad_norm"]) <= 1e-5
