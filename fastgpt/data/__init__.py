"""Text to tokens: corpora, memory-mapped token shards, deterministic sampling and batches."""

from fastgpt.data.shards import TokenShards
from fastgpt.data.source import Batch, RandomSource, ShardSource, TokenSource

__all__ = ["Batch", "RandomSource", "ShardSource", "TokenShards", "TokenSource"]
