from itertools import chain, islice

import numpy as np
import pytest

from fastgpt.errors import UserError
from fastgpt.tasks import Encoded, Kind, Task
from fastgpt.tasks.source import ExampleSource, arguments

CLASSES = Task(Kind.CLASSIFICATION, ("accuracy",), labels=("no", "yes"))
SCORES = Task(Kind.SIMILARITY, ("pearson",), score=(1.0, 5.0))
# the first token of each example is its number
EXAMPLES = [Encoded(((100, number, *[7] * (number % 4), 102),), number % 2) for number in range(23)]


def numbers(source: ExampleSource, first: int, count: int) -> list[list[int]]:
    return [
        [int(n) for part in batch.parts for n in part["tokens"][:, 0, 1]]  # type: ignore[index, call-overload]
        for batch in islice(source.batches(first), count)
    ]


def test_an_epoch_has_every_example_once_but_for_those_that_fill_no_batch() -> None:
    source = ExampleSource(EXAMPLES, CLASSES, 4, 2, seed=1)
    assert source.updates_per_epoch == 5
    first, second = (numbers(source, start, 5) for start in (0, 5))
    for epoch in (first, second):
        seen = [n for update in epoch for n in update]
        assert len(seen) == len(set(seen)) == 20
    assert first != second
    # another three are left out
    assert {n for u in first for n in u} != {n for u in second for n in u}


def test_a_run_goes_on_where_it_stopped() -> None:
    source = ExampleSource(EXAMPLES, CLASSES, 4, 2, seed=1)
    assert numbers(source, 3, 4) == numbers(source, 0, 7)[3:]


def test_the_global_batch_does_not_depend_on_the_ranks() -> None:
    alone = ExampleSource(EXAMPLES, CLASSES, 8, 2, seed=1).batch(2)
    pair = [ExampleSource(EXAMPLES, CLASSES, 8, 2, 1, rank, 2).batch(2) for rank in range(2)]
    assert [batch.micro_batches for batch in pair] == [(0, 2), (1, 3)]
    for batch in pair:
        for part, index in zip(batch.parts, batch.micro_batches, strict=True):
            assert isinstance(part, dict)
            for name, values in alone.parts[index].items():  # type: ignore[union-attr]
                np.testing.assert_array_equal(part[name], values)


def test_examples_of_like_length_share_a_micro_batch() -> None:
    source = ExampleSource(EXAMPLES, CLASSES, 8, 2, seed=1)
    for step in (1, 2):
        parts = source.batch(step).parts
        lengths = [[int(n) + 1 for n in part["extract"].flatten()] for part in parts]  # type: ignore[index, call-overload]
        assert list(chain(*lengths)) == sorted(chain(*lengths))
        assert [part["tokens"].shape[-1] for part in parts] == [max(found) for found in lengths]  # type: ignore[index, call-overload]
        dealt = [int(n) for part in parts for n in part["tokens"][:, 0, 1]]  # type: ignore[index, call-overload]
        assert sorted(dealt) == sorted(source.examples(step))


def test_tokens_are_counted_without_padding() -> None:
    source = ExampleSource(EXAMPLES, CLASSES, 4, 4, seed=1)
    counts = source.tokens(3)
    expected = [sum(len(EXAMPLES[n].sequences[0]) for n in update) for update in numbers(source, 0, 3)]
    assert [counts.of(update) for update in (1, 2, 3)] == expected
    assert counts.before(4) == sum(expected) and counts.before(1) == 0


def test_scores_are_scaled_to_the_range_from_0_to_1() -> None:
    examples = [Encoded(((1, 2), (3, 4)), score) for score in (1.0, 2.0, 5.0)]
    assert arguments(examples, SCORES)["labels"].tolist() == [0.0, 0.25, 1.0]
    assert "labels" not in arguments([Encoded(((1, 2), (3, 4)), None)], SCORES)


def test_fewer_examples_than_a_batch_are_refused() -> None:
    with pytest.raises(UserError, match="batch_size: 32 examples are a batch, and the task has 23"):
        ExampleSource(EXAMPLES, CLASSES, 32, 2, seed=1)
