import errno
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from fastgpt.data import atomic
from fastgpt.data.atomic import TakenError, locked, new_folder, remove_unfinished


def test_a_folder_appears_whole_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "result"
    with new_folder(path) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "file").write_text("content", encoding="utf-8")
        assert not path.exists() and folder.parent == tmp_path and folder.name.startswith(".")
    assert (path / "sub" / "file").read_text(encoding="utf-8") == "content"
    assert [entry.name for entry in tmp_path.iterdir()] == ["result"]


def test_its_mode_is_that_of_any_new_folder(tmp_path: Path) -> None:
    (tmp_path / "usual").mkdir()
    with new_folder(tmp_path / "result"):
        pass
    assert (tmp_path / "result").stat().st_mode == (tmp_path / "usual").stat().st_mode


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_after_an_exception_nothing_is_left(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), new_folder(tmp_path / "result") as folder:
        (folder / "file").touch()
        raise error
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_there_by_then_stays_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "result"
    with pytest.raises(TakenError), new_folder(path) as folder:
        (folder / "file").write_text("second", encoding="utf-8")
        path.mkdir()
        (path / "file").write_text("first", encoding="utf-8")
    assert (path / "file").read_text(encoding="utf-8") == "first"
    assert [entry.name for entry in tmp_path.iterdir()] == ["result"]


def test_files_are_on_disk_before_the_name_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def logged_fsync(descriptor: int) -> None:
        events.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        fsync(descriptor)

    def logged_rename(self: Path, target: Path) -> Path:
        events.append("rename")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", logged_fsync)
    monkeypatch.setattr(Path, "rename", logged_rename)
    with new_folder(tmp_path / "result") as folder:
        (folder / "file").touch()
    assert events == ["file", folder.name, "rename", tmp_path.name]


def test_leftovers_of_killed_processes_are_removed_and_nothing_else(tmp_path: Path) -> None:
    keep = ["a", "a-b", ".a.partial", ".a-b.partial-1", ".xa.partial-1", ".[a].partial-2"]
    for name in [*keep, ".a.partial-1", ".a.partial-2"]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    remove_unfinished(tmp_path / "a")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(keep)
    remove_unfinished(tmp_path / "[a]")
    assert not (tmp_path / ".[a].partial-2").exists() and (tmp_path / "a").exists()


def test_a_lock_is_held_by_one_at_a_time_and_leaves_no_file(tmp_path: Path) -> None:
    inside = overlaps = 0

    def work() -> None:
        nonlocal inside, overlaps
        for _ in range(30):
            with locked(tmp_path / "new" / "result") as held:
                inside += 1
                time.sleep(0.0005)
                overlaps += inside != 1 or not held
                inside -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert overlaps == 0
    assert list((tmp_path / "new").iterdir()) == []


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    code = (
        "import os, pathlib, signal, sys; from fastgpt.data.atomic import locked\n"
        "with locked(pathlib.Path(sys.argv[1])): os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path / "result")], check=False).returncode == -9
    assert (tmp_path / ".result.lock").exists()
    with locked(tmp_path / "result") as held:
        assert held
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_locks_is_told_from_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(number: int) -> None:
        def flock(descriptor: int, operation: int) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(atomic.fcntl, "flock", flock)

    refuse(errno.ENOSYS)
    with locked(tmp_path / "result") as held:
        assert not held
    refuse(errno.EIO)
    with pytest.raises(OSError, match="Input/output error"), locked(tmp_path / "result"):
        pass
