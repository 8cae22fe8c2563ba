"""Loss curves in rows: how far ours lies from plain PyTorch's, and some of their updates."""

import statistics
from collections.abc import Iterable, Iterator

from benchmarks import grid, spread
from benchmarks.results import Record

HEADINGS = (
    "settings", "updates", "largest difference", "mean", "at the end", "spread, mean", "largest share of spread",
    "beyond it", "beyond, unsmoothed", "validation: ours", "plain", "further seeds",
)  # fmt: skip
UPDATE_HEADINGS = ("update", "ours", "plain", "difference", "spread")
SHOWN = 8  # updates of a curve


def cases_of(rows: Iterable[Record]) -> dict[str, dict[str, Record]]:
    """Curves by case and name, of the cases that have a comparison."""
    found: dict[str, dict[str, Record]] = {}
    for row in rows:
        if row["operation"] == "curves" and "median" in row:
            found.setdefault(row["case"], {})[row["contender"]] = row
    return {case: curves for case, curves in found.items() if "comparison" in curves.get("ours", {})}


def cells_of(case: str, curves: dict[str, Record]) -> list[str]:
    """A row's cells, as text."""
    found = curves["ours"]["comparison"]
    cells = [
        case,
        f"{found['updates']:,}",
        f"{found['largest']:.2g} at {found['largest_at']}",
        f"{found['mean']:.2g}",
        f"{found['last']:+.2g}",
    ]
    if found["within"] is None:
        cells += ["-"] * 4
    else:
        cells += [
            f"{found['mean_spread']:.2g}",
            f"{found['of_spread']:.2g} at {found['of_spread_at']}",
            f"{found['outside']} of {found['judged']}",
            str(found["outside_unsmoothed"]),
        ]
    return [*cells, *validations_of(curves)]


def validations_of(curves: dict[str, Record]) -> list[str]:
    """The validation losses after the last update that ours and plain have in common."""
    updates = curves["ours"]["comparison"]["updates"]
    found = {name: at[0] for name, row in curves.items() if (at := losses_at(row, updates))}
    others = [loss for name, loss in found.items() if name not in ("ours", "plain")]
    shown = [f"{found[name]:.4f}" if name in found else "-" for name in ("ours", "plain")]
    if len(others) < spread.LEAST_SEEDS:
        return [*shown, "-"]
    return [*shown, f"{statistics.fmean(others):.4f} ± {statistics.stdev(others):.2g}"]


def losses_at(row: Record, updates: int) -> list[float]:
    """The validation loss of a curve after so many updates, where there is one."""
    return [found["loss"] for found in row["validation"] if found["updates"] == updates]


def table_of(cases: dict[str, dict[str, Record]]) -> list[list[str]]:
    """Head and rows."""
    return [list(HEADINGS), *(cells_of(case, curves) for case, curves in cases.items())]


def updates_of(curves: dict[str, Record]) -> list[list[str]]:
    """Some updates of a case, evenly spaced, the first and the last among them."""
    found = curves["ours"]["comparison"]
    steps = dict.fromkeys(1 + round(part * (found["updates"] - 1) / (SHOWN - 1)) for part in range(SHOWN))
    return [list(UPDATE_HEADINGS)] + [
        [
            str(step),
            *(f"{curves[name]['losses'][step - 1]:.5f}" for name in ("ours", "plain")),
            f"{found['differences'][step - 1]:+.2g}",
            f"{found['spread'][step - 1]:.2g}" if step <= len(found["spread"]) else "-",
        ]
        for step in steps
    ]


def verdict_of(found: Record) -> str:
    """What a comparison comes to."""
    if found["within"] is None:
        return "not judged, as too few seeds were trained"
    word = "within" if found["within"] else "NOT within"
    return f"{word} the spread of seeds, over {found['judged']} of {found['updates']} updates"


def summary_of(rows: Iterable[Record]) -> Iterator[str]:
    """The tables in plain text, and what the model wrote."""
    if cases := cases_of(rows):
        yield f"curves, nats per token; {spread.CRITERION}"
        yield from grid.plain(table_of(cases))
        for case, curves in cases.items():
            yield f"{case}: {verdict_of(curves['ours']['comparison'])}"
            yield from grid.plain(updates_of(curves))
            if sample := curves["ours"]["sample"]:
                yield f"{case}: sample: {sample!r}"


def section(rows: Iterable[Record]) -> Iterator[str]:
    """The tables in Markdown."""
    cases = cases_of(rows)
    if not cases:
        return
    yield from ("### Loss curves", "")
    yield "Training losses in nats per token, update by update: ours, the single engine, beside plain PyTorch from the "
    yield "same initial weights, on the same batches, at the same learning rates, without dropout. The spread is the "
    yield "standard deviation over plain PyTorch's initialisation seeds, pooled over the updates from "
    yield f"{spread.REACH} before to {spread.REACH} after; ours is to lie within it at every update. Unsmoothed: "
    yield "beyond the deviation of that update alone. Validation losses are those after the last update."
    yield from ("", *grid.markdown(table_of(cases)), "")
    for case, curves in cases.items():
        ours = curves["ours"]
        text, tokens = ours["text"], ours["tokens"]
        further = sum(name not in ("ours", "plain") for name in curves)
        yield f"**{case}**: {verdict_of(ours['comparison'])}; {further} further seeds, {tokens:,} tokens seen of "
        yield f"{text['name']}, which has {text['tokens']:,}."
        yield from ("", *grid.markdown(updates_of(curves)), "")
        if ours["sample"]:
            yield from ("What the model wrote at the end:", "")
            yield from (f"    {line}".rstrip() for line in ours["sample"].splitlines())
            yield ""
