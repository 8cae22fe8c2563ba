"""docs/performance.md, from the results files and nothing else.

    python -m benchmarks.report [--results FOLDER] [--out FILE]

Of each device it shows, part by part, the newest file that holds the part. Toys are left out.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks import goals, results, table
from benchmarks.results import NOT_MEASURED, Record

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "performance.md"
HEAD = """\
# Performance

Written by `python -m benchmarks.report` from the files in `benchmarks/results`; not edited by hand. What is measured,
and how: [benchmarking.md](benchmarking.md).

Times are medians of one call in milliseconds, with the interquartile range. A star: no CUDA graph could be made, and
the host's part is in the time. A dagger: the contender's numbers are not as close to the mathematics as PyTorch's. Rate
and share of the measured roof are those of the first column that has a time.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--out", type=Path, default=PAGE)
    chosen = parser.parse_args(arguments)
    if not chosen.results.is_dir():
        parser.error(f"--results is {chosen.results}, which is not a folder")
    try:
        chosen.out.write_text(page(results.read_all(chosen.results)))
    except OSError as error:
        parser.error(f"--out is {chosen.out}, which cannot be written: {error.strerror}")
    return 0


def page(records: Sequence[Record]) -> str:
    """The whole page."""
    by_device: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        if record["scale"] != "toy":
            by_device.setdefault((record["kind"], record["device"]), []).append(record)
    lines = [HEAD]
    if not any(kind == "gpu" for kind, _ in by_device):
        lines += ["## GPU", "", f"No GPU: {NOT_MEASURED}.", "", *goals_of([], "gpu")]
    for _, device in sorted(by_device, reverse=True):  # GPUs first
        lines += device_section(device, next(found for key, found in by_device.items() if key[1] == device))
    return "\n".join(lines).rstrip() + "\n"


def device_section(device: str, records: Sequence[Record]) -> Iterator[str]:
    """What is known of a device."""
    newest: dict[str, tuple[Record, Record]] = {}
    for record in records:
        newest |= {name: (record, part) for name, part in record["parts"].items()}
    rows = [row for _, part in newest.values() for row in part["benchmarks"] if "median" in row]
    yield from (f"## {device}", "")
    yield from goals_of(rows, records[0]["kind"])
    yield from parts_table(newest)
    for kind in table.KINDS.values():
        yield from kind.section(rows)
    for operation in dict.fromkeys(row["operation"] for row in rows if row["operation"] not in table.KINDS):
        yield from operation_section(operation, [row for row in rows if row["operation"] == operation])


def goals_of(rows: Sequence[table.Measurement], kind: str) -> Iterator[str]:
    """A table of a kind of device's goals."""
    yield from ("| Goal | needed | measured | |", "|---|---|---|---|")
    for verdict in goals.judge(rows, kind):
        value, word = NOT_MEASURED, ""
        if verdict["measured"] is not None:
            value, word = f"{verdict['measured']:.3g}", "reached" if verdict["reached"] else "**not reached**"
        yield f"| {verdict['goal']} | {verdict['needed']:.3g} | {value} | {word} |"
    yield ""


def parts_table(newest: dict[str, tuple[Record, Record]]) -> Iterator[str]:
    """Where each part comes from, how it went, and the roofs of its session."""
    yield "| Part | outcome | commit | started | torch, triton | GEMM roof | copy roof | load | clocks |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for name, (record, part) in newest.items():
        versions, session = record["environment"]["versions"], part["session"]
        cells = [name, part["outcome"], record["commit"], part["started"]]
        cells.append(f"{versions['torch']}, {versions['triton']}")
        roofs = ["", ""]
        if session and "gemm" in session:
            roofs = [f"{session['gemm'] / 1e12:.3g} TFLOP/s ({session['dtype']})", f"{session['copy'] / 1e9:.4g} GB/s"]
        cells += [*roofs, *([" ".join(map(str, session["load"])), clocks(session["clocks"])] if session else ["", ""])]
        yield "| " + " | ".join(cells) + " |"
    yield ""


def clocks(found: dict[str, str]) -> str:
    """The clocks and power under the load of the GEMM roof."""
    if not found:
        return ""
    return f"SM {found['clocks.sm']} of {found['clocks.max.sm']} MHz, {found['power.draw']} of {found['power.limit']} W"


def operation_section(operation: str, measurements: Sequence[table.Measurement]) -> Iterator[str]:
    """The table of an operation."""
    rows = table.rows_of(measurements)
    names = table.contenders_of(rows)
    unit = "floating-point operations" if measurements[0]["unit"] == "FLOP" else "bytes"
    yield from (f"### {operation}", "", f"Counted in {unit}: {measurements[0]['formula']}.", "")
    yield "| Case | direction | " + " | ".join(names) + " | rate | of roof |"
    yield "|---" * (len(names) + 4) + "|"
    for row in rows:
        cells = [row.case, row.direction, *(cell(row.by_contender.get(name)) for name in names)]
        yield "| " + " | ".join([*cells, table.rate(row.shown), f"{row.shown['roof_share']:.0%}"]) + " |"
    yield ""


def cell(found: table.Measurement | None) -> str:
    """A time with its spread."""
    if found is None:
        return "-"
    dagger = "†" if found.get("numbers", "").startswith("not ") else ""
    return f"{table.milliseconds(found)}{dagger} ± {1e3 * found['iqr']:.2g}"


if __name__ == "__main__":
    sys.exit(main())
