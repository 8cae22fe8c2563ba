"""Text to tokens on one core."""

import numpy as np
from pytest_benchmark.fixture import BenchmarkFixture

from fastgpt.tokenizer import train_tokenizer


def test_encoding(benchmark: BenchmarkFixture) -> None:
    """Bytes a second of the tokenizer on one core."""
    words = np.random.default_rng(0).integers(5000, size=50_000)
    text = " ".join(f"word{w}" for w in words)
    tokenizer = train_tokenizer(iter([text]), 2000)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    benchmark(tokenizer.encode, text)
    if benchmark.stats:
        benchmark.extra_info["bytes_per_second"] = len(text) / benchmark.stats.stats.median
