"""The watcher that writes checkpoints, and saves before it lets a signal end the run."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastgpt.checkpoint.store import CheckpointStore
from fastgpt.engine.base import Engine
from fastgpt.train.watchers import Measured


class Interrupted(Exception):  # noqa: N818 - it is no error
    """A signal ended the run after an update whose checkpoint is written."""

    def __init__(self, number: int, step: int) -> None:
        super().__init__(f"{signal.Signals(number).name} after step {step}; the same command goes on from there")
        self.exit_code = 128 + number


class Saver:
    """Saves every `every` updates and after the last."""

    def __init__(
        self,
        engine: Engine,
        store: CheckpointStore,
        *,
        steps: int,
        every: int | None,
        state: dict[str, Any],
        save_model: Callable[[Path], None],
        before: Callable[[], None],
    ) -> None:
        """Watch an engine.

        Args:
            engine: what is saved.
            store: where.
            steps: updates of the whole run.
            every: updates between two checkpoints, or None for one at the end.
            state: JSON values for the manifest.
            save_model: writes the model as `load_model` reads it into a folder; called on every rank.
            before: called before each save, to bring other records to the disk first.
        """
        self._engine = engine
        self._store = store
        self._steps = steps
        self._every = every
        self._state = state
        self._save_model = save_model
        self._before = before
        self._signal: int | None = None
        self._interrupted = False  # by a signal to any rank; all ranks know it at once

    def begin(self, step: int) -> None:
        """Nothing to do."""

    def looks_at(self, step: int) -> bool:
        """When it is time, or a signal has come."""
        return self._interrupted or step == self._steps or bool(self._every and step % self._every == 0)

    def after(self, measured: Measured) -> None:
        """Save when it is time.

        Raises:
            Interrupted: a signal came; the checkpoint is written.
        """
        step, ranks = measured.update.step, self._engine.ranks
        # ranks learn of it together, from an update; one alone need not wait for that
        self._interrupted |= measured.update.stop or (ranks.world_size == 1 and ranks.stop_asked)
        if step != self._engine.step:
            return  # the next update is under way: `looks_at` has the loop tell it before another one is begun
        if self.looks_at(step):
            self._before()
            state = self._state | {"tokens": measured.tokens}
            # the model last: gathering it takes all ranks
            writes = (self._engine.write, lambda folder: self._save_model(folder / "model"))
            self._store.save(step, state, writes, ranks)
        if self._interrupted and step < self._steps:
            raise Interrupted(self._signal or signal.SIGTERM, step)

    @contextmanager
    def signals(self) -> Iterator[None]:
        """Within it SIGTERM and SIGINT end the run after the update in hand; a second one ends it at once."""
        previous = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        self._signal = number
        self._engine.ranks.stop_asked = True
        signal.signal(number, signal.SIG_DFL)
