"""Starts in rows: the whole, and where it goes."""

from collections.abc import Iterable, Iterator
from typing import Any

from benchmarks import grid
from benchmarks.results import Record

PARTS = (
    "interpreter", "imports", "settings, plan", "threads, precision", "corpus", "model", "engine", "run folder",
    "validation", "first update",
)  # fmt: skip
HEADINGS = ("start", "seconds", *PARTS, "before the update")
SHOWN_PACKAGES = 6


def of_starts(rows: Iterable[Record]) -> list[Record]:
    """Measured starts."""
    return [row for row in rows if row["operation"] == "start" and "median" in row]


def cells_of(row: Record) -> list[str]:
    """A row's cells, as text."""
    split: dict[str, Any] = row.get("split", {})
    before = row["median"] - split["first update"] if split else None
    return [
        row["case"],
        f"{row['median']:.3g} ± {row['iqr']:.2g}",
        *(f"{split[name]:.3g}" if name in split else "-" for name in PARTS),
        "-" if before is None else f"{before:.3g}",
    ]


def imports_of(row: Record) -> str:
    """Whose modules take longest to load."""
    shown = list(row["imports"].items())[:SHOWN_PACKAGES]
    return ", ".join(f"{name} {seconds:.2f}" for name, seconds in shown)


def summary_of(rows: Iterable[Record]) -> Iterator[str]:
    """The table in plain text."""
    if starts := of_starts(rows):
        yield "start, seconds from the start of a process"
        yield from grid.plain([HEADINGS, *map(cells_of, starts)])
        for row in starts:
            if row.get("imports"):
                yield f"{row['case']} loads: {imports_of(row)}"


def section(rows: Iterable[Record]) -> Iterator[str]:
    """The table in Markdown."""
    starts = of_starts(rows)
    if not starts:
        return
    yield from ("### Start", "")
    yield "Seconds from the start of a fresh process with warm caches: `fastgpt --help` to its end, `fastgpt train` to "
    yield "the line of the first update in `metrics.jsonl`. Where the time goes was told by processes of their own: "
    yield "`model` is building it and its initial values, `validation` the loss and the sample before the first update."
    yield from ("", *grid.markdown([HEADINGS, *map(cells_of, starts)]), "")
    for row in starts:
        if row.get("settings"):
            yield from (f"**{row['case']}**: {' '.join(f'`{word}`' for word in row['settings'])}.", "")
        if row.get("imports"):
            yield from (f"Modules of **{row['case']}**, seconds to load under `-X importtime`: {imports_of(row)}.", "")
