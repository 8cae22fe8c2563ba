"""Steps in rows: one for each contender, with its speed, its phases, its memory, and its time beside ours."""

from collections.abc import Iterable, Iterator, Sequence

from benchmarks import grid
from benchmarks.results import Record

PHASES = ("data", "forward", "backward", "optimizer")
HEADINGS = (
    "contender", "tokens/s", "ms an update", *PHASES, "MFU", "of peak", "memory, GiB", "time of ours",
)  # fmt: skip


def cases_of(rows: Iterable[Record]) -> dict[str, list[Record]]:
    """Measured steps by case."""
    found: dict[str, list[Record]] = {}
    for row in rows:
        if row["operation"] == "step" and "median" in row:
            found.setdefault(row["case"], []).append(row)
    return found


def cells_of(row: Record, rows: Sequence[Record]) -> list[str]:
    """A row's cells, as text."""
    ours = next((other for other in rows if other["contender"] == "ours"), None)
    split = row["split"]
    return [
        row["contender"],
        f"{row['tokens_per_second']:,.0f}",
        f"{1e3 * row['median']:.4g} ± {1e3 * row['iqr']:.2g}",
        *(f"{1e3 * split[name]:.3g}" if name in split else "-" for name in PHASES),
        f"{row['roof_share']:.1%}",
        f"{row['peak_share']:.1%}" if row["peak_share"] else "-",
        f"{row['peak_bytes'] / 2**30:.2f}",
        f"{row['median'] / ours['median']:.2f}" if ours else "-",
    ]


def heading_of(row: Record) -> str:
    """What the rows of a case have in common."""
    micro_batches, size, context = row["shapes"][0]
    update = f"{micro_batches} micro-batch{'es' if micro_batches > 1 else ''} of {size} x {context} tokens"
    return f"an update is {update}, {row['work'] / row['tokens'] / 1e9:.4g} GFLOP a token"


def summary_of(rows: Iterable[Record]) -> Iterator[str]:
    """Tables of all cases, in plain text."""
    for case, members in cases_of(rows).items():
        yield f"step {case}: {heading_of(members[0])}"
        yield f"MFU = ({members[0]['formula']}) by time and GEMM roof"
        yield from grid.plain([HEADINGS, *(cells_of(row, members) for row in members)])


def section(rows: Iterable[Record]) -> Iterator[str]:
    """The steps of a device, in Markdown."""
    cases = cases_of(rows)
    if not cases:
        return
    formula = next(iter(cases.values()))[0]["formula"]
    yield from ("### Training steps", "")
    yield f"MFU is the model's work by time and GEMM roof, counted as {formula}."
    yield "Of peak: the same by the data sheet's rate, on a CPU by that of its instruction in a loop over registers."
    yield "Phases, in ms, were measured apart from the updates. Memory: the most that PyTorch had allocated on a GPU, "
    yield "on a CPU the most that the process had resident."
    for case, members in cases.items():
        yield from ("", f"**{case}**: {heading_of(members[0])}; in {members[0]['rounds']} rounds.", "")
        yield from grid.markdown([HEADINGS, *(cells_of(row, members) for row in members)])
    yield ""
