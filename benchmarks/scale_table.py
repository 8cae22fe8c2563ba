"""Layouts in rows: speed and what ranks send each other, then memory beside the plan's."""

from collections.abc import Iterable, Iterator, Sequence

from benchmarks import grid
from benchmarks.results import Record

SPEED = (
    "engine", "ranks", "batch", "tokens/s", "ms an update", "efficiency", "sent, MB", "planned", "of it",
)  # fmt: skip
MEMORY = (
    "engine", "ranks", "weights, MB", "optimizer", "planned: weights", "optimizer", "between updates", "fullest",
    "planned", "of it", "process grew by",
)  # fmt: skip
MB = 1e6


def cases_of(rows: Iterable[Record]) -> dict[str, list[Record]]:
    """Measured layouts by case."""
    found: dict[str, list[Record]] = {}
    for row in rows:
        if row["operation"] == "scale" and "median" in row:
            found.setdefault(row["case"], []).append(row)
    return found


def speed_of(row: Record) -> list[str]:
    """A row of speed and traffic, as text."""
    sent, planned = row["communication"]["counted_total"], row["communication"]["planned_total"]
    return [
        row["contender"],
        str(row["ranks"]),
        "-" if row["ranks"] == 1 else row["mode"],
        f"{row['tokens_per_second']:,.0f}",
        f"{1e3 * row['median']:.4g} ± {1e3 * row['iqr']:.2g}",
        "-" if row["efficiency"] is None else f"{row['efficiency']:.0%}",
        f"{sent / MB:,.3f}",
        f"{planned / MB:,.3f}",
        f"{sent / planned:.3f}" if planned else "-",
    ]


def memory_of(row: Record) -> list[str]:
    """A row of memory, as text."""
    counted, planned = row["memory"]["counted"], row["memory"]["planned"]
    return [
        row["contender"],
        str(row["ranks"]),
        f"{counted['weights'] / MB:,.2f}",
        f"{counted['optimizer'] / MB:,.2f}",
        f"{planned['weights'] / MB:,.2f}",
        f"{planned['optimizer'] / MB:,.2f}",
        f"{counted['between'] / MB:,.2f}",
        f"{counted['peak'] / MB:,.2f}",
        f"{planned['total'] / MB:,.2f}",
        f"{counted['peak'] / planned['total']:.3f}",
        " ".join(f"{size / MB:,.0f}" for size in counted["resident_set_growth"]),
    ]


def tables_of(rows: Sequence[Record]) -> Iterator[list[Sequence[str]]]:
    """Both tables of a case."""
    yield [SPEED, *map(speed_of, rows)]
    # what is live does not hang on how many micro-batches there are: one row a layout
    yield [MEMORY, *(memory_of(row) for row in rows if row["mode"] == "strong")]


def heading_of(rows: Sequence[Record]) -> str:
    """What the rows of a case have in common."""
    row = rows[0]
    micro_batches, size, context = row["shapes"][0]
    threads = f"{row['threads']} thread{'s' if row['threads'] > 1 else ''} a rank"
    batch = f"{micro_batches} micro-batches of {size} x {context} tokens on one rank"
    return f"{row['parameters']:,} parameters in {row['dtype']}, {batch}, {threads}, {row['rounds']} rounds"


def scalings_of(rows: Sequence[Record]) -> Iterator[str]:
    """How fp16's overflows were met."""
    for row in rows:
        if "scaling" in row:
            about = row["scaling"]
            yield (
                f"{row['contender']}: from a loss scale of {about['from']:g}, {about['skipped']} updates were skipped; "
                f"the next was applied at {about['to']:g}"
            )


def summary_of(rows: Iterable[Record]) -> Iterator[str]:
    """Tables of all cases, in plain text."""
    for case, members in cases_of(rows).items():
        yield f"scale {case}: {heading_of(members)}"
        for table in tables_of(members):
            yield from grid.plain(table)
        yield from scalings_of(members)


def section(rows: Iterable[Record]) -> Iterator[str]:
    """The layouts of a device, in Markdown."""
    cases = cases_of(rows)
    if not cases:
        return
    yield from ("### Scaling", "")
    yield "Efficiency is the work of a rank in the time of an update by that of the same engine on one rank. Sent is "
    yield "what each rank sends in an update, counted where PyTorch hands tensors to the process group, as the best "
    yield "algorithm sends it. Memory is that of the fullest rank in MB, of live tensors: on a CPU counted at each "
    yield "operation, on a GPU by PyTorch's allocator; between two updates, and at the fullest moment of one. The last "
    yield "column is what each process took of the machine, from before its model was built to its fullest."
    for case, members in cases.items():
        yield from ("", f"**{case}**: {heading_of(members)}.")
        for table in tables_of(members):
            yield from ("", *grid.markdown(table))
        if scalings := list(scalings_of(members)):
            yield from ("", *scalings)
    yield ""
