"""The data path: batches from shards, and text to tokens, both on one core."""

from pathlib import Path

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from fastgpt.data.prepare import prepare
from fastgpt.data.shards import TokenShards
from fastgpt.data.source import ShardSource
from fastgpt.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> TokenShards:
    folder = tmp_path_factory.mktemp("shards")
    chance = np.random.default_rng(0)
    for number in range(20):
        words = chance.integers(5000, size=20_000)
        (folder / f"{number}.txt").write_text(" ".join(f"w{w}" for w in words))
    prepare(str(folder), folder / "out", vocab_size=2000)
    return TokenShards.open(folder / "out", "train")


@pytest.mark.parametrize("context", [256, 1024])
def test_batches(benchmark: BenchmarkFixture, shards: TokenShards, context: int) -> None:
    """Tokens a second of `ShardSource`; the goal is 20 million on one core."""
    source = ShardSource(shards, context, 16, 8, seed=0)
    batch = source.batch(1)
    assert batch.tokens.shape == (8, 16, context + 1)
    benchmark(source.batch, 2)
    if benchmark.stats:  # not under --benchmark-disable
        benchmark.extra_info["tokens_per_second"] = 8 * 16 * context / benchmark.stats.stats.median


def test_encoding(benchmark: BenchmarkFixture, tmp_path: Path) -> None:
    """Bytes a second of the tokenizer on one core."""
    words = np.random.default_rng(0).integers(5000, size=50_000)
    text = " ".join(f"word{w}" for w in words)
    tokenizer = train_tokenizer(iter([text]), 2000)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    benchmark(tokenizer.encode, text)
    if benchmark.stats:
        benchmark.extra_info["bytes_per_second"] = len(text) / benchmark.stats.stats.median
