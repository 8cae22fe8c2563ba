"""The validation stream, each token predicted once, dealt to the ranks."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fastgpt.data.shards import TokenShards, decoded_bytes

IGNORED = -100  # a target that counts for nothing: PyTorch's ignore_index


@dataclass(frozen=True)
class EvaluationBatch:
    """`inputs` and `targets`, both (batch size, context) int64; a target of -100 is padding."""

    inputs: npt.NDArray[np.int64]
    targets: npt.NDArray[np.int64]

    @property
    def predicted(self) -> int:
        """How many targets count."""
        return int(np.count_nonzero(self.targets != IGNORED))


def predicted_tokens(shards: TokenShards, limit: int | None = None) -> int:
    """How many tokens `validation_windows` predicts: all but the first, at most `limit`."""
    everything = max(0, len(shards) - 1)
    return everything if limit is None else min(everything, limit)


def validation_windows(
    shards: TokenShards,
    context: int,
    batch_size: int,
    *,
    limit: int | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[EvaluationBatch]:
    """This rank's batches of windows that follow one another without overlap and predict every token but the first.

    `limit` is the most tokens to predict, from the start of the stream. Batch b goes to rank b % world_size, and every
    rank gets the same number of batches, the surplus ones all padding, because a sharded model's forward pass needs
    every rank.
    """
    count = predicted_tokens(shards, limit)
    batches = -(-count // (context * batch_size))
    for first in range(0, batches, world_size):
        yield evaluation_batch(shards, context, batch_size, (first + rank) * batch_size * context, count)


def evaluation_batch(shards: TokenShards, context: int, batch_size: int, start: int, count: int) -> EvaluationBatch:
    """The batch whose first input stands at `start`, where tokens 1 to `count` are to be predicted."""
    size = batch_size * context
    inputs = np.zeros(size, np.int64)
    targets = np.full(size, IGNORED, np.int64)
    real = max(0, min(size, count - start))
    if real:
        tokens = shards.slice(start, start + real + 1)
        inputs[:real] = tokens[:-1]
        targets[:real] = tokens[1:]
    return EvaluationBatch(inputs.reshape(batch_size, context), targets.reshape(batch_size, context))


def covered_bytes(shards: TokenShards, predicted: int) -> int:
    """The exact number of UTF-8 bytes of text in the first `predicted` targets, for bits per byte."""
    if predicted == len(shards) - 1:
        return shards.bytes
    return sum(len(text) for text in decoded_bytes(shards, 1, predicted + 1))


def covered_text(shards: TokenShards, predicted: int) -> bytes:
    """The text of the first `predicted` targets, documents joined, for a comparison with compressors."""
    return b"".join(decoded_bytes(shards, 1, predicted + 1))
