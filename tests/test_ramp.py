"""The sizes of batches: a pure function of the update's number."""

from itertools import accumulate
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastgpt.ramp import BatchSizes, batch_tokens, micro_batches
from fastgpt.settings import load_config

CONFIGS = Path(__file__).parents[1] / "configs"
RAMPS = st.tuples(st.integers(1, 9), st.integers(1, 12), st.integers(0, 2000))  # start, levels, over


@given(st.integers(1, 10**9), st.integers(1, 10**6))
def test_without_a_ramp_all_batches_are_alike(full: int, update: int) -> None:
    sizes = BatchSizes(full)
    assert sizes.of(update) == full
    assert sizes.before(update) == (update - 1) * full


@given(RAMPS)
def test_a_ramp_is_the_straight_line_rounded_down_to_its_steps(ramp: tuple[int, int, int]) -> None:
    start, levels, over = ramp
    full, seen = start * levels, 0
    sizes = BatchSizes(full, start, over)
    for update in range(1, 200):
        assert sizes.before(update) == seen
        # start + (full - start) * seen / over, in steps of start
        line = full if seen >= over else start * (1 + (levels - 1) * seen // over)
        assert sizes.of(update) == line
        seen += line


@given(RAMPS, st.integers(1, 5000))
def test_updates_are_the_fewest_that_reach_a_total(ramp: tuple[int, int, int], total: int) -> None:
    start, levels, over = ramp
    sizes = BatchSizes(start * levels, start, over)
    updates = sizes.updates(total)
    assert sizes.before(updates + 1) >= total > sizes.before(updates)


def test_a_start_that_does_not_divide_the_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="10 does not grow in steps of 4"):
        BatchSizes(10, 4, 100)


@pytest.mark.parametrize("micro_batch_size", [1, 2, 4])
def test_the_size_of_a_micro_batch_does_not_move_the_ramp(micro_batch_size: int) -> None:
    words = "train.batch_tokens=8192 train.batch_ramp_start=1024 train.batch_ramp_tokens=50000"
    config = load_config(CONFIGS / "quickstart.yaml", [*words.split(), f"train.micro_batch_size={micro_batch_size}"])
    tokens, parts = batch_tokens(config), micro_batches(config)
    assert tokens.of(1) == 1024
    assert tokens.of(1000) == 8192
    for update in range(1, 60):
        assert parts.of(update) * micro_batch_size * 256 == tokens.of(update)
        assert parts.before(update) * micro_batch_size * 256 == tokens.before(update)


def test_gpt_3_starts_with_32k_tokens_unless_told_otherwise() -> None:
    words = ["train.batch_tokens=65536", "train.batch_ramp_tokens=1000000"]
    assert batch_tokens(load_config(CONFIGS / "quickstart.yaml", words)).of(1) == 32768


def test_a_ramp_that_would_start_above_the_batch_has_it_full_at_once() -> None:
    config = load_config(CONFIGS / "quickstart.yaml", ["train.batch_ramp_tokens=1000000"])
    assert {batch_tokens(config).of(update) for update in (1, 2, 1000)} == {4096}


def test_sums_agree_with_adding_up() -> None:
    sizes = BatchSizes(96, 8, 10_000)
    every = [sizes.of(update) for update in range(1, 500)]
    assert [sizes.before(update) for update in range(2, 501)] == list(accumulate(every))
    assert sorted(set(every)) == list(range(8, 97, 8))


def test_updates_of_one_size_end_where_the_batch_grows() -> None:
    sizes = BatchSizes(4, 1, 10)
    for first in range(1, 20):
        steps = sizes.alike(first, 5)
        assert steps.start == first and 1 <= len(steps) <= 5
        assert {sizes.of(step) for step in steps} == {sizes.of(first)}
        assert len(steps) == 5 or sizes.of(steps.stop) != sizes.of(first)
