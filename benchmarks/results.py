"""A results file: `<device>_<date>_<commit>.json`, rewritten whole as a run goes on.

    {"format": "fastgpt benchmarks 1", "device", "kind", "date", "commit", "environment": {...},
     "parts": {"norms": {"outcome", "started", "seconds", "limit", "counts": {...}, "reasons": [...],
                         "problems": [...],
                         "session": {"gemm", "copy", "dtype", "clocks", "load"}, "benchmarks": [{...}, ...]}},
     "goals": [{"goal", "needed", "measured", "reached"}, ...]}

A second run of the same device, day and commit replaces the parts that it ran and leaves the others.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

NOT_MEASURED = "not measured"
NO_TIME = "no time left"
FORMAT = "fastgpt benchmarks 1"
Record: TypeAlias = dict[str, Any]


def file_name(device: str, date: str, commit: str) -> str:
    """The name of a run's file."""
    return f"{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}_{date}_{commit}.json"


def read(path: Path) -> Record | None:
    """What a file holds; None where it is none of ours."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and found.get("format") == FORMAT else None


def read_all(folder: Path) -> list[Record]:
    """All files of a folder, the oldest first."""
    records = [record for path in sorted(folder.glob("*.json")) if (record := read(path))]
    return sorted(records, key=lambda record: (record["date"], record["written"]))


def write(path: Path, record: Record) -> None:
    """Replace a results file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace(path, text_of(record))


def write_lines(path: Path, lines: Iterable[Record]) -> None:
    """Replace a part's file, for a part whose lines change as it goes on."""
    replace(path, "".join(json.dumps(line) + "\n" for line in lines))


def replace(path: Path, text: str) -> None:
    """Replace a file in one step: a reader, or a kill, finds the old one or the new one."""
    beside = path.with_name(f"{path.name}.{os.getpid()}.part")
    beside.write_text(text)
    beside.replace(path)


def text_of(record: Record) -> str:
    """JSON with a line for each measurement, which `diff` and people can read."""
    rows: list[Record] = []
    parts = {}
    for name, part in record["parts"].items():
        parts[name] = part | {"benchmarks": [f"row {len(rows) + number}" for number in range(len(part["benchmarks"]))]}
        rows += part["benchmarks"]
    text = json.dumps(record | {"parts": parts}, indent=1)
    return re.sub(r'"row (\d+)"', lambda found: json.dumps(rows[int(found[1])]), text) + "\n"


def lines_of(path: Path) -> list[Record]:
    """The whole lines of a part's file; the last one may be in the writing."""
    if not path.exists():
        return []
    *whole, _ = path.read_text().split("\n")
    return [json.loads(line) for line in whole]


def part_of(lines: Iterable[Record]) -> Record:
    """What a part's lines come to: counts, what went wrong, what was measured, and what was not and why."""
    lines = list(lines)
    benchmarks = [dict(line) for line in lines if "operation" in line]
    sessions = [session for line in benchmarks if (session := line.pop("session", None))]
    for line in benchmarks:
        del line["test"]
    return {
        "counts": dict(Counter(NO_TIME if line.get("reason") == NO_TIME else line["outcome"] for line in lines)),
        "reasons": sorted({line["reason"] for line in lines if line["outcome"] in ("skipped", NOT_MEASURED)}),
        "problems": [line for line in lines if line["outcome"] in ("failed", "error")],
        "session": sessions[0] if sessions else None,
        "benchmarks": benchmarks,
    }


def measured(record: Record) -> Iterator[Record]:
    """Everything that a record's parts have timed."""
    for part in record["parts"].values():
        yield from (row for row in part["benchmarks"] if "median" in row)
