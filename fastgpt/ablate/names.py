"""What the pieces of a study are called: digests of settings and files, which tell them apart, and words for people."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from fastgpt.errors import UserError
from fastgpt.files import sha256


def digest(value: Any) -> str:
    """Hex digest of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def content_digest(path: str) -> str:
    """Hex digest of a file's content, or of all files of a folder with their names.

    Raises:
        UserError: there is nothing.
    """
    root = Path(path)
    if not root.exists():
        raise UserError(f"{path}: no such file")
    if root.is_file():
        return sha256(root)
    files = sorted(p for p in root.rglob("*") if p.is_file())
    return digest([[str(p.relative_to(root)), sha256(p)] for p in files])


def as_name(text: str) -> str:
    """A name for a folder, of at most 60 characters: 240 bytes, of the 255 that file systems take."""
    return re.sub(r"[^\w.]+", "-", text).strip("-.").lower()[:60] or "unnamed"
