import gc
import itertools
import threading
import time
from collections.abc import Iterator

import pytest

from fastgpt.data.prefetch import prefetch


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "prefetch"]


def wait_until_no_thread_is_left() -> None:
    deadline = time.monotonic() + 10
    while threads():
        assert time.monotonic() < deadline, "a prefetching thread is still there"
        time.sleep(0.005)


@pytest.mark.parametrize("count", [0, 1, 2, 57])
@pytest.mark.parametrize("depth", [1, 2, 100])
def test_all_items_come_in_order_and_then_the_end(count: int, depth: int) -> None:
    items = prefetch(iter(range(count)), depth)
    assert list(items) == list(range(count))
    assert list(items) == []
    wait_until_no_thread_is_left()


def test_it_works_ahead_but_no_further_than_its_depth() -> None:
    made: list[int] = []
    reached = threading.Event()

    def source() -> Iterator[int]:
        for i in itertools.count():
            made.append(i)
            if i == 3:  # two wait in the queue, one is being handed over, this one would be too many
                reached.set()
            yield i

    with prefetch(source(), depth=2) as items:
        assert not reached.wait(0.2)
        assert made == [0, 1, 2]
        assert next(items) == 0
        assert reached.wait(10)
    wait_until_no_thread_is_left()


def test_an_exception_comes_where_its_item_would_have_come() -> None:
    def source() -> Iterator[int]:
        yield 1
        yield 2
        raise LookupError("no third")

    items = prefetch(source())
    assert [next(items), next(items)] == [1, 2]
    with pytest.raises(LookupError, match="no third"):
        next(items)
    with pytest.raises(StopIteration):
        next(items)
    wait_until_no_thread_is_left()


def test_closing_stops_an_endless_source() -> None:
    closed = threading.Event()

    def source() -> Iterator[int]:
        try:
            yield from itertools.count()
        finally:
            closed.set()

    items = prefetch(source(), depth=1)
    assert next(items) == 0
    items.close()
    items.close()
    assert threads() == [] and closed.wait(10)
    with pytest.raises(StopIteration):
        next(items)


def test_a_forgotten_iterator_stops_by_itself() -> None:
    waiting = threading.Event()

    def source() -> Iterator[int]:
        yield from range(3)
        waiting.set()
        yield 3  # the queue is full: the thread waits for room

    items = prefetch(source())
    assert next(items) == 0
    assert waiting.wait(10)
    time.sleep(0.05)
    del items
    gc.collect()
    wait_until_no_thread_is_left()


def test_a_depth_of_zero_is_an_error() -> None:
    with pytest.raises(ValueError, match="depth must be at least 1"):
        prefetch(iter([1]), 0)
