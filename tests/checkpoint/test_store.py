"""A checkpoint is there whole or not at all, and a damaged one is passed over."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from fastgpt.checkpoint.store import CheckpointStore
from fastgpt.errors import UserError


class OneRank:
    rank = 0

    def barrier(self) -> None: ...

    def gather(self, value: Any) -> list[Any]:
        return [value]


def save(store: CheckpointStore, step: int, text: str = "x" * 1000) -> Path:
    def write(folder: Path) -> None:
        (folder / "model").mkdir()
        (folder / "model" / "weights").write_text(text)
        (folder / "state-00000.json").write_text(text)

    return store.save(step, {"tokens": step}, [write], OneRank())


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints", keep=3)


def test_nothing_saved_is_nothing_found(store: CheckpointStore) -> None:
    assert store.latest() is None
    assert store.newest_step() == 0


def test_the_newest_is_found_with_its_state(store: CheckpointStore) -> None:
    for step in (5, 10):
        save(store, step)
    found = store.latest()
    assert found is not None
    assert (found.step, found.state, found.folder.name) == (10, {"tokens": 10}, "step-00000010")
    assert (store.folder / "latest").read_text() == "step-00000010\n"


def test_the_oldest_are_dropped(store: CheckpointStore) -> None:
    for step in range(1, 6):
        save(store, step)
    assert store.names() == ["step-00000003", "step-00000004", "step-00000005"]
    assert {p.name for p in store.folder.iterdir()} == {*store.names(), "latest"}


def damage_flip(folder: Path) -> None:
    data = bytearray((folder / "model" / "weights").read_bytes())
    data[500] ^= 1
    (folder / "model" / "weights").write_bytes(data)


def damage_truncate(folder: Path) -> None:
    os.truncate(folder / "state-00000.json", 10)


def damage_remove(folder: Path) -> None:
    (folder / "model" / "weights").unlink()


def damage_manifest(folder: Path) -> None:
    os.truncate(folder / "manifest.json", 20)


def damage_no_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


@pytest.mark.parametrize(
    "damage",
    [damage_flip, damage_truncate, damage_remove, damage_manifest, damage_no_manifest],
    ids=lambda f: f.__name__,
)
def test_a_damaged_checkpoint_is_passed_over_and_named(
    damage: Any, store: CheckpointStore, caplog: pytest.LogCaptureFixture
) -> None:
    save(store, 5)
    damage(save(store, 10))
    found = store.latest()
    assert found is not None
    assert found.step == 5
    assert "step-00000010" in caplog.text


def test_only_damaged_checkpoints_are_an_error_not_a_fresh_start(store: CheckpointStore) -> None:
    damage_flip(save(store, 5))
    with pytest.raises(UserError, match=r"none of its checkpoints is whole \(.*weights: its content does not match"):
        store.latest()


@pytest.mark.parametrize("content", [None, "", "step-99999999\n", "\x00\xff"])
def test_a_lost_or_damaged_latest_loses_nothing(content: str | None, store: CheckpointStore) -> None:
    save(store, 5)
    pointer = store.folder / "latest"
    pointer.unlink() if content is None else pointer.write_text(content)
    found = store.latest()
    assert found is not None
    assert found.step == 5


def test_a_manifest_cannot_point_outside(store: CheckpointStore) -> None:
    folder = save(store, 5)
    manifest = folder / "manifest.json"
    manifest.write_text(manifest.read_text().replace("model/weights", "../../../etc/passwd"))
    with pytest.raises(UserError, match="lies outside"):
        store.open(folder.name)


def test_a_write_that_fails_leaves_the_checkpoint_before_it(store: CheckpointStore) -> None:
    save(store, 5)

    def full_disk(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match=r"step-00000010: cannot be written \(rank 0: .*No space left.* Earlier"):
        store.save(10, {}, [full_disk], OneRank())
    found = store.latest()
    assert found is not None
    assert found.step == 5
    assert {p.name for p in store.folder.iterdir()} == {"step-00000005", "latest"}


def test_a_failure_on_another_rank_is_told_on_this_one(store: CheckpointStore) -> None:
    class TwoRanks(OneRank):
        def gather(self, value: Any) -> list[Any]:
            return [value, "disk on fire"]

    with pytest.raises(UserError, match="rank 1: disk on fire"):
        store.save(5, {}, [lambda folder: None], TwoRanks())
    assert store.names() == []


def test_after_a_failed_write_nobody_goes_on_to_the_next(store: CheckpointStore) -> None:
    """The next one may be collective: a rank that skipped ahead would meet the others in another collective."""

    def full_disk(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    def never(folder: Path) -> None:
        raise AssertionError("it was called")

    with pytest.raises(UserError, match="No space left"):
        store.save(10, {}, [full_disk, never], OneRank())


def test_files_are_listed_only_when_every_rank_has_written(store: CheckpointStore) -> None:
    """safetensors writes a temporary file and renames it: a slow rank's must not get into the manifest."""

    class SlowOther(OneRank):
        """Rank 1's write is over when the ranks have waited for each other, and not before."""

        def gather(self, value: Any) -> list[Any]:
            partial = next(store.folder.glob(".partial-*"))
            temporary = partial / ".tmpABC"
            if temporary.exists():
                temporary.rename(partial / "state-00001.json")
                return [value, None]
            return [value, {"state-00001.json": {"bytes": 1, "sha256": "x"}}]

    def write(folder: Path) -> None:
        (folder / "state-00000.json").write_text("mine")
        (folder / ".tmpABC").write_text("y")

    store.save(5, {}, [write], SlowOther())
    manifest = json.loads((store.folder / "step-00000005" / "manifest.json").read_text())
    assert set(manifest["files"]) == {"state-00000.json", "state-00001.json"}


def test_the_checkpoint_just_written_is_never_the_one_dropped(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    save(store, 8)
    damaged = save(CheckpointStore(tmp_path, keep=2), 12)
    damage_flip(damaged)
    found = store.latest()
    assert found is not None
    assert found.step == 8
    save(store, 9)
    assert store.names() == ["step-00000009"]


SAVER = """
import sys, os
from pathlib import Path
from fastgpt.checkpoint.store import CheckpointStore
class OneRank:
    rank = 0
    def barrier(self): pass
    def gather(self, value): return [value]
store = CheckpointStore(Path(sys.argv[1]), keep=2)
step = store.newest_step()
while True:
    step += 1
    def write(folder):
        for name in range(20):
            (folder / f"part-{name}").write_bytes(os.urandom(20000))
    store.save(step, {}, [write], OneRank())
    print(step, flush=True)
"""


def test_a_kill_at_any_moment_of_a_save_leaves_a_whole_checkpoint(tmp_path: Path, environment: dict[str, str]) -> None:
    """Whatever step was announced is there, or a later one; nothing that is found is torn."""
    store = CheckpointStore(tmp_path / "checkpoints", keep=2)
    chance = random.Random(1)
    for _ in range(6):
        process = subprocess.Popen(
            [sys.executable, "-c", SAVER, str(store.folder)], stdout=subprocess.PIPE, text=True, env=environment
        )
        assert process.stdout
        announced = int(process.stdout.readline())
        time.sleep(chance.uniform(0, 0.1))
        process.send_signal(signal.SIGKILL)
        rest = process.communicate()[0].split()
        announced = int(rest[-1]) if rest else announced
        found = store.latest()
        assert found is not None
        assert found.step >= announced
