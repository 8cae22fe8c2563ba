"""The folders in which tensors are swapped: each process has its own, and none is left over."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fastgpt.engine.swap_folder import SwapFolder
from fastgpt.errors import UserError


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A folder on a file system with direct access."""
    try:
        os.close(os.open(tmp_path / "probe", os.O_RDWR | os.O_CREAT | os.O_DIRECT))
    except OSError:
        pytest.skip("temporary files here lie on a file system without direct access")
    (tmp_path / "probe").unlink()
    return tmp_path


def test_each_has_its_own_and_leaves_nothing(disk: Path) -> None:
    (disk / "other").mkdir()
    one, two = SwapFolder(disk), SwapFolder(disk)
    assert one.path != two.path and one.path.parent == disk
    (one.path / "tensor.swp").write_bytes(b"x")
    one.close()
    assert not one.path.exists() and two.path.is_dir()
    two.close()
    assert [path.name for path in disk.iterdir()] == ["other"]


def test_a_process_that_ends_removes_its_own(disk: Path, environment: dict[str, str]) -> None:
    program = (
        "import pathlib, sys; from fastgpt.engine.swap_folder import SwapFolder; "
        "folder = SwapFolder(pathlib.Path(sys.argv[1])); print(folder.path.is_dir())"
    )
    outcome = subprocess.run([sys.executable, "-c", program, disk], env=environment, capture_output=True, text=True)
    assert outcome.stdout.strip() == "True", outcome.stderr
    assert list(disk.iterdir()) == []


def test_what_a_killed_process_left_is_cleared_and_what_a_living_one_has_is_not(disk: Path) -> None:
    left = disk / "fastgpt-left"
    left.mkdir()
    (left / "tensor.swp").write_bytes(b"x")
    living = SwapFolder(disk)
    assert not left.exists()
    SwapFolder(disk).close()
    assert living.path.is_dir()
    living.close()


def test_a_folder_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"engine\.nvme_folder: .*/nothing cannot be used: No such file or directory"):
        SwapFolder(tmp_path / "nothing")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"engine\.nvme_folder: .*/file cannot be used: Not a directory"):
        SwapFolder(tmp_path / "file")


def test_a_file_system_without_direct_access_is_told(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    really: Callable[..., int] = os.open

    def refuse(path: str, flags: int, *rest: int, **named: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return really(path, flags, *rest, **named)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(UserError, match=r"without direct access \(O_DIRECT\)"):
        SwapFolder(disk)
    assert list(disk.iterdir()) == []
