"""Files on the disk: flushed, replaced in one step, hashed, open to readers."""

import hashlib
import os
from pathlib import Path


def sync(path: Path) -> None:
    """Flush a file or folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Flush every file and folder under `folder`, and itself."""
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)


def write_atomically(path: Path, text: str) -> None:
    """Replace a file's text in one step: a crash leaves either the old text or the new one, never half of one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    sync(temporary)
    temporary.replace(path)
    sync(path.parent)


def open_to_readers(path: Path) -> None:
    """Give a file the mode that the user's umask asks for: safetensors writes files that only their owner can read."""
    path.chmod(0o666 & ~current_umask())


def current_umask() -> int:
    """The process's umask, which can only be read by setting it."""
    umask = os.umask(0o022)
    os.umask(umask)
    return umask


def sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
