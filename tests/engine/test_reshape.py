"""A training state is taken up whole by any engine, at any ZeRO stage, on any number of ranks.

What the default run has of it, from one process to two ranks and back, is in test_engines.py.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

PROGRAM = Path(__file__).with_name("reshape_program.py")
STAGES, PRECISIONS = (0, 1, 2, 3), ("fp32", "bf16")
WORLD_SIZES = (1, 2, 3, 4)
SINGLE: list[int | None] = [None]
Command = Callable[..., subprocess.CompletedProcess[str]]
Found = dict[str, Any]


def layouts(stages: Any, precisions: Any = PRECISIONS) -> list[dict[str, Any]]:
    # stage 3 last: from then on its process computes linear layers by DeepSpeed's own function
    return [{"stage": stage, "precision": precision} for stage in stages for precision in precisions]


def launch(command: Command, folder: Path, world_size: int, **job: Any) -> Found:
    """What a run of the program on so many ranks wrote down."""
    wanted, written = folder / "job.json", folder / "results.json"
    wanted.write_text(json.dumps({"folder": str(folder), "write": [], "targets": [], "sources": []} | job))
    written.unlink(missing_ok=True)
    launcher = [sys.executable] if world_size == 1 else ["torchrun", "--nproc-per-node", str(world_size)]
    outcome = command(*launcher, PROGRAM, wanted, written, timeout=1500)
    # judged by what it wrote: DeepSpeed's ranks have been seen to abort after they had finished
    assert written.exists(), outcome.stderr[-4000:]
    found: Found = json.loads(written.read_text())
    return found


def check_written(written: Found) -> None:
    """Before the first update every layout has the values that the seed draws, each where it belongs."""
    for name, state in written.items():
        assert state["not_born_as_drawn"] == [], name
    # the batch of all ranks is that of one process, in its order
    assert len({json.dumps(state["batch"]) for state in written.values()}) == 1


def check_read(read: Found, written: Found) -> None:
    """Masters, moments, progress, weights, the next batch and the next losses are those that were written."""
    parameters = 16
    for move, state in read.items():
        source = written[move.partition(" to ")[0]]
        assert state["tensors"] == 3 * parameters
        assert state["differing"] == [], move
        assert state["differing_weights"] == [], move
        before, after = state["progress"]
        assert before == after and before["step"] == before["adam_step"] == 3, move
        # what the next forward pass really uses, not what a getter says
        assert state["forward"] == state["plain_forward"], move
        assert state["batch"] == source["batch"], move
        if move.endswith("fp32"):
            assert len(state["updates"]) == 2
            for due, done in zip(source["updates"], state["updates"], strict=True):
                assert done["loss"] == pytest.approx(due["loss"], abs=1e-5), move
                assert done["grad_norm"] == pytest.approx(due["grad_norm"], abs=1e-5), move


def test_every_state_is_read_by_every_stage_on_every_number_of_ranks(tmp_path: Path, command: Command) -> None:
    written: Found = {}
    for world_size in WORLD_SIZES:
        own = [*(SINGLE if world_size == 1 else []), *STAGES]
        written |= launch(command, tmp_path, world_size, write=layouts(own))["written"]
    assert len(written) == 2 * (1 + 4 * 4)
    check_written(written)
    read: Found = {}
    for world_size in WORLD_SIZES:
        own = [*(SINGLE if world_size == 1 else []), *STAGES]
        read |= launch(command, tmp_path, world_size, targets=layouts(own), sources=list(written))["read"]
    assert len(read) == 2 * 17 * 17
    check_read(read, written)
