"""Tiles for attention by what the compiler says of them, without a GPU.

    python -m fastgpt_kernels.tile_search --findings FILE --jobs 2     # under each Triton that shall be served, in turn
    python -m fastgpt_kernels.tile_search --findings FILE --write

compiles, for each line of the table, candidates until enough of them spill nothing, and adds what it learns to FILE:
first the one that is chosen now, then those of `grid` in the order of preference. A candidate that spills under
another Triton, as an earlier run found, is passed over: repeat the runs until none has anything left to compile.
`--write` makes the table: the first that spills nothing is chosen, or where there is none the one that spills least,
and what it spills becomes its budget. Lines that a GPU has timed are left alone.
"""

import argparse
import hashlib
import json
import multiprocessing
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

import triton

from fastgpt_kernels import attention_kernels, tiles
from fastgpt_kernels.arguments import file_to_write, positive_integer
from fastgpt_kernels.compile_cases import BF16, FP32, VARIANTS, attention_case
from fastgpt_kernels.compile_report import compile_case
from fastgpt_kernels.tiles import ARCHITECTURES, KERNELS, Entry, Tiles

CANDIDATES = 3  # of each line
HEAD_SIZES = (64, 80, 96, 128, 256)
BY_COMPILER = "compiler"


class Finding(NamedTuple):
    """What one Triton says of one candidate."""

    source: str  # a hash of the kernels
    triton: str
    line: tuple[str, str, int, int, bool]  # as an `Entry` begins
    tiles: Tiles
    registers: int
    spilled_bytes: int
    faults: list[str]  # but for spills
    seconds: float


def grid(kernel: str, arch: str, bits: int, head_size: int, extras: bool) -> Iterator[Tiles]:
    """Candidates in the order of preference. Rows are what a program owns, columns what it walks over."""
    if bits == 32:
        # without tensor cores: as much as the registers hold
        shapes = [(32, 32, 8), (32, 16, 8), (16, 32, 8), (16, 16, 8), (32, 16, 4), (16, 16, 4)]
        if arch != "gfx942":  # where 16 warps leave each thread 128 registers
            shapes += [(32, 16, 16), (16, 16, 16)]
        stages: tuple[int, ...] = (1,)
    elif arch == "gfx942":
        shapes = [
            (128, 32, 4),
            (64, 64, 4),
            (64, 32, 4),
            (128, 16, 8),
            (64, 16, 4),
            (32, 32, 4),
            (32, 16, 4),
            (16, 16, 4),
        ]
        if not extras and head_size <= 128:
            shapes.insert(0, (128, 64, 4))
        stages = (1,)
    else:
        shapes = [
            (128, 64, 8),
            (128, 32, 8),
            (64, 64, 4),
            (64, 32, 4),
            (128, 16, 8),
            (64, 16, 4),
            (64, 16, 8),
            (32, 16, 4),
        ]
        if head_size > 128:
            shapes[2:2] = [(64, 64, 8), (64, 32, 8)]
            shapes += [(32, 32, 4)]
        shapes += [(32, 16, 8), (16, 16, 4)]
        stages = (3, 2, 1) if arch in ("sm_90", "sm_100") else (2, 1)
    candidates = [(*shape, stage) for shape in shapes for stage in stages]
    if bits == 16 and max(stages) == 3:
        candidates.append((128, 16, 8, 4))
    for rows, columns, warps, stage in candidates:
        yield Tiles(columns, rows, warps, stage) if kernel == "backward_keys" else Tiles(rows, columns, warps, stage)


def preferred(line: Entry) -> list[Tiles]:
    """What is chosen now, then the grid."""
    now = [entry.tiles for entry in tiles.entries() if entry[:5] == line[:5]]
    return list(dict.fromkeys([*now, *grid(*line[:5])]))


def lines(arguments: argparse.Namespace) -> Iterator[Entry]:
    """The lines of the table, without candidates."""
    for kernel in arguments.kernel:
        for arch in arguments.arch:
            for bits in arguments.bits:
                for head_size in arguments.head_size:
                    for extras in (False, True):
                        yield Entry(kernel, arch, bits, head_size, extras, (), 0, BY_COMPILER, 0)


def examine(
    alike: Sequence[Entry], known: Mapping[tuple[object, ...], Sequence[Finding]], enough: int
) -> list[Finding]:
    """Compile candidates for lines that differ in head size and extras alone, the smaller ones first.

    For each line, until enough of them spill nothing here and, as far as is known, elsewhere. What spills is not tried
    at larger sizes, nor with extras.
    """
    findings: list[Finding] = []
    hopeless: set[Tiles] = set()
    for line in sorted(alike, key=lambda line: (line.head_size, line.extras)):
        before = known.get(line[:5], ())
        spilling = {finding.tiles for finding in before if finding.spilled_bytes or finding.faults}
        compiled = {finding.tiles for finding in before}
        here = {finding.tiles for finding in before if finding.triton == triton.__version__}
        good = 0
        chosen_now = preferred(line)[0]
        for candidate in preferred(line):
            if good >= enough:
                break
            # what is chosen now was good here, whatever it does at other sizes
            untried = candidate in hopeless and candidate not in compiled and candidate != chosen_now
            if candidate in spilling or untried:
                continue
            if candidate not in here:
                findings.append(examine_one(line, candidate))
                if findings[-1].spilled_bytes or findings[-1].faults:
                    hopeless.add(candidate)
                    continue
            good += 1
        hopeless |= spilling
    return findings


