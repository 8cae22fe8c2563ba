from collections.abc import Callable
from itertools import islice

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastgpt.data.shards import TokenShards
from fastgpt.data.source import GROUP_TOKENS, RandomSource, ShardSource, TokenSource
from fastgpt.errors import UserError
from fastgpt.ramp import BatchSizes

WriteShards = Callable[..., TokenShards]


@pytest.fixture
def counting(write_shards: WriteShards) -> TokenShards:
    """Tokens 0 to 999 in shards of 150: an id is its own position."""
    return write_shards(np.arange(1000), shard_tokens=150, vocab_size=1000)


def take(source: TokenSource, count: int, start: int = 0) -> list[np.ndarray]:
    return [batch.tokens for batch in islice(source.batches(start), count)]


def test_a_batch_is_micro_batches_of_windows_with_one_token_more(counting: TokenShards) -> None:
    batches = list(islice(ShardSource(counting, 7, 3, 4, seed=1).batches(5), 2))
    assert [batch.step for batch in batches] == [6, 7]
    for batch in batches:
        assert batch.tokens.shape == (4, 3, 8) and batch.tokens.dtype == np.int64
        assert batch.micro_batches == (0, 1, 2, 3)
        assert (np.diff(batch.tokens, axis=-1) == 1).all(), "a window is consecutive tokens"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(context=st.integers(1, 999), seed=st.integers(0, 2**70), start=st.integers(0, 10**6))
def test_windows_stay_inside_the_stream_for_any_context(
    counting: TokenShards, context: int, seed: int, start: int
) -> None:
    [tokens] = take(ShardSource(counting, context, 5, 2, seed), 1, start)
    assert tokens.shape == (2, 5, context + 1)
    assert (np.diff(tokens, axis=-1) == 1).all()


def test_an_epoch_shows_each_window_once(counting: TokenShards) -> None:
    source = ShardSource(counting, 10, 1, 1, seed=3)
    assert source.windows == 99
    for epoch in range(4):
        tokens = np.concatenate(take(source, 99, start=99 * epoch)).reshape(99, 11)
        starts = np.sort(tokens[:, 0])
        assert (np.diff(starts) == 10).all(), "windows lie end to end"


def test_window_edges_move_between_epochs(counting: TokenShards) -> None:
    source = ShardSource(counting, 10, 1, 1, seed=3)
    edges = {int(take(source, 1, start=99 * epoch)[0][0, 0, 0]) % 10 for epoch in range(60)}
    assert len(edges) > 7


