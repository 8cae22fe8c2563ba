"""Results in rows: one for each operation, case and direction, with the contenders side by side.

What is no operation of the model, a whole step for one, has a table of its own kind: a module of `KINDS`.
"""

import argparse
import difflib
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, TypeAlias

from benchmarks import curves_table, data_table, profile_table, results, scale_table, start_table, step_table

Measurement: TypeAlias = dict[str, Any]

# by the word that its rows have as their operation
KINDS = {
    "step": step_table,
    "scale": scale_table,
    "data": data_table,
    "start": start_table,
    "curves": curves_table,
    "profile": profile_table,
}

# ours first: the one whose rate and share a row shows is the first that was measured
CONTENDERS = ("triton", "native", "torch", "eager", "compile", "sdpa-flash", "sdpa-cudnn", "liger")


def chosen(text: str) -> str:
    """A comma-separated choice of contenders, as an option takes it."""
    for name in text.split(","):
        if name not in CONTENDERS:
            near = difflib.get_close_matches(name, CONTENDERS, n=1)
            remedy = f"did you mean {near[0]!r}?" if near else f"allowed: {', '.join(CONTENDERS)}"
            raise argparse.ArgumentTypeError(f"{name!r} is not a contender; {remedy}")
    return text


class Row(NamedTuple):
    """Who was measured in one case and direction."""

    operation: str
    case: str
    direction: str
    by_contender: dict[str, Measurement]

    @property
    def shown(self) -> Measurement:
        """The measurement of ours, or of the first there is."""
        return next(self.by_contender[name] for name in CONTENDERS if name in self.by_contender)


def rows_of(measurements: Iterable[Measurement]) -> list[Row]:
    """In the order in which they were measured, without those that have a table of their own."""
    rows: dict[tuple[str, str, str], Row] = {}
    for found in measurements:
        if found["operation"] in KINDS:
            continue
        key = found["operation"], found["case"], found["direction"]
        rows.setdefault(key, Row(*key, {})).by_contender[found["contender"]] = found
    return list(rows.values())


def contenders_of(rows: Iterable[Row]) -> list[str]:
    """Those that were measured anywhere."""
    present = {name for row in rows for name in row.by_contender}
    return [name for name in CONTENDERS if name in present]


def rate(found: Measurement) -> str:
    """A rate with its unit."""
    word = "FLOP/s" if found["unit"] == "FLOP" else "B/s"
    scale, prefix = (1e12, "T") if found["rate"] >= 1e12 else (1e9, "G")
    return f"{found['rate'] / scale:.3g} {prefix}{word}"


def milliseconds(found: Measurement | None) -> str:
    """The median; a star where the host's part is in it, as no CUDA graph could be made."""
    if found is None:
        return "-"
    return f"{1e3 * found['median']:.3g}" + ("*" if "host" in found["timed_by"] else "")


def summary(record: results.Record) -> Iterator[str]:
    """The lines that end a run: a table, the goals, and how each part went."""
    rows = rows_of(results.measured(record))
    names = contenders_of(rows)
    width = max((len(f"{row.operation} {row.case} {row.direction}") for row in rows), default=0)
    yield heading_of(record)
    if rows:
        yield f"{'median, ms':<{width}}" + "".join(f"{name:>11}" for name in names) + f"{'rate':>15} of roof"
    for row in rows:
        cells = "".join(f"{milliseconds(row.by_contender.get(name)):>11}" for name in names)
        name = f"{row.operation} {row.case} {row.direction}"
        yield f"{name:<{width}}{cells}{rate(row.shown):>15}{row.shown['roof_share']:>8.0%}"
    for kind in KINDS.values():
        yield from kind.summary_of(results.measured(record))
    yield from goals_of(record)
    for name, part in record["parts"].items():
        counts = ", ".join(f"{number} {what}" for what, number in part["counts"].items())
        limit = "" if part["limit"] is None else f" of {part['limit']:.0f}"
        yield f"{name:<10} {part['outcome']}, {part['seconds']:.0f}{limit} s; {counts or 'no results'}"
        for problem in part["problems"][:5]:
            yield f"  {problem['test']}: {str(problem.get('reason', '')).strip().splitlines()[0][:150]}"


def part_summary(record: results.Record, name: str) -> Iterator[str]:
    """The lines that end a run of one part, whose rows have a table of their own."""
    part = record["parts"][name]
    yield heading_of(record)
    if part["session"]:
        yield session_of(part["session"])
    for kind in KINDS.values():
        yield from kind.summary_of(part["benchmarks"])
    for line in part["benchmarks"]:
        if line["outcome"] != "passed":
            yield f"{line['contender']}: {line['outcome']}: {line['reason']}"
    yield f"{name}: {part['outcome']}"


def heading_of(record: results.Record) -> str:
    """On what a record was made."""
    versions = record["environment"]["versions"]
    return f"{record['device']}, torch {versions['torch']}, triton {versions['triton']}, commit {record['commit']}"


def session_of(session: results.Record) -> str:
    """The roofs of a part, where it has some, the machine's load, and the threads."""
    words = []
    if "gemm" in session:
        peak = f", peak {session['peak'] / 1e12:.4g} TFLOP/s" if session.get("peak") else ""
        words.append(f"GEMM roof {session['gemm'] / 1e12:.3g} TFLOP/s ({session['dtype']}){peak}")
        words.append(f"copy roof {session['copy'] / 1e9:.4g} GB/s")
    words.append(f"load {' '.join(map(str, session['load']))}")
    return f"{', '.join(words)}, {session['threads']} thread{'s' if session['threads'] > 1 else ''}"


def goals_of(record: results.Record) -> Iterator[str]:
    """Which of the goals were measured, and reached."""
    for verdict in record["goals"]:
        if verdict["measured"] is not None:
            word = "reached" if verdict["reached"] else "NOT REACHED"
            yield f"{word}: {verdict['goal']}: {verdict['measured']:.3g}, needed {verdict['needed']:.3g}"
