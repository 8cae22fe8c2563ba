"""The folder on a fast disk where DeepSpeed keeps a rank's tensors, and what must be so that it can."""

import fcntl
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastgpt.errors import UserError

PREFIX = "fastgpt-"


class SwapFolder:
    """A rank's own folder, so that neither ranks nor runs get at each other's tensors; it goes with the process.

    What a killed process has left is cleared by the next one on the same disk: its lock is gone.
    """

    def __init__(self, parent: Path) -> None:
        """Make it.

        Raises:
            UserError: the parent is no folder, cannot be written, or its file system has no direct access.
        """
        try:
            with _locked(parent):  # so that nobody clears what is being made
                for leftover in parent.glob(f"{PREFIX}*"):
                    _clear_if_left(leftover)
                self.path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
                handle = os.open(self.path, os.O_RDONLY)
                fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError as problem:
            raise UserError(f"engine.nvme_folder: {parent} cannot be used: {problem.strerror}") from None
        self._finish = weakref.finalize(self, _remove, self.path, handle, os.getpid())
        try:
            probe = self.path / "probe"
            os.close(os.open(probe, os.O_RDWR | os.O_CREAT | os.O_DIRECT))
            probe.unlink()
        except OSError:
            self.close()
            raise UserError(
                f"engine.nvme_folder: {parent} lies on a file system without direct access (O_DIRECT), "
                "such as one in memory; choose a folder on a disk"
            ) from None

    def close(self) -> None:
        """Remove it."""
        self._finish()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _clear_if_left(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)  # of a process that lives
    else:
        _remove(folder, handle, os.getpid())


def _remove(folder: Path, handle: int, owner: int) -> None:
    if os.getpid() == owner:  # and not a process that it forked
        shutil.rmtree(folder, ignore_errors=True)
        os.close(handle)
