"""An update's time by kind of work, the longest first."""

from collections.abc import Iterable, Iterator

from benchmarks import grid
from benchmarks.results import Record

HEADINGS = ("kind of work", "ms an update", "share", "of the GEMM roof")


def cases_of(rows: Iterable[Record]) -> dict[str, list[Record]]:
    """Rows by case."""
    found: dict[str, list[Record]] = {}
    for row in rows:
        if row["operation"] == "profile" and "median" in row:
            found.setdefault(row["case"], []).append(row)
    return found


def cells_of(row: Record) -> list[str]:
    """A row's cells, as text."""
    roof = f"{row['roof_share']:.1%}" if "roof_share" in row else "-"
    return [row["contender"], f"{1e3 * row['median']:.4g} ± {1e3 * row['iqr']:.2g}", f"{row['share']:.1%}", roof]


def at_the_roof(rows: list[Record]) -> str:
    """What an update would take whose matrix products ran at the roof and which had nothing else."""
    (products,) = [row for row in rows if "work" in row]
    ideal = products["roof_share"] * products["median"]
    whole = sum(row["median"] for row in rows)
    return (
        f"of {1e3 * whole:.0f} ms, the matrix products at the roof would take {1e3 * ideal:.0f} ({ideal / whole:.1%}); "
        f"they lose {1e3 * (products['median'] - ideal):.0f}, and everything else takes "
        f"{1e3 * (whole - products['median']):.0f}"
    )


def summary_of(rows: Iterable[Record]) -> Iterator[str]:
    """The table in plain text."""
    for case, found in cases_of(rows).items():
        yield f"profile of {case}: {at_the_roof(found)}"
        yield from grid.plain([list(HEADINGS), *map(cells_of, found)])


def section(rows: Iterable[Record]) -> Iterator[str]:
    """The table in Markdown."""
    cases = cases_of(rows)
    if not cases:
        return
    yield from ("### Profile", "")
    yield "Where an update of the single engine goes, by PyTorch's profiler, each operation without those within it."
    yield "Attention has its own matrix products. Medians; to be looked at makes an update longer."
    for case, found in cases.items():
        one = found[0]
        yield from ("", f"**{case}**, {one['dtype']}: {at_the_roof(found)}.", "")
        yield from grid.markdown([list(HEADINGS), *map(cells_of, found)])
    yield ""