def examine_one(line: Entry, candidate: Tiles) -> Finding:
    """Compile one candidate."""
    dtype = FP32 if line.bits == 32 else BF16
    case = attention_case(line, line.head_size, dtype, VARIANTS[line.extras][0], candidate, gate=False)
    try:
        (row,) = compile_case(case, line.arch)
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error)[:200]}"
        return Finding(source(), triton.__version__, line[:5], candidate, 0, 0, [reason], 0.0)
    return Finding(
        source(), triton.__version__, line[:5], candidate, row.registers, row.spilled_bytes, row.faults(), row.seconds
    )


def source() -> str:
    """What the findings are about."""
    files = (attention_kernels.__file__, Path(attention_kernels.__file__).with_name("attention.py"))
    return hashlib.sha256(b"".join(Path(file).read_bytes() for file in files)).hexdigest()[:12]


def read(path: Path) -> list[Finding]:
    """All that was found so far about the kernels as they are now."""
    rows = [json.loads(row) for row in path.read_text().splitlines()] if path.exists() else []
    findings = [Finding(**row | {"line": tuple(row["line"]), "tiles": Tiles(*row["tiles"])}) for row in rows]
    return [finding for finding in findings if finding.source == source()]


def chosen(line: Entry, known: Iterable[Finding]) -> Entry:
    """The line with its candidates, from what every Triton says of them."""
    order = preferred(line)
    tritons = {finding.triton for finding in known}
    spills: dict[Tiles, int] = {}
    seen: dict[Tiles, set[str]] = {}
    invalid = {finding.tiles for finding in known if finding.faults}
    for finding in known:
        spills[finding.tiles] = max(spills.get(finding.tiles, 0), finding.spilled_bytes)
        seen.setdefault(finding.tiles, set()).add(finding.triton)
    best = min(
        (candidate for candidate in order if seen.get(candidate) == tritons and candidate not in invalid),
        key=lambda candidate: (spills[candidate], order.index(candidate)),
    )
    # beside it, those that spill least, first of those that every Triton has compiled, last of those that none has
    rest = sorted(
        (c for c in order if c != best and c not in invalid),
        key=lambda c: (len(tritons - seen.get(c, set())), spills.get(c, 0)),
    )
    candidates = sorted([best, *rest[: CANDIDATES - 1]], key=order.index)
    return line._replace(candidates=tuple(candidates), chosen=candidates.index(best), spill_budget=spills[best])


def main(argv: Sequence[str] | None = None) -> int:
    """Compile, or write the table."""
    parser = argparse.ArgumentParser(
        prog="python -m fastgpt_kernels.tile_search",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--findings", type=file_to_write, required=True, help="where they are kept: a line of JSON each"
    )
    parser.add_argument("--write", action="store_true", help="write the table from the findings")
    parser.add_argument("--enough", type=positive_integer, default=1, help="candidates that spill nothing, per line")
    parser.add_argument("--jobs", type=positive_integer, default=1, help="processes")
    parser.add_argument("--kernel", nargs="+", choices=KERNELS, default=KERNELS)
    parser.add_argument("--arch", nargs="+", choices=ARCHITECTURES, default=ARCHITECTURES)
    parser.add_argument("--bits", nargs="+", type=int, choices=(16, 32), default=(16, 32))
    parser.add_argument("--head-size", nargs="+", type=int, choices=HEAD_SIZES, default=HEAD_SIZES)
    arguments = parser.parse_args(argv)

    known: dict[tuple[object, ...], list[Finding]] = {}
    for finding in read(arguments.findings):
        known.setdefault(finding.line, []).append(finding)
    wanted = list(lines(arguments))
    if arguments.write:
        timed = {entry[:5]: entry for entry in tiles.entries() if entry.chosen_by != BY_COMPILER}
        found = {line[:5]: chosen(line, known[line[:5]]) for line in wanted if line[:5] in known}
        kept = {entry[:5]: entry for entry in tiles.entries()}
        table = tuple((kept | found | timed).values())
        tiles.PATH.write_text(tiles.write(table))
        print(f"{len(found)} lines written, {len(timed)} that were timed left alone")
        return 0
    compiled = 0
    with (
        arguments.findings.open("a") as file,
        ProcessPoolExecutor(arguments.jobs, multiprocessing.get_context("spawn")) as pool,
    ):
        groups: dict[tuple[object, ...], list[Entry]] = {}
        for line in wanted:
            groups.setdefault(line[:3], []).append(line)
        work = [pool.submit(examine, alike, known, arguments.enough) for alike in groups.values()]
        for future in as_completed(work):
            findings = future.result()
            compiled += len(findings)
            for finding in findings:
                file.write(json.dumps(finding._asdict()) + "\n")
                print(*finding.line, *finding.tiles, finding.registers, finding.spilled_bytes, *finding.faults)
            file.flush()
            sys.stdout.flush()
    print(f"{compiled} compiled with Triton {triton.__version__}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
