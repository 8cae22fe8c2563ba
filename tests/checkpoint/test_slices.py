import json
import os
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastgpt.checkpoint.slices import Slice, SliceReader, write_slices
from fastgpt.errors import UserError

cuts = st.lists(st.integers(1, 99), max_size=6).map(lambda c: sorted({0, 100, *c}))


@given(written=cuts, wanted=cuts)
def test_any_cut_is_read_from_any_other(
    written: list[int], wanted: list[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("slices")
    whole = torch.randn(100)
    for rank, (start, stop) in enumerate(pairwise(written)):
        write_slices(folder, rank, [Slice("w", "master", start, whole[start:stop])])
    reader = SliceReader(folder)
    for start, stop in pairwise(wanted):
        target = torch.full((stop - start,), float("nan"))
        reader.read_into(target, "w", "master", start)
        assert torch.equal(target, whole[start:stop])


def test_slices_that_share_memory_are_written_apart(tmp_path: Path) -> None:
    flat = torch.arange(10.0)
    write_slices(tmp_path, 0, [Slice("a", "master", 0, flat[:4]), Slice("b", "master", 0, flat[4:])])
    target = torch.empty(6)
    SliceReader(tmp_path).read_into(target, "b", "master", 0)
    assert torch.equal(target, flat[4:])


def test_missing_elements_are_told(tmp_path: Path) -> None:
    write_slices(tmp_path, 0, [Slice("a", "master", 0, torch.ones(4))])
    with pytest.raises(UserError, match=r"elements 4 to 8 of a \(master\) are in none"):
        SliceReader(tmp_path).read_into(torch.empty(8), "a", "master", 0)
    with pytest.raises(UserError, match=r"elements 0 to 4 of a \(exp_avg\) are in none"):
        SliceReader(tmp_path).read_into(torch.empty(4), "a", "exp_avg", 0)


def test_a_folder_without_state_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no training state"):
        SliceReader(tmp_path)


def test_a_damaged_index_is_told(tmp_path: Path) -> None:
    write_slices(tmp_path, 0, [Slice("a", "master", 0, torch.ones(4))])
    index = tmp_path / "state-00000.json"
    index.write_text(json.dumps([{"tensor": "0"}]))
    with pytest.raises(UserError, match="not a training state's index"):
        SliceReader(tmp_path)


def test_a_truncated_file_is_told(tmp_path: Path) -> None:
    write_slices(tmp_path, 0, [Slice("a", "master", 0, torch.ones(400))])
    os.truncate(tmp_path / "state-00000.safetensors", 200)
    with pytest.raises(UserError, match="cannot be read"):
        SliceReader(tmp_path).read_into(torch.empty(400), "a", "master", 0)
