"""The training loop."""

import time
from collections.abc import Iterator, Sequence

from fastgpt.data.source import RankBatch
from fastgpt.engine.base import Engine, Pending
from fastgpt.ramp import Sizes
from fastgpt.train.watchers import Measured, Watcher


def train(
    engine: Engine, batches: Iterator[RankBatch], *, steps: int, sizes: Sizes, watchers: Sequence[Watcher]
) -> None:
    """Update until `steps` updates are done.

    Args:
        engine: stands at the update that it was resumed at.
        batches: this rank's, from the next update on.
        steps: updates of the whole run.
        sizes: tokens of every update over all ranks.
        watchers: called in order, before the first update and after each.
    """
    for watcher in watchers:
        watcher.begin(engine.step)
    waiting: list[Pending] = []
    clock = time.perf_counter()
    while engine.step < steps:
        waiting.append(engine.update(next(batches)))
        # While a GPU computes this update, the one before it is told of. Not so where a watcher is about to look at the
        # engine, which has to stand at the update that is told.
        while len(waiting) > 1 or (
            waiting and (waiting[0].done or engine.step == steps or any(w.looks_at(engine.step) for w in watchers))
        ):
            update = waiting.pop(0).update
            now = time.perf_counter()
            rate = sizes.of(update.step) / (now - clock)
            measured = Measured(update, tokens=sizes.before(update.step + 1), tokens_per_second=rate)
            for watcher in watchers:
                watcher.after(measured)
            # the time of the watchers counts only where an update went on beside them
            clock = now if waiting else time.perf_counter()
