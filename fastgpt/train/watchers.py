"""What happens around the updates. The loop calls each watcher in turn; none knows of the others."""

import logging
import math
from typing import NamedTuple, Protocol

from fastgpt.engine.base import Update
from fastgpt.errors import SharedError
from fastgpt.ramp import BatchSizes

log = logging.getLogger(__name__)


class Measured(NamedTuple):
    """An update and what it took."""

    update: Update
    tokens: int  # seen since the start of the run
    tokens_per_second: float


class Watcher(Protocol):
    """Called by the loop on every rank."""

    def begin(self, step: int) -> None:
        """Before the first update of this process; `step` updates were done before."""

    def looks_at(self, step: int) -> bool:
        """Whether it will look at the engine as it stands after this update; the same on every rank."""

    def after(self, measured: Measured) -> None:
        """After each update. The engine may have begun the next one, unless `looks_at` said otherwise."""


class Guard:
    """Stops a run that has diverged, before its weights reach a checkpoint.

    An update that was skipped because its gradients overflowed is no reason to stop; a loss that is not a number is.
    """

    def begin(self, step: int) -> None:
        """Nothing to do."""

    def looks_at(self, step: int) -> bool:
        """The loss is all it looks at."""
        return False

    def after(self, measured: Measured) -> None:
        """Look at the loss.

        Raises:
            SharedError: it is not finite.
        """
        update = measured.update
        if not math.isfinite(update.loss):
            raise SharedError(
                f"step {update.step}: the loss is {update.loss}, so the run has diverged (learning rate "
                f"{update.learning_rate:g}). Checkpoints before it are whole; lower train.lr or train.clip"
            )


class FirstUpdate:
    """Tells how long the first update took, which compiles the blocks."""

    def __init__(self, sizes: BatchSizes) -> None:
        self._sizes = sizes  # tokens of every update
        self._first = 1

    def begin(self, step: int) -> None:
        """Note which one is the first."""
        self._first = step + 1

    def looks_at(self, step: int) -> bool:
        """At the first alone, so that its time is its own."""
        return step == self._first

    def after(self, measured: Measured) -> None:
        """Tell its time."""
        if measured.update.step == self._first:
            seconds = self._sizes.of(self._first) / measured.tokens_per_second
            log.info("engine.compile: the first update, with compiling, took %.1f s", seconds)
