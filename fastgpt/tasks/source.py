"""Examples as batches: the same stream of updates whatever the number of ranks, from any update on."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt

from fastgpt.data.sampler import Sampler
from fastgpt.data.source import MicroBatch
from fastgpt.errors import UserError
from fastgpt.tasks.example import Task
from fastgpt.tasks.transform import Encoded, TaskBatch, collate


@dataclass(frozen=True)
class ExampleBatch:
    """What one rank computes for one update; each part is what `TaskModel.forward` takes, by name."""

    step: int
    parts: Sequence[MicroBatch]
    micro_batches: tuple[int, ...]


class ExampleSource:
    """Examples in shuffled order, epoch after epoch; those at the end of an epoch that fill no batch are left out.

    Update k takes the examples that follow those of the updates before it. They are dealt to its micro-batches by their
    lengths, each padded to its longest, which leaves the least padding; rank r takes micro-batches i with
    i % world_size == r.
    """

    def __init__(
        self,
        encoded: Sequence[Encoded],
        task: Task,
        batch_size: int,
        micro_batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """Draw from `encoded`. Raises UserError where they do not fill one batch."""
        if len(encoded) < batch_size:
            raise UserError(
                f"train.batch_size: {batch_size} examples are a batch, and the task has {len(encoded)} to train on"
            )
        self.updates_per_epoch = len(encoded) // batch_size
        self._encoded = encoded
        self._longest = np.array([max(map(len, item.sequences)) for item in encoded])
        self._task = task
        self._batch_size = batch_size
        self._micro_batch_size = micro_batch_size
        self._sampler = Sampler(len(encoded), seed)
        self._indices = tuple(range(rank, batch_size // micro_batch_size, world_size))

    def batches(self, start: int) -> Iterator[ExampleBatch]:
        """The batches for updates start + 1, start + 2 and so on."""
        step = start + 1
        while True:
            yield self.batch(step)
            step += 1

    def batch(self, step: int) -> ExampleBatch:
        """The batch for update `step`, counting from 1."""
        chosen = self.examples(step)
        order = np.argsort(self._longest[chosen], kind="stable")
        rows = chosen[order].reshape(-1, self._micro_batch_size)
        parts = [arguments([self._encoded[i] for i in rows[index]], self._task) for index in self._indices]
        return ExampleBatch(step, parts, self._indices)

    def examples(self, step: int) -> npt.NDArray[np.int64]:
        """The numbers of the examples of an update, over all ranks, in their order."""
        epoch, update = divmod(step - 1, self.updates_per_epoch)
        first = epoch * len(self._encoded) + update * self._batch_size
        return self._sampler.index(np.arange(first, first + self._batch_size))

    def tokens(self, steps: int) -> "TokenCounts":
        """How many tokens, without padding, each of so many updates has."""
        lengths = np.array([sum(map(len, item.sequences)) for item in self._encoded])
        return TokenCounts([int(lengths[self.examples(step)].sum()) for step in range(1, steps + 1)])


class TokenCounts:
    """The tokens of every update."""

    def __init__(self, counts: Sequence[int]) -> None:
        self._counts = counts
        self._before = [0, *accumulate(counts)]

    def of(self, update: int) -> int:
        """Those of an update, counting from 1."""
        return self._counts[update - 1]

    def before(self, update: int) -> int:
        """Those of all updates before this one."""
        return self._before[update - 1]


def arguments(encoded: Sequence[Encoded], task: Task) -> dict[str, npt.NDArray[Any]]:
    """Examples as what `TaskModel.forward` takes; scores are scaled so that the lowest is 0 and the highest 1."""
    batch: TaskBatch = collate(encoded, task)
    taken: dict[str, npt.NDArray[Any]] = {
        "tokens": batch.tokens,
        "targets": batch.following,
        "extract": batch.extract,
    }
    if batch.targets is not None:
        taken["labels"] = batch.targets
        if task.score is not None:
            lowest, highest = task.score
            taken["labels"] = ((batch.targets - lowest) / (highest - lowest)).astype(np.float32)
    return taken
