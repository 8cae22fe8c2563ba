"""What a person sees of a study: a bar with the time to go on a terminal, and a line for every run that is done."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from fastgpt.ablate.jobs import Job, Tell


@contextmanager
def shown(title: str, count: int, at_once: int) -> Iterator[Tell]:
    """A function that tells of each of `count` jobs that is done."""
    start, done = time.monotonic(), 0

    def line(job: Job, outcome: str, seconds: float) -> str:
        nonlocal done
        done += 1
        left = (time.monotonic() - start) / done * (count - done)
        # of the first ones in parallel nothing is known of how many go on at a time
        eta = f", {_time(left)} left" if done < count and done >= at_once else ""
        return f"[{done}/{count}] {job.label}: {outcome} ({_time(seconds)}{eta})"

    if not sys.stdout.isatty():
        yield lambda job, outcome, seconds: print(line(job, outcome, seconds), flush=True)
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(highlight=False, markup=False)
    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("eta"))
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as bar:
        task = bar.add_task(title, total=count)

        def tell(job: Job, outcome: str, seconds: float) -> None:
            console.print(line(job, outcome, seconds))
            bar.advance(task)

        yield tell


def _time(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
