import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from fastgpt.engine.base import Pending, Update
from fastgpt.engine.ranks import Ranks
from fastgpt.ramp import BatchSizes
from fastgpt.train import loop
from fastgpt.train.loop import train
from fastgpt.train.saver import Interrupted, Saver
from fastgpt.train.watchers import Measured


class Device:
    """An engine that notes when updates are begun and read."""

    def __init__(self, done: bool) -> None:
        self.step = 0
        self.ranks = Ranks()
        self.done = done
        self.events: list[str] = []

    def update(self, batch: object) -> Pending:
        self.step += 1
        self.events.append(f"begin {self.step}")
        return Pending(lambda step=self.step: self._read(step), done=self.done)  # type: ignore[misc]

    def _read(self, step: int) -> Update:
        self.events.append(f"read {step}")
        return Update(step, 1.0, 1.0, 0.1, True)

    def write(self, folder: Path) -> None:
        self.events.append(f"write {self.step}")


class Looker:
    """A watcher that looks at the engine at some steps."""

    def __init__(self, engine: Device, steps: set[int], sizes: BatchSizes = BatchSizes(10)) -> None:  # noqa: B008 - no one changes it
        self.engine, self.steps, self.sizes = engine, steps, sizes
        self.told: list[int] = []
        self.rates: list[float] = []

    def begin(self, step: int) -> None:
        pass

    def looks_at(self, step: int) -> bool:
        return step in self.steps

    def after(self, measured: Measured) -> None:
        self.told.append(measured.update.step)
        assert measured.tokens == self.sizes.before(measured.update.step + 1)
        self.rates.append(measured.tokens_per_second)
        if measured.update.step in self.steps:
            assert self.engine.step == measured.update.step


def run(done: bool, looks: set[int], steps: int = 5) -> tuple[Device, Looker]:
    engine = Device(done)
    looker = Looker(engine, looks)
    train(engine, iter([None] * steps), steps=steps, sizes=BatchSizes(10), watchers=[looker])  # type: ignore[arg-type, list-item]
    assert looker.told == list(range(1, steps + 1))
    return engine, looker


def test_an_update_that_is_done_is_told_at_once() -> None:
    engine, _ = run(True, set(), steps=2)
    assert engine.events == ["begin 1", "read 1", "begin 2", "read 2"]


def test_an_update_under_way_is_read_while_the_next_one_is_computed() -> None:
    engine, _ = run(False, set(), steps=3)
    assert engine.events == ["begin 1", "begin 2", "read 1", "begin 3", "read 2", "read 3"]


def test_where_a_watcher_looks_at_the_engine_nothing_is_under_way() -> None:
    engine, _ = run(False, {2, 3})
    assert engine.events[:6] == ["begin 1", "begin 2", "read 1", "read 2", "begin 3", "read 3"]
    assert engine.events[6:] == ["begin 4", "begin 5", "read 4", "read 5"]


@pytest.mark.parametrize("done", [True, False])
def test_the_rate_of_an_update_is_its_tokens_over_its_own_time(done: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = 0.0

    class Clocked(Device):
        def _read(self, step: int) -> Update:
            nonlocal seconds
            seconds += 2.0  # of the device, for which reading waits
            return super()._read(step)

    class Slow(Looker):
        def after(self, measured: Measured) -> None:
            nonlocal seconds
            super().after(measured)
            if measured.update.step in self.steps:
                seconds += 100.0  # of a validation

    monkeypatch.setattr(loop.time, "perf_counter", lambda: seconds)
    engine = Clocked(done)
    sizes = BatchSizes(30, 10, 10)  # of 10, then of 30 tokens
    looker = Slow(engine, {2, 3}, sizes)
    train(engine, iter([None] * 6), steps=6, sizes=sizes, watchers=[looker])  # type: ignore[arg-type, list-item]
    assert looker.rates == [5.0, *[15.0] * 5]


class Store:
    """Keeps nothing but the steps that were saved."""

    def __init__(self) -> None:
        self.saved: list[int] = []

    def save(self, step: int, state: object, writes: tuple[Callable[[Path], None], ...], ranks: Ranks) -> None:
        self.saved.append(step)
        writes[0](Path())


@pytest.mark.parametrize(("done", "saved"), [(True, 2), (False, 3)])
def test_a_signal_saves_an_engine_that_stands_at_the_step_it_is_saved_as(done: bool, saved: int) -> None:
    engine, store = Device(done), Store()
    saver = Saver(
        engine,  # type: ignore[arg-type]
        store,  # type: ignore[arg-type]
        steps=9,
        every=None,
        state={},
        save_model=lambda folder: None,
        before=lambda: None,
    )

    class Signals(Looker):
        def after(self, measured: Measured) -> None:
            if measured.update.step == 2:
                signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted, match="SIGTERM"), saver.signals():
        watchers = [Signals(engine, set()), saver]
        train(engine, iter([None] * 9), steps=9, sizes=BatchSizes(10), watchers=watchers)  # type: ignore[arg-type, list-item]
    assert store.saved == [saved] and engine.events[-1] == f"write {saved}"
