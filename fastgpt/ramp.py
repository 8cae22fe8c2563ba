"""How large each update's batch is: the same for all, or growing over the first tokens of a run.

A pure function of the settings and of the update's number, so that nothing is saved or restored, and the data order
depends neither on the number of ranks nor on an interruption.
"""

import bisect
from typing import NamedTuple, Protocol

from fastgpt.config import Config


class Sizes(Protocol):
    """How large each update is, in tokens or another unit."""

    def of(self, update: int) -> int:
        """The size of an update, counting from 1."""

    def before(self, update: int) -> int:
        """The sum of all updates before this one."""


class Level(NamedTuple):
    """Updates of one size."""

    first: int  # update, counting from 1
    size: int  # of each of its updates
    before: int  # the sum of all updates before it


class BatchSizes:
    """The size of every update's batch, in tokens or another unit.

    Linear in what was seen before, from `start` to `full` over the first `over`, rounded down to whole multiples of
    `start` ("Language Models are Few-Shot Learners", appendix B, which tells no step).
    """

    def __init__(self, full: int, start: int | None = None, over: int = 0) -> None:
        """Sizes of `full`, after a ramp from `start`, which must divide it, where one is given."""
        start = start or full
        if full % start:
            raise ValueError(f"a batch of {full} does not grow in steps of {start}")
        self._levels = []
        first, before, rises = 1, 0, full // start - 1
        for level in range(1, rises + 1):
            # as long as before < over * level / rises, in whole numbers
            updates = max(0, -((before * rises - over * level) // (rises * level * start)))
            if updates:
                self._levels.append(Level(first, level * start, before))
            first, before = first + updates, before + updates * level * start
        self._levels.append(Level(first, full, before))

    def of(self, update: int) -> int:
        """The size of an update, counting from 1."""
        return self._level(update).size

    def before(self, update: int) -> int:
        """The sum of all updates before this one."""
        level = self._level(update)
        return level.before + (update - level.first) * level.size

    def alike(self, first: int, most: int) -> range:
        """The updates from `first` on, `most` of them at most, that are of its size."""
        following = next((level.first for level in self._levels if level.first > first), first + most)
        return range(first, min(first + most, following))

    def updates(self, total: int) -> int:
        """The fewest updates that add up to `total` at least."""
        level = next(level for level in reversed(self._levels) if level.before < max(total, 1))
        return level.first - 1 + -((level.before - total) // level.size)

    def in_units_of(self, unit: int) -> "BatchSizes":
        """The same batches, each of so many units; `unit` divides all sizes."""
        sizes = BatchSizes(self._levels[-1].size // unit)
        sizes._levels = [Level(first, size // unit, before // unit) for first, size, before in self._levels]
        return sizes

    def _level(self, update: int) -> Level:
        return self._levels[bisect.bisect_right(self._levels, update, key=lambda level: level.first) - 1]


def batch_tokens(config: Config) -> BatchSizes:
    """The tokens of every update."""
    train = config.train
    return BatchSizes(train.batch_tokens, config.smallest_batch_tokens, train.batch_ramp_tokens or 0)


def micro_batches(config: Config) -> BatchSizes:
    """The micro-batches of every update, over all ranks."""
    return batch_tokens(config).in_units_of(config.train.micro_batch_size * config.model.context)
