"""Working ahead: a background thread keeps the next few items of an iterator ready."""

import queue
import threading
from collections.abc import Iterator
from types import TracebackType
from typing import Generic, TypeVar

T = TypeVar("T")


class Finished:
    """The last message of the thread: its iterator ended, or raised `error`."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


class Prefetched(Generic[T]):
    """An iterator whose items are made ahead, at most `depth` of them waiting.

    An exception of the source is raised where its item would have come. `close` (or the end of a `with`) stops the
    thread after the item that it is making.
    """

    def __init__(self, source: Iterator[T], depth: int) -> None:
        self._ready: queue.Queue[T | Finished] = queue.Queue(depth)
        self._stopped = threading.Event()
        # A function of its own, so that the thread does not keep this object alive.
        self._thread = threading.Thread(
            target=produce, args=(source, self._ready, self._stopped), name="prefetch", daemon=True
        )
        self._thread.start()

    def __iter__(self) -> "Prefetched[T]":
        return self

    def __next__(self) -> T:
        if self._stopped.is_set():
            raise StopIteration
        item = self._ready.get()
        if not isinstance(item, Finished):
            return item
        self._stopped.set()
        if item.error is not None:
            raise item.error
        raise StopIteration

    def close(self) -> None:
        """Stop the thread and wait for it; nothing more comes out."""
        self._stopped.set()
        while self._thread.is_alive():
            discard(self._ready)  # the thread may be waiting for room
            self._thread.join(timeout=0.01)

    def __del__(self) -> None:
        self._stopped.set()
        discard(self._ready)

    def __enter__(self) -> "Prefetched[T]":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def prefetch(iterator: Iterator[T], depth: int = 2) -> Prefetched[T]:
    """`iterator` with up to `depth` items made ahead by a background thread."""
    if depth < 1:
        raise ValueError(f"depth must be at least 1, got {depth}")
    return Prefetched(iterator, depth)


def produce(source: Iterator[T], ready: "queue.Queue[T | Finished]", stopped: threading.Event) -> None:
    """Run `source` to its end, to its first exception, or until stopped."""
    error: BaseException | None = None
    try:
        for item in source:
            ready.put(item)
            if stopped.is_set():
                return
    except BaseException as raised:  # whatever it is, it belongs to the one who iterates
        error = raised
    ready.put(Finished(error))


def discard(ready: "queue.Queue[T | Finished]") -> None:
    """Empty a queue."""
    while True:
        try:
            ready.get_nowait()
        except queue.Empty:
            return
