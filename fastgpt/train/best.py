"""The folder `best` of a run: replaced whole by each model that does better."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastgpt.files import sync, sync_tree
from fastgpt.load import BEST

RESULT = "validation.json"


def replace_best(run: Path, write: Callable[[Path], None], result: dict[str, Any]) -> None:
    """Let `write` fill a folder, and put it in the place of a run's best model, with the result that made it so."""
    partial, old, final = (run / name for name in (f".{BEST}-partial", f".{BEST}-old", BEST))
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True)
    write(partial)
    (partial / RESULT).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    sync_tree(partial)
    if final.exists():
        final.rename(old)
    partial.rename(final)
    sync(run)
    shutil.rmtree(old, ignore_errors=True)


def best_result(run: Path) -> dict[str, Any] | None:
    """The validation of the best model, or None where there is none yet."""
    path = run / BEST / RESULT
    found: dict[str, Any] | None = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    return found
