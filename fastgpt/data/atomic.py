"""Folders that are either whole or not there, also when several processes make the same one."""

import contextlib
import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from fastgpt.files import current_umask, sync, sync_tree

# What file systems without locks answer; there the rename alone decides who was first.
NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}


class TakenError(Exception):
    """Something else has come into being at the path of a new folder."""


@contextlib.contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Wait until this process alone works on `path`; the lock is a hidden file beside it, gone afterwards.

    The kernel drops the lock when its process ends, however it ends. Gives False where the file system has no locks.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.parent / f".{path.name}.lock"
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            held = acquire(descriptor)
            current = not held or is_same_file(descriptor, lock)
        except BaseException:
            os.close(descriptor)
            raise
        if current:
            break
        os.close(descriptor)  # whoever had it before removed the file: this lock is on a name that is gone
    try:
        yield held
    finally:
        lock.unlink(missing_ok=True)
        os.close(descriptor)


def acquire(descriptor: int) -> bool:
    """Wait for an exclusive lock; False where there are none."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno in NO_LOCKS:
            return False
        raise
    return True


def is_same_file(descriptor: int, path: Path) -> bool:
    """Whether `path` still names the open file."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path` that becomes `path` at the end of the `with`, whole and on disk.

    After an exception it is removed; after a kill it stays, hidden, for `remove_unfinished`.
    Raises TakenError where `path` has come into being meanwhile and is not an empty folder.
    """
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.partial-", dir=path.parent))
    try:
        temporary.chmod(0o777 & ~current_umask())  # mkdtemp lets nobody else read it
        yield temporary
        sync_tree(temporary)
        try:
            temporary.rename(path)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise TakenError(str(path)) from None
            raise
        sync(path.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def remove_unfinished(path: Path) -> None:
    """Remove what killed processes left of `path`; only for one who holds its lock."""
    for leftover in path.parent.glob(f".{glob_escape(path.name)}.partial-*"):
        shutil.rmtree(leftover)


def glob_escape(name: str) -> str:
    """`name` as a pattern that matches itself only."""
    return "".join(f"[{character}]" if character in "*?[" else character for character in name)
