from itertools import repeat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastgpt.data.splitting import SplitRule, even_sample
from fastgpt.errors import UserError

fractions = st.floats(0.001, 0.5)


@given(fraction=fractions, seed=st.integers(), documents=st.integers(2, 5000))
def test_two_documents_or_more_have_both_splits_and_about_the_fraction(
    fraction: float, seed: int, documents: int
) -> None:
    rule = SplitRule(fraction, seed)
    chosen = sum(rule.is_validation(ordinal) for ordinal in range(documents))
    rows = documents / round(1 / fraction)
    assert 1 <= chosen < documents
    assert rows - 1 <= chosen <= rows + 1


@given(fraction=fractions, seed=st.integers(), first=st.integers(0, 10**12))
def test_each_row_gives_exactly_one_document(fraction: float, seed: int, first: int) -> None:
    rule = SplitRule(fraction, seed)
    size = round(1 / fraction)
    start = first // size * size
    assert sum(rule.is_validation(ordinal) for ordinal in range(start, start + size)) == 1


def test_seeds_choose_different_documents_from_all_places_of_a_row() -> None:
    choices = [
        tuple(ordinal for ordinal in range(100, 1000) if SplitRule(0.01, seed).is_validation(ordinal))
        for seed in range(50)
    ]
    assert len(set(choices)) == 50
    assert len({ordinal % 100 for choice in choices for ordinal in choice}) > 90


def test_training_documents_are_the_others() -> None:
    rule = SplitRule(0.1, 3)
    expected = [str(ordinal) for ordinal in range(100) if not rule.is_validation(ordinal)]
    assert list(rule.training(str(ordinal) for ordinal in range(100))) == expected and len(expected) == 90


@pytest.mark.parametrize("fraction", [0, -0.1, 0.51, 1, float("nan")])
def test_a_fraction_that_leaves_a_split_empty_is_refused(fraction: float) -> None:
    with pytest.raises(UserError, match=r"validation_fraction must be above 0 and at most 0.5"):
        SplitRule(fraction, 0)


@given(lengths=st.lists(st.integers(1, 50), max_size=60), seed=st.integers(), characters=st.integers(1, 3000))
def test_a_sample_is_some_documents_in_order_within_the_limit(lengths: list[int], seed: int, characters: int) -> None:
    texts = [f"{chr(200 + number)}" * length for number, length in enumerate(lengths)]
    sample = even_sample(iter(texts), seed, characters)
    assert sample == [text for text in texts if text in sample]
    assert sum(map(len, sample)) <= characters or len(sample) == 1
    if sum(lengths) <= characters:
        assert sample == texts
    elif texts:
        assert sample


def test_a_sample_comes_from_all_over_the_corpus() -> None:
    sample = even_sample((f"{number:9}" for number in range(20_000)), 0, characters=9 * 1000)
    numbers = [int(text) for text in sample]
    assert 400 <= len(numbers) <= 1000
    for quarter in range(4):
        inside = sum(5000 * quarter <= number < 5000 * (quarter + 1) for number in numbers)
        assert abs(inside / len(numbers) - 0.25) < 0.1  # more than four standard deviations of 400 draws


def test_a_sample_of_long_documents_takes_part_of_each() -> None:
    sample = even_sample(repeat("x" * (1 << 21), 200), 0, characters=1 << 24)
    assert 1 << 22 <= sum(map(len, sample)) <= 1 << 24
    assert max(map(len, sample)) == 1 << 20, "of one document no more than a million characters"
