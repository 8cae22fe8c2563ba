import itertools
import math
import tomllib
from pathlib import Path

import pytest
import torch
import triton
from fastgpt_kernels import attention, launch, linear_gelu, tile_search, tiles
from fastgpt_kernels.tiles import ARCHITECTURES, KERNELS, Tiles

ROOT = Path(__file__).parents[2]
HEAD_SIZES = (64, 80, 96, 128, 256)
LINES = list(itertools.product(KERNELS, ARCHITECTURES, (16, 32), HEAD_SIZES, (False, True)))


@pytest.fixture(params=ARCHITECTURES)
def entries(request):
    """The lines of one architecture."""
    return [entry for entry in tiles.entries() if entry.arch == request.param]


def test_every_line_is_there_once():
    assert sorted(entry[:5] for entry in tiles.entries()) == sorted(LINES)


def test_each_line_has_three_candidates_and_one_choice(entries):
    for entry in entries:
        assert len(set(entry.candidates)) == len(entry.candidates) >= 3, entry
        assert 0 <= entry.chosen < len(entry.candidates), entry
        for M, N, warps, stages in entry.candidates:
            # tensor cores multiply 16 rows by 8 columns or more, in whole warps; Philox gives its words to 16 x 16
            assert M >= 16 and N >= 16, entry
            assert all(number & (number - 1) == 0 for number in (M, N, warps)) and 1 <= warps <= 16, entry
            assert 1 <= stages <= 4, entry


def test_nothing_may_spill_up_to_head_size_128_and_little_above(entries):
    for entry in entries:
        # 32 registers of a thread, stored and loaded
        assert 0 <= entry.spill_budget <= (0 if entry.head_size <= tiles.SPILL_FREE_HEAD_SIZE else 256), entry


def test_a_line_is_chosen_by_the_compiler_or_by_a_gpu_that_timed_it(entries):
    for entry in entries:
        if entry.chosen_by == tile_search.BY_COMPILER:
            assert entry.milliseconds is None, entry
            continue
        # "NVIDIA H200, 2026-11-25, torch 2.13.0, triton 3.9.0"
        assert entry.chosen_by.count(", ") >= 3 and not entry.chosen_by.startswith("interpreter"), entry
        assert entry.milliseconds is not None and len(entry.milliseconds) == len(entry.candidates), entry
        best = entry.milliseconds[entry.chosen]
        assert best is not None and best == min(time for time in entry.milliseconds if time is not None), entry


def test_the_table_is_read_as_it_is_written():
    assert tiles.write(tiles.entries()) == tiles.PATH.read_text()
    timed = tuple(
        entry._replace(chosen_by="a GPU, a day", milliseconds=(0.25, None, *[1.5] * (len(entry.candidates) - 2)))
        for entry in tiles.entries()
    )
    assert tiles.parse(tiles.write(timed)) == timed
    assert len(tiles.write(timed).splitlines()) == len(timed) + 2  # one line each, so that a change is easy to read


