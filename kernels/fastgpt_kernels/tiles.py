"""How the attention kernels are cut: the table of tile sizes, by kernel, architecture, bits of the dtype and head size.

The table is `attention_tiles.json`, one entry a line:

    kernel        forward, backward_queries or backward_keys
    arch          sm_80, sm_89, sm_90, sm_100 or gfx942
    bits          16 or 32: of the dtype
    head_size     the largest that the entry is for
    extras        true: for calls with dropout, a window or documents, which take registers; false: with none of them
    candidates    [BLOCK_M, BLOCK_N, num_warps, num_stages] of every choice; the gate compiles the one in use, and the
                  tuner passes over those that spill more or do not fit
    chosen        the index of the one in use
    chosen_by     "compiler" (its registers, spills and shared memory), or the GPU and the day of a measurement
    spill_budget  bytes that the chosen one may spill (stores and loads of a thread); 0 up to head size 128
    milliseconds  median of each candidate, where a GPU has timed them

`python -m fastgpt_kernels.compile_report` compiles what is chosen, `python -m fastgpt_kernels.tune` measures the
candidates on a GPU and chooses: nothing is tuned at start-up.
"""

import contextlib
import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

PATH = Path(__file__).with_name("attention_tiles.json")
SPILL_FREE_HEAD_SIZE = 128  # up to this one no chosen tile may spill; above, its entry says how much
KERNELS = ("forward", "backward_queries", "backward_keys")
ARCHITECTURES = ("sm_80", "sm_89", "sm_90", "sm_100", "gfx942")


class Tiles(NamedTuple):
    """How one kernel is cut: queries and keys in a tile, and Triton's warps and pipeline stages."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int


class Entry(NamedTuple):
    """One line of the table."""

    kernel: str
    arch: str
    bits: int
    head_size: int
    extras: bool
    candidates: tuple[Tiles, ...]
    chosen: int
    chosen_by: str
    spill_budget: int
    milliseconds: tuple[float | None, ...] | None = None  # median of each candidate that is good, where measured

    @property
    def tiles(self) -> Tiles:
        """The chosen ones."""
        return self.candidates[self.chosen]


# Few and small, so that the interpreter crosses their borders at short lengths.
INTERPRETER = {
    "forward": Tiles(64, 32, 4, 1),
    "backward_queries": Tiles(64, 32, 4, 1),
    "backward_keys": Tiles(32, 64, 4, 1),
}

_forced: dict[str, Tiles] = {}


def tiles_for(kernel: str, arch: str, bits: int, head_size: int, extras: bool) -> Tiles:
    """The tiles of a kernel.

    Args:
        kernel: "forward", "backward_queries" or "backward_keys".
        arch: what `launch.architecture` says; an architecture outside the table takes the entries of a similar one.
        bits: 16 or 32, of the dtype.
        head_size: up to the largest of the table; one between two entries takes the larger one's.
        extras: whether there is dropout, a window or documents.
    """
    if kernel in _forced:
        return _forced[kernel]
    if arch == "interpreter":
        return INTERPRETER[kernel]
    return entry_for(kernel, listed(arch), bits, head_size, extras).tiles


def entry_for(kernel: str, arch: str, bits: int, head_size: int, extras: bool) -> Entry:
    """The line of the table; arch is one of the table's."""
    row = (kernel, arch, bits, extras)
    return next(entry for size, entry in _by_size()[row] if size >= head_size)


@functools.cache
def _by_size() -> dict[tuple[str, str, int, bool], list[tuple[int, Entry]]]:
    table: dict[tuple[str, str, int, bool], list[tuple[int, Entry]]] = {}
    for entry in sorted(entries(), key=lambda entry: entry.head_size):
        row = (entry.kernel, entry.arch, entry.bits, entry.extras)
        table.setdefault(row, []).append((entry.head_size, entry))
    return table


@functools.cache
def entries() -> tuple[Entry, ...]:
    """The whole table."""
    return parse(PATH.read_text())


def parse(text: str) -> tuple[Entry, ...]:
    """The table from its text."""
    rows: list[dict[str, Any]] = json.loads(text)
    return tuple(_entry(**row) for row in rows)


def _entry(candidates: list[list[int]], milliseconds: list[float | None] | None = None, **row: Any) -> Entry:
    times = None if milliseconds is None else tuple(milliseconds)
    return Entry(candidates=tuple(Tiles(*candidate) for candidate in candidates), milliseconds=times, **row)


def write(table: tuple[Entry, ...]) -> str:
    """The text of a table: one entry a line."""
    rows = ({name: value for name, value in entry._asdict().items() if value is not None} for entry in table)
    return "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n"


@functools.cache
def listed(arch: str) -> str:
    """The architecture of the table whose tiles fit another one: sm_86 and sm_120 have the shared memory of sm_89."""
    if arch in ARCHITECTURES:
        return arch
    if arch.startswith("gfx"):
        return "gfx942"
    number = int(re.fullmatch(r"sm_(\d+)[a-z]*", arch)[1])  # type: ignore[index]
    if number >= 120 or number in (86, 88):
        return "sm_89"
    return max(
        (name for name in ARCHITECTURES if name != "sm_89" and name.startswith("sm_") and int(name[3:]) <= number),
        key=lambda name: int(name[3:]),
        default="sm_89",
    )


@contextlib.contextmanager
def forced(kernel: str, tiles: Tiles) -> Iterator[None]:
    """Cut one kernel otherwise than the table says, to compile or to time a candidate."""
    before = dict(_forced)
    _forced[kernel] = tiles
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)
