"""Where training gets its batches: the same stream of updates whatever the number of ranks, from any update on."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from fastgpt.data.sampler import Sampler, key, keyed
from fastgpt.data.shards import TokenShards
from fastgpt.errors import UserError
from fastgpt.ramp import BatchSizes


@dataclass(frozen=True)
class Batch:
    """What one rank computes for one update.

    `step` is the update that it is for, counting from 1. `tokens` is (micro-batches of this rank, micro-batch size,
    context + 1), int64: inputs are [..., :-1], targets [..., 1:]. `micro_batches` are the places of these micro-batches
    in the global batch.
    """

    step: int
    tokens: npt.NDArray[np.int64]
    micro_batches: tuple[int, ...]


class TokenSource(Protocol):
    """An endless, repeatable stream of batches."""

    def batches(self, start: int) -> Iterator[Batch]:
        """The batches for updates start + 1, start + 2 and so on; `start` updates are already done."""


@dataclass(frozen=True)
class Share:
    """How a global batch is cut up: micro-batches of `micro_batch_size` samples, dealt to the ranks in turn."""

    micro_batch_size: int
    micro_batches: BatchSizes
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        smallest = self.micro_batches.of(1)  # of which the others are multiples
        if smallest % self.world_size:
            raise UserError(
                f"{smallest} micro-batches an update cannot be dealt evenly to {self.world_size} ranks; "
                f"make the batch a multiple of {self.world_size} micro-batches"
            )

    def indices(self, step: int) -> tuple[int, ...]:
        """The micro-batches of this rank at update `step`, by their places in the global batch."""
        return tuple(range(self.rank, self.micro_batches.of(step), self.world_size))

    def samples(self, step: int) -> npt.NDArray[np.int64]:
        """The global numbers of this rank's samples at update `step`, (its micro-batches, micro-batch size)."""
        first = self.micro_batches.before(step) * self.micro_batch_size
        micro_batches = np.asarray(self.indices(step), np.int64)[:, None] * self.micro_batch_size
        return first + micro_batches + np.arange(self.micro_batch_size)


class ShardSource:
    """Windows of `context` + 1 tokens, in shuffled order, epoch after epoch.

    Update k trains on the samples that follow those of updates 1 to k - 1; micro-batch i of the global batch holds the
    i-th run of them, and rank r takes those with i % world_size == r. Window edges move from epoch to epoch. Raises
    UserError where the text is too short for one window.
    """

    def __init__(
        self,
        shards: TokenShards,
        context: int,
        micro_batch_size: int,
        micro_batches: int | BatchSizes,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if len(shards) <= context:
            raise UserError(
                f"{shards.folder}: the {shards.split} split has {len(shards)} tokens, but one window of context "
                f"{context} needs {context + 1}; give more text or a smaller context"
            )
        self.context = context
        self.windows = max(1, (len(shards) - context) // context)
        self._shards = shards
        self._share = Share(micro_batch_size, sizes_of(micro_batches), rank, world_size)
        self._sampler = Sampler(self.windows, seed)
        self._shift_key = key(seed, "shift")
        # The windows of an epoch can begin at any of these first tokens: the last one still fits.
        self._shifts = np.uint64(len(shards) - self.windows * context)

    def batches(self, start: int) -> Iterator[Batch]:
        """The batches for updates start + 1, start + 2 and so on."""
        step = start + 1
        while True:
            yield self.batch(step)
            step += 1

    def batch(self, step: int) -> Batch:
        """The batch for update `step`, counting from 1."""
        samples = self._share.samples(step)
        tokens = self._shards.gather(self.positions(samples).ravel(), self.context + 1)
        return Batch(step, tokens.reshape(*samples.shape, self.context + 1), self._share.indices(step))

    def positions(self, samples: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Where in the stream the windows of `samples` (global sample numbers) begin, in the same shape."""
        shifts = keyed(self._shift_key, self._sampler.epoch(samples)) % self._shifts
        return self._sampler.index(samples) * self.context + shifts.astype(np.int64)


class RandomSource:
    """Uniformly random tokens under the same rules, for benchmarks: no text, no files."""

    def __init__(
        self,
        vocab_size: int,
        context: int,
        micro_batch_size: int,
        micro_batches: int | BatchSizes,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._vocab_size = vocab_size
        self._context = context
        self._seed = seed % 2**64
        self._share = Share(micro_batch_size, sizes_of(micro_batches), rank, world_size)

    def batches(self, start: int) -> Iterator[Batch]:
        """The batches for updates start + 1, start + 2 and so on."""
        step = start + 1
        while True:
            shape = (self._share.micro_batch_size, self._context + 1)
            tokens = [
                np.random.default_rng((self._seed, step, index)).integers(self._vocab_size, size=shape)
                for index in self._share.indices(step)
            ]
            yield Batch(step, np.stack(tokens), self._share.indices(step))
            step += 1


def sizes_of(micro_batches: int | BatchSizes) -> BatchSizes:
    """The micro-batches of every update; a number is that of all."""
    return BatchSizes(micro_batches) if isinstance(micro_batches, int) else micro_batches
