"""The training loop."""

import time
from collections.abc import Iterator, Sequence

from fastgpt.data.source import Batch
from fastgpt.engine.base import Engine
from fastgpt.train.watchers import Measured, Watcher


def train(
    engine: Engine, batches: Iterator[Batch], *, steps: int, batch_tokens: int, watchers: Sequence[Watcher]
) -> None:
    """Update until `steps` updates are done.

    Args:
        engine: stands at the update that it was resumed at.
        batches: this rank's, from the next update on.
        steps: updates of the whole run.
        batch_tokens: tokens of one update over all ranks.
        watchers: called in order, before the first update and after each.
    """
    for watcher in watchers:
        watcher.begin(engine.step)
    while engine.step < steps:
        start = time.perf_counter()
        update = engine.update(next(batches))
        seconds = time.perf_counter() - start
        measured = Measured(update, tokens=update.step * batch_tokens, tokens_per_second=batch_tokens / seconds)
        for watcher in watchers:
            watcher.after(measured)