def test_starting_later_gives_the_rest_of_the_same_stream(counting: TokenShards) -> None:
    source = ShardSource(counting, 16, 2, 3, seed=9)
    whole = take(source, 40)
    for start in (1, 17, 39):
        np.testing.assert_array_equal(np.stack(take(source, 40 - start, start)), np.stack(whole[start:]))


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(("context", "micro_batch_size", "micro_batches"), [(1, 1, 2), (7, 3, 4), (500, 66, 2)])
def test_batches_made_in_groups_are_those_made_one_by_one(
    counting: TokenShards, context: int, micro_batch_size: int, micro_batches: int, rank: int
) -> None:
    source = ShardSource(counting, context, micro_batch_size, micro_batches, seed=5, rank=rank, world_size=2)
    size = context * micro_batch_size * micro_batches // 2
    group = max(1, GROUP_TOKENS // size)
    for step, batch in enumerate(islice(source.batches(41), 2 * group + 1), 42):
        if (step - 42) % group in (0, group - 1):  # the first and the last of a group
            alone = source.batch(step)
            assert batch.step == alone.step == step and batch.micro_batches == alone.micro_batches
            np.testing.assert_array_equal(batch.tokens, alone.tokens)


def test_the_order_of_the_data_is_that_of_every_version(counting: TokenShards) -> None:
    source = ShardSource(counting, 16, 2, 3, seed=9)
    assert [batch.tokens[:, :, 0].tolist() for batch in islice(source.batches(20), 2)] == [
        [[859, 235], [914, 818], [578, 242]],
        [[642, 402], [626, 866], [114, 178]],
    ]


def test_the_seed_decides_the_order(counting: TokenShards) -> None:
    one, two = (np.stack(take(ShardSource(counting, 16, 2, 3, seed), 5)) for seed in (1, 2))
    assert (one != two).any()


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("kind", ["shards", "random"])
def test_the_global_batch_does_not_depend_on_the_number_of_ranks(
    counting: TokenShards, world_size: int, kind: str
) -> None:
    def source(rank: int, world_size: int) -> TokenSource:
        if kind == "random":
            return RandomSource(1000, 6, 3, 8, seed=4, rank=rank, world_size=world_size)
        return ShardSource(counting, 6, 3, 8, seed=4, rank=rank, world_size=world_size)

    alone = take(source(0, 1), 12)
    for rank in range(world_size):
        for batch, whole in zip(islice(source(rank, world_size).batches(0), 12), alone, strict=True):
            assert batch.micro_batches == tuple(range(rank, 8, world_size))
            np.testing.assert_array_equal(batch.tokens, whole[list(batch.micro_batches)])


def test_the_size_of_a_micro_batch_does_not_change_the_samples_of_an_update(counting: TokenShards) -> None:
    wide, narrow = (take(ShardSource(counting, 6, *shape, seed=4), 9) for shape in ((8, 2), (2, 8)))
    np.testing.assert_array_equal(np.stack(wide).reshape(9, 16, 7), np.stack(narrow).reshape(9, 16, 7))


@pytest.mark.parametrize("world_size", [1, 2])
def test_growing_batches_read_one_sample_after_the_other_whatever_the_ranks(
    counting: TokenShards, world_size: int
) -> None:
    plain = np.concatenate([batch.reshape(-1, 7) for batch in take(ShardSource(counting, 6, 3, 1, seed=4), 60)])
    sizes, seen = BatchSizes(8, 2, 20), 0
    sources = [ShardSource(counting, 6, 3, sizes, seed=4, rank=r, world_size=world_size) for r in range(world_size)]
    for update, batches in enumerate(zip(*(islice(s.batches(0), 8) for s in sources), strict=True), 1):
        count = sizes.of(update)
        whole = np.empty((count, 3, 7), np.int64)
        for batch in batches:
            assert len(batch.micro_batches) == count // world_size
            whole[list(batch.micro_batches)] = batch.tokens
        np.testing.assert_array_equal(whole.reshape(-1, 7), plain[seen : seen + 3 * count])
        seen += 3 * count
    later = next(iter(ShardSource(counting, 6, 3, sizes, seed=4).batches(5)))
    assert (later.step, len(later.micro_batches)) == (6, sizes.of(6))


def test_micro_batches_that_cannot_be_dealt_evenly_are_refused(counting: TokenShards) -> None:
    with pytest.raises(UserError, match="6 micro-batches an update cannot be dealt evenly to 4 ranks"):
        ShardSource(counting, 8, 1, 6, seed=0, rank=1, world_size=4)


@pytest.mark.parametrize("tokens", [0, 1, 8])
def test_too_little_text_for_one_window_is_refused_with_numbers_and_remedy(
    write_shards: WriteShards, tokens: int
) -> None:
    shards = write_shards(range(tokens)) if tokens else write_shards()
    with pytest.raises(UserError, match=f"train split has {tokens} tokens, but one window of context 8 needs 9; give"):
        ShardSource(shards, 8, 1, 1, seed=0)


@pytest.mark.parametrize("tokens", [9, 10, 15, 16, 17, 24])
def test_the_smallest_texts_are_used_to_the_last_token(write_shards: WriteShards, tokens: int) -> None:
    source = ShardSource(write_shards(range(tokens)), 8, 1, 1, seed=0)
    seen = {int(token) for batch in take(source, 200) for token in batch.ravel()}
    assert seen == set(range(tokens))


def test_random_tokens_fill_the_vocabulary_and_repeat(counting: TokenShards) -> None:
    source = RandomSource(50, 30, 4, 2, seed=-1)
    first = take(source, 3)
    assert np.unique(first).tolist() == list(range(50))
    np.testing.assert_array_equal(np.stack(take(source, 2, start=1)), np.stack(first[1:]))
