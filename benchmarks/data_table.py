"""The data path in rows: one for each shape of an update, the contenders side by side."""

from collections.abc import Iterable, Iterator

from benchmarks import grid
from benchmarks.results import Record

CONTENDERS = ("shards", "prefetch", "memmap")
HEADINGS = ("update", "tokens", *CONTENDERS, "prefetch by core time", "of memmap", "prefetch, ms")


def cases_of(rows: Iterable[Record]) -> dict[str, dict[str, Record]]:
    """Rows by case and contender."""
    found: dict[str, dict[str, Record]] = {}
    for row in rows:
        if row["operation"] == "data":
            found.setdefault(row["case"], {})[row["contender"]] = row
    return found


def cells_of(case: str, by_contender: dict[str, Record]) -> list[str]:
    """A row's cells, as text."""
    ahead, peer = by_contender["prefetch"], by_contender["memmap"]
    return [
        case,
        f"{ahead['tokens']:,}",
        *(f"{by_contender[name]['tokens_per_second'] / 1e6:.3g}" for name in CONTENDERS),
        f"{ahead['tokens'] / ahead['core_median'] / 1e6:.3g}",
        f"{peer['core_median'] / ahead['core_median']:.3g} x",
        f"{1e3 * ahead['median']:.3g} ± {1e3 * ahead['iqr']:.2g}",
    ]


def table_of(cases: dict[str, dict[str, Record]]) -> list[list[str]]:
    """Head and rows."""
    return [list(HEADINGS), *(cells_of(case, found) for case, found in cases.items())]


def summary_of(rows: Iterable[Record]) -> Iterator[str]:
    """The table in plain text."""
    if cases := cases_of(rows):
        yield "data, million tokens/s on one core; an update is micro-batches x size x context"
        yield from grid.plain(table_of(cases))


def section(rows: Iterable[Record]) -> Iterator[str]:
    """The table in Markdown."""
    cases = cases_of(rows)
    if not cases:
        return
    one = next(iter(next(iter(cases.values())).values()))
    yield from ("### Data", "")
    yield "Batches from token shards on one core, in million tokens/s, uint16 to int64; an update is micro-batches x "
    yield f"size x context. The shards have {one['shard_tokens']:,} tokens. `shards` is the source alone, `prefetch` "
    yield "the same through the background thread of a training run, on the same core; `memmap` is nanoGPT's way, "
    yield "which maps the file and copies each row, for inputs and for targets. By core time: over seconds that the "
    yield "core gave to the process, which on a shared machine are fewer than those that went by; so is the ratio to "
    yield f"`memmap`. Medians of {one['rounds']} rounds."
    yield from ("", *grid.markdown(table_of(cases)), "")
