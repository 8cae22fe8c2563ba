"""`metrics.jsonl`: one line for every update and every validation, as an undisturbed run would have written them."""

import json
import os
from pathlib import Path
from typing import Any


class MetricsFile:
    """Appends lines, each one flushed; at a resume it first drops what the checkpoint does not know of."""

    def __init__(self, path: Path, *, resume_step: int | None) -> None:
        """Open for appending.

        Args:
            path: the file.
            resume_step: keep lines up to this step and drop a torn last line; None starts anew.
        """
        kept = lines_up_to(path, resume_step) if resume_step is not None and path.exists() else []
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(kept), encoding="utf-8")
        temporary.replace(path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: dict[str, Any]) -> None:
        """Append one object; floats keep all their digits."""
        self._file.write(json.dumps(record, ensure_ascii=False) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Flush to the disk: a checkpoint must not be newer than its metrics."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def lines_up_to(path: Path, step: int) -> list[str]:
    """The whole lines of a file of metrics that tell of updates up to `step`; one that a crash has torn is left out."""
    kept = []
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue  # torn by a crash
            if isinstance(record, dict) and isinstance(record.get("step"), int) and record["step"] <= step:
                kept.append(line if line.endswith("\n") else line + "\n")
    return kept
