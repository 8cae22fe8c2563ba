"""A checkpoint's manifest: what it is, and the size and hash of every file in it. It is written last."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from fastgpt.errors import UserError
from fastgpt.files import sha256

NAME = "manifest.json"
FORMAT = 1


class Manifest(NamedTuple):
    """Facts of a whole checkpoint."""

    step: int
    state: dict[str, Any]  # what the run needs beside tensors; JSON values
    files: dict[str, dict[str, Any]]  # relative path -> {"bytes": int, "sha256": str}


def describe(folder: Path, paths: list[Path]) -> dict[str, dict[str, Any]]:
    """Size and hash of each file."""
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in paths
    }


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `manifest.json` into a checkpoint folder that is otherwise complete."""
    (folder / NAME).write_text(json.dumps({"format": FORMAT, **manifest._asdict()}, indent=1))


def read_manifest(folder: Path) -> Manifest:
    """Read a checkpoint's manifest.

    Raises:
        UserError: missing, not JSON, or of a format this version does not know.
    """
    path = folder / NAME
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["format"] != FORMAT:
            raise UserError(f"{path}: format {data['format']}; this version reads format {FORMAT}")
        return Manifest(int(data["step"]), dict(data["state"]), dict(data["files"]))
    except FileNotFoundError:
        raise UserError(f"{folder}: not a whole checkpoint: it has no {NAME}") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, ValueError) as problem:
        if isinstance(problem, UserError):
            raise
        raise UserError(f"{path}: damaged: {problem}") from None


def verify(folder: Path, within: str = "") -> Manifest:
    """Read the manifest and compare every file with it, or every file within a part of the checkpoint.

    Raises:
        UserError: naming the first file that is missing, of another size, or of other content.
    """
    manifest = read_manifest(folder)
    for name, facts in manifest.files.items():
        if not name.startswith(within):
            continue
        path = folder / name
        if not isinstance(facts, dict) or {"bytes", "sha256"} - set(facts):
            raise UserError(f"{folder / NAME}: files.{name} must hold bytes and sha256")
        if not path.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"{folder / NAME}: {name} lies outside the checkpoint")
        if not path.is_file():
            raise UserError(f"{path}: missing")
        size = path.stat().st_size
        if size != facts["bytes"]:
            raise UserError(f"{path}: {size} bytes; its manifest says {facts['bytes']}")
        if sha256(path) != facts["sha256"]:
            raise UserError(f"{path}: its content does not match its SHA-256")
    return manifest
