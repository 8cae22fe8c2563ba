from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastgpt.data.evaluation import IGNORED, covered_bytes, covered_text, predicted_tokens, validation_windows
from fastgpt.data.shards import TokenShards
from fastgpt.tokenizer import Tokenizer

WriteShards = Callable[..., TokenShards]


@pytest.fixture
def counting(write_shards: WriteShards) -> TokenShards:
    """Tokens 0 to 99: an id is its own position."""
    return write_shards(np.arange(100), shard_tokens=33, split="validation")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    context=st.integers(1, 120),
    batch_size=st.integers(1, 9),
    limit=st.none() | st.integers(0, 130),
    world_size=st.sampled_from([1, 2, 3, 8]),
)
def test_every_token_but_the_first_is_predicted_once_from_the_one_before(
    counting: TokenShards, context: int, batch_size: int, limit: int | None, world_size: int
) -> None:
    ranks = [
        list(validation_windows(counting, context, batch_size, limit=limit, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1, "every rank has the same number of batches"
    predicted: list[int] = []
    for batch in (batch for batches in ranks for batch in batches):
        assert batch.inputs.shape == batch.targets.shape == (batch_size, context)
        assert batch.inputs.dtype == batch.targets.dtype == np.int64
        real = batch.targets != IGNORED
        assert batch.predicted == real.sum()
        assert (batch.inputs[real] + 1 == batch.targets[real]).all()
        assert ((batch.inputs >= 0) & (batch.inputs < 100)).all(), "padding is a valid id"
        predicted += batch.targets[real].tolist()
    count = predicted_tokens(counting, limit)
    assert count == min(99, 99 if limit is None else limit)
    assert sorted(predicted) == list(range(1, count + 1))


def test_batches_are_dealt_in_turn(counting: TokenShards) -> None:
    alone = list(validation_windows(counting, 10, 2))
    assert len(alone) == 5
    dealt = [list(validation_windows(counting, 10, 2, rank=rank, world_size=2)) for rank in range(2)]
    for number, batch in enumerate(alone):
        np.testing.assert_array_equal(dealt[number % 2][number // 2].targets, batch.targets)
    assert dealt[1][2].predicted == 0, "the surplus batch is all padding"


@pytest.mark.parametrize("documents", [[], [[3]]])
def test_a_stream_without_a_second_token_has_nothing_to_predict(
    write_shards: WriteShards, documents: list[list[int]]
) -> None:
    assert list(validation_windows(write_shards(*documents), 8, 2, world_size=2)) == []


def test_bytes_are_counted_exactly(write_shards: WriteShards, tokenizer: Tokenizer) -> None:
    end = tokenizer.end_of_text
    texts = ["some words 한국어", "naïve 😀 text"]
    shards = write_shards(*[[end, *tokenizer.encode(text)] for text in texts], split="validation")
    ids = shards.slice(0, len(shards)).tolist()
    for predicted in range(len(shards)):
        expected = tokenizer.decode_bytes(ids[1 : predicted + 1])
        assert covered_bytes(shards, predicted) == len(expected)
        assert covered_text(shards, predicted) == expected
    assert covered_text(shards, len(shards) - 1) == "".join(texts).encode()
    assert covered_bytes(shards, len(shards) - 1) == shards.bytes == len("".join(texts).encode())
