"""Showing how far the preparation of a corpus is: a bar on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Progress = Callable[[int, int, int | None], None]

SECONDS_BETWEEN_LINES = 2.0


@contextmanager
def shown_progress(label: str) -> Iterator[Progress]:
    """A function for `prepare`'s `progress`: documents, bytes done, and bytes in all or None."""
    if not sys.stdout.isatty():
        yield _lines(label)
        return
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn(label, markup=False),
        BarColumn(),
        TextColumn("{task.fields[documents]:,} documents"),
        DownloadColumn(),
        TransferSpeedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
    )
    with Bar(*columns, transient=True) as bar:
        task = bar.add_task(label, total=None, documents=0)

        def show(documents: int, done: int, total: int | None) -> None:
            bar.update(task, completed=done, total=total, documents=documents)

        yield show


def _lines(label: str) -> Progress:
    start = last = time.monotonic()

    def show(documents: int, done: int, total: int | None) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < SECONDS_BETWEEN_LINES:
            return
        last = now
        rate = done / (now - start)
        left = f" ({done / total:.0%}, eta {(total - done) / rate:.0f} s)" if total else ""
        print(f"{label}: {documents:,} documents, {done / 1e6:.1f} MB, {rate / 1e6:.1f} MB/s{left}", flush=True)

    return show
