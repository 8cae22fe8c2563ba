"""Where training gets its batches: the same stream of updates whatever the number of ranks, from any update on."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from fastgpt.data.sampler import Sampler, key, keyed
from fastgpt.data.shards import TokenShards
from fastgpt.errors import UserError
from fastgpt.ramp import BatchSizes

# Updates are made in groups of about so many tokens, 512 KB of them: to find the places of a few samples takes as long
# as to find those of hundreds, and what is made ahead stays in a core's cache until it is used.
GROUP_TOKENS = 1 << 16


MicroBatch = npt.NDArray[np.int64] | Mapping[str, npt.NDArray[Any]]
"""Windows (B, T + 1) of a text, each position to foretell the next; or what a model's `forward` takes, by name."""


class RankBatch(Protocol):
    """What one rank computes for one update."""

    @property
    def step(self) -> int:
        """The update that it is for, counting from 1."""

    @property
    def parts(self) -> Sequence[MicroBatch]:
        """The micro-batches of this rank."""

    @property
    def micro_batches(self) -> tuple[int, ...]:
        """Their places in the global batch."""


@dataclass(frozen=True)
class Batch:
    """A `RankBatch` of text.

    `tokens` is (micro-batches of this rank, micro-batch size, context + 1), int64: inputs are [..., :-1], targets
    [..., 1:].
    """

    step: int
    tokens: npt.NDArray[np.int64]
    micro_batches: tuple[int, ...]

    @property
    def parts(self) -> Sequence[MicroBatch]:
        """Each of the micro-batches."""
        return list(self.tokens)


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

    def size(self, step: int) -> int:
        """This rank's samples of update `step`."""
        return len(self.indices(step)) * self.micro_batch_size

    def samples(self, steps: range) -> npt.NDArray[np.int64]:
        """The global numbers of this rank's samples, (updates `steps`, its micro-batches, micro-batch size).

        The updates are of one size.
        """
        size = self.micro_batches.of(steps[0])
        firsts = self.micro_batches.before(steps[0]) + size * np.arange(len(steps), dtype=np.int64)
        micro_batches = np.asarray(self.indices(steps[0]), np.int64)
        places = (firsts[:, None] + micro_batches) * self.micro_batch_size
        return places[:, :, None] + np.arange(self.micro_batch_size)


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
        first = start + 1
        while True:
            group = max(1, GROUP_TOKENS // (self._share.size(first) * self.context))
            steps = self._share.micro_batches.alike(first, group)
            yield from self._batches(steps)
            first = steps.stop

    def batch(self, step: int) -> Batch:
        """The batch for update `step`, counting from 1."""
        [batch] = self._batches(range(step, step + 1))
        return batch

    def _batches(self, steps: range) -> Iterator[Batch]:
        """The batches for updates `steps`, which are of one size, made at once."""
        samples = self._share.samples(steps)
        tokens = self._shards.gather(self.positions(samples).ravel(), self.context + 1)
        indices = self._share.indices(steps[0])
        for step, update in zip(steps, tokens.reshape(*samples.shape, self.context + 1), strict=True):
            yield Batch(step, update, indices)

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
