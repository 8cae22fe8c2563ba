"""What a person sees of long work: a bar with rate and time to go on a terminal, plain lines elsewhere."""

import sys
import time
from typing import Protocol

from fastgpt.engine.base import Update
from fastgpt.train.watchers import Measured


class Display(Protocol):
    """Where the run reports to a person."""

    def start(self, step: int, steps: int) -> None:
        """Training begins after `step` of `steps` updates."""

    def update(self, step: int, text: str) -> None:
        """`step` updates are done."""

    def print(self, text: str) -> None:
        """A line that stays."""

    def stop(self) -> None:
        """Training is over."""


class BarDisplay:
    """A bar that stays at the bottom of the terminal."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self._console = Console(highlight=False)
        self._progress = Progress(
            TextColumn("train"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
            TimeElapsedColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(),
            console=self._console,
            refresh_per_second=4,
        )

    def start(self, step: int, steps: int) -> None:
        """Show the bar."""
        self._task = self._progress.add_task("train", total=steps, completed=step, text="")
        self._progress.start()

    def update(self, step: int, text: str) -> None:
        """Move the bar."""
        self._progress.update(self._task, completed=step, text=text)

    def print(self, text: str) -> None:
        """A line above the bar."""
        self._console.print(text, markup=False, soft_wrap=True)

    def stop(self) -> None:
        """Leave the bar as it stands."""
        self._progress.stop()


class LineDisplay:
    """Plain lines, at most one in `seconds`, the first and last updates always among them."""

    def __init__(self, seconds: float = 5.0) -> None:
        self._seconds = seconds
        self._last_time = -float("inf")
        self._start: tuple[float, int] | None = None
        self._steps = 0

    def start(self, step: int, steps: int) -> None:
        """Note the time."""
        self._steps = steps
        self._start = (time.monotonic(), step)

    def update(self, step: int, text: str) -> None:
        """Print a line now and then."""
        now = time.monotonic()
        if now - self._last_time < self._seconds and step != self._steps:
            return
        self._last_time = now
        began, first = self._start or (now, step)
        left = (self._steps - step) * (now - began) / max(1, step - first)
        self.print(f"step {step}/{self._steps}  {text}  eta {int(left) // 60}:{int(left) % 60:02d}")

    def print(self, text: str) -> None:
        """A line."""
        print(text, flush=True)

    def stop(self) -> None:
        """Nothing to do."""


class SilentDisplay:
    """For every rank but the first."""

    def start(self, step: int, steps: int) -> None:
        """Nothing."""

    def update(self, step: int, text: str) -> None:
        """Nothing."""

    def print(self, text: str) -> None:
        """Nothing."""

    def stop(self) -> None:
        """Nothing."""


def display_for(rank: int) -> Display:
    """A bar on rank 0's terminal, lines where its output goes elsewhere, nothing on the other ranks."""
    if rank:
        return SilentDisplay()
    return BarDisplay() if sys.stdout.isatty() else LineDisplay()


class Reporter:
    """The watcher that shows each update."""

    def __init__(self, display: Display, steps: int, flops_per_token: int, peak: float | None) -> None:
        """Report to `display`; `peak` is the device's FLOP/s over all ranks, None where it is not known."""
        self._display = display
        self._steps = steps
        self._flops_per_token = flops_per_token
        self._peak = peak

    def begin(self, step: int) -> None:
        """Show where the run starts."""
        self._display.start(step, self._steps)

    def looks_at(self, step: int) -> bool:
        """It shows what it is told."""
        return False

    def after(self, measured: Measured) -> None:
        """Show an update."""
        self._display.update(measured.update.step, self._text(measured.update, measured.tokens_per_second))

    def _text(self, update: Update, rate: float) -> str:
        text = f"loss {update.loss:.4f}  lr {update.learning_rate:.2e}  {rate:,.0f} tokens/s"
        if self._peak:
            text += f"  MFU {rate * self._flops_per_token / self._peak:.1%}"
        return text if update.applied else text + "  (skipped: gradients overflowed)"