@pytest.mark.parametrize("arch", [*ARCHITECTURES, "sm_86", "sm_120"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_head_size_finds_the_next_larger_line(kernel, arch):
    for D, bits, extras in itertools.product(range(16, 257), (16, 32), (False, True)):
        entry = tiles.entry_for(kernel, tiles.listed(arch), bits, D, extras)
        assert entry.head_size == next(size for size in HEAD_SIZES if size >= D)
        assert (entry.kernel, entry.bits, entry.extras) == (kernel, bits, extras)
        assert tiles.tiles_for(kernel, arch, bits, D, extras) == entry.tiles


@pytest.mark.parametrize(
    ("arch", "line"),
    [
        *((arch, arch) for arch in ARCHITECTURES),
        ("sm_75", "sm_89"),  # with little shared memory
        ("sm_86", "sm_89"),
        ("sm_87", "sm_80"),
        ("sm_88", "sm_89"),
        ("sm_90a", "sm_90"),
        ("sm_103", "sm_100"),
        ("sm_110", "sm_100"),
        ("sm_120", "sm_89"),
        ("sm_121", "sm_89"),
        ("gfx90a", "gfx942"),
        ("gfx950", "gfx942"),
        ("gfx1100", "gfx942"),
    ],
)
def test_an_architecture_outside_the_table_takes_a_similar_ones_lines(arch, line):
    assert tiles.listed(arch) == line


def test_forced_tiles_last_as_long_as_they_are_forced():
    other = Tiles(16, 16, 1, 1)
    usual = tiles.tiles_for("forward", "sm_90", 16, 64, False)
    with pytest.raises(ZeroDivisionError), tiles.forced("forward", other):
        assert tiles.tiles_for("forward", "sm_90", 16, 64, False) == other
        assert tiles.tiles_for("backward_keys", "sm_90", 16, 64, False) != other
        raise ZeroDivisionError
    assert tiles.tiles_for("forward", "sm_90", 16, 64, False) == usual


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU nothing is interpreted")
def test_the_interpreter_has_tiles_of_its_own():
    assert launch.architecture(torch.device("cpu")) == "interpreter"
    for kernel in KERNELS:
        assert tiles.tiles_for(kernel, "interpreter", 16, 64, False) == tiles.INTERPRETER[kernel]


def test_a_head_is_held_in_two_pieces_where_that_is_less_than_one():
    for D in range(16, 257):
        main, tail = attention.pieces(D)
        assert D <= main + tail <= triton.next_power_of_2(D)
        for piece in (main, tail):
            assert piece == 0 or (piece >= 16 and math.log2(piece).is_integer())


@pytest.mark.parametrize(("D", "pieces"), [(64, (64, 0)), (80, (64, 16)), (96, (64, 32)), (160, (128, 32))])
def test_no_usual_head_is_padded(D, pieces):
    assert attention.pieces(D) == pieces


def test_the_search_prefers_what_spills_nowhere():
    line = tiles.entry_for("forward", "sm_80", 16, 64, False)._replace(chosen_by=tile_search.BY_COMPILER)
    order = tile_search.preferred(line)

    def finding(place: int, version: str, spilled: int, *faults: str) -> tile_search.Finding:
        return tile_search.Finding("", version, line[:5], order[place], 200, spilled, list(faults), 1.0)

    known = [
        finding(0, "3.9.0", 0),
        finding(0, "3.6.0", 16),
        finding(1, "3.9.0", 0, "exceeds the shared memory"),
        finding(2, "3.9.0", 0),
        finding(2, "3.6.0", 0),
        finding(3, "3.9.0", 0),
        finding(3, "3.6.0", 0),
    ]
    found = tile_search.chosen(line, known)
    assert found.tiles == order[2] and found.spill_budget == 0
    assert len(found.candidates) >= 3 and order[1] not in found.candidates
    spilling = [finding(0, "3.9.0", 24), finding(0, "3.6.0", 16), finding(2, "3.9.0", 8), finding(2, "3.6.0", 80)]
    found = tile_search.chosen(line, [*spilling, finding(3, "3.9.0", 90), finding(3, "3.6.0", 90)])
    assert found.tiles == order[0] and found.spill_budget == 24


def test_the_tables_are_installed_with_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["fastgpt_kernels"]
    for path in (tiles.PATH, linear_gelu.PATH):
        assert any(path.match(pattern) for pattern in patterns)


def test_what_is_chosen_now_is_compiled_again_though_it_spilled_at_a_smaller_size(monkeypatch):
    small, large = (tiles.entry_for("forward", "sm_80", 16, D, False) for D in (64, 80))
    spilling = large.tiles

    def examine_one(line, candidate):
        spilled = 8 if (line.head_size, candidate) == (64, spilling) else 0
        return tile_search.Finding("", "3.9.0", line[:5], candidate, 200, spilled, [], 1.0)

    monkeypatch.setattr(tile_search, "examine_one", examine_one)
    found = tile_search.examine([large, small], {}, 3)
    assert [f.spilled_bytes for f in found if f.tiles == spilling] == [8, 0]
