"""`fastgpt bench data`: batches from token shards, on one core, beside nanoGPT's way.

The shards hold random ids, in files as `fastgpt prepare` writes them, which are mapped into memory and together are
larger than the last-level cache. All of them are read once before anything is timed, so that no disk takes part. A
round of a contender is as many updates as fill some hundredths of a second; contenders take turns. The time that the
core gave to this process is kept too: on a machine shared with others it is shorter than what went by.
"""

import itertools
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from benchmarks import environment, session
from benchmarks.results import Record
from benchmarks.session import Keeping, say, timed
from benchmarks.shapes import DATA, Scale, Update
from fastgpt.data.encoding import Encoded
from fastgpt.data.manifest import MANIFEST_FILE, SPLITS, Manifest, dtype_for
from fastgpt.data.prefetch import prefetch
from fastgpt.data.shards import TokenShards
from fastgpt.data.source import ShardSource
from fastgpt.data.writer import SplitWriter
from fastgpt.errors import UserError

Step: TypeAlias = Callable[[], Any]


class Times(NamedTuple):
    """Seconds that went by, and those of them that the core gave to this process."""

    seconds: float
    core: float


ROUNDS = 10
ROUND_SECONDS = {"cpu": 0.05, "toy": 0.002}
ABOUT = {
    "shards": "ShardSource alone",
    "prefetch": "ShardSource in the background thread of a training run, on the same core",
    "memmap": "nanoGPT's way: np.memmap, random places, torch.stack of a copy of each row, inputs and targets apart",
}
VOCABULARY = 50_257
FILES = 8
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
LEAST_TOKENS, TOY_TOKENS = 2**26, 2**18
DOCUMENT = 2**14  # tokens


def run(*, rounds: int = ROUNDS, toy: bool = False, **keeping: Any) -> int:
    """Measure, keep what was found, and print it.

    Args:
        rounds: turns of each.
        toy: few tokens and short rounds, which show that it works and measure nothing.
        keeping: the fields of `Keeping`.

    Returns:
        The exit code, 0.

    Raises:
        UserError: an option that cannot be.
    """
    if rounds < 1:
        raise UserError(f"--rounds must be at least 1, not {rounds}")
    kept = Keeping(**keeping)
    return Session("toy" if toy else "cpu", rounds, kept.end).carry_out(kept)


class Session(session.Session):
    """All shapes, one after the other."""

    def __init__(self, scale: Scale, rounds: int, end: float) -> None:
        super().__init__("data", scale, end, on_gpu=False)
        self.rounds = rounds
        self.tokens = TOY_TOKENS if scale == "toy" else max(LEAST_TOKENS, 2 * last_level_cache())
        self.session: Record = {}
        self.found: list[Record] = []

    def measure(self) -> None:
        """Write shards, and read them in every shape."""
        with tempfile.TemporaryDirectory(prefix="fastgpt-data-") as folder, on_one_core() as core:
            shards = random_shards(Path(folder), self.tokens)
            for start in range(0, len(shards), DOCUMENT):
                shards.slice(start, min(start + DOCUMENT, len(shards))).sum()
            self.session = {"load": environment.load(), "clocks": {}, "threads": 1, "core": core}
            try:
                for update in DATA:
                    if time.time() >= self.end:
                        break
                    self.measure_shape(shards, update)
            finally:
                self.keep()

    def measure_shape(self, shards: TokenShards, update: Update) -> None:
        """Everybody in turns."""
        source = ShardSource(shards, update.context, update.micro_batch_size, update.micro_batches, seed=0)
        check(shards, update)
        with prefetch(source.batches(0)) as ahead:
            alone = source.batches(0)
            steps: dict[str, Step] = {
                "shards": lambda: next(alone),
                "prefetch": lambda: next(ahead),
                "memmap": lambda: by_memmap(shards.folder / f"{shards.split}-00000.bin", update),
            }
            calls = {name: calls_for(step, ROUND_SECONDS[self.scale]) for name, step in steps.items()}
            times: dict[str, list[Times]] = {name: [] for name in steps}
            for _ in range(self.rounds):
                for name, step in steps.items():
                    times[name].append(times_of(step, calls[name]))
        lines = [self.line(update, name, times[name], calls[name]) for name in steps]
        self.found += lines
        say(f"{update.name}: " + ", ".join(f"{x['contender']} {x['tokens_per_second'] / 1e6:.3g} M/s" for x in lines))
        self.keep()

    def line(self, update: Update, name: str, times: list[Times], calls: int) -> Record:
        """A contender's line of results."""
        seconds = [time.seconds for time in times]
        return {
            "test": f"{update.name} {name}",
            "outcome": "passed",
            "seconds": self.seconds,
            "operation": "data",
            "case": update.name,
            "direction": "batch",
            "contender": name,
            "about": ABOUT[name],
            "shapes": [[update.micro_batches, update.micro_batch_size, update.context]],
            "dtype": "uint16 to int64",
            "tokens": update.tokens,
            "tokens_per_second": update.tokens / statistics.median(seconds),
            **timed(seconds),
            "core_median": statistics.median(time.core for time in times),
            "calls": calls,
            "timed_by": "updates in a row, on one core",
            "shard_tokens": self.tokens,
            "load": environment.load(),
            "session": self.session,
        }

    def lines(self) -> list[Record]:
        """A line for each contender and shape."""
        return self.found


def check(shards: TokenShards, update: Update) -> None:
    """See before anything is timed that everybody gives whole rows of the stream, inputs and targets alike."""
    source = ShardSource(shards, update.context, update.micro_batch_size, update.micro_batches, seed=0)
    shape = (update.micro_batches, update.micro_batch_size, update.context + 1)
    [batch] = itertools.islice(source.batches(0), 1)
    assert batch.tokens.shape == shape and batch.tokens.dtype == np.int64
    samples = np.arange(update.tokens // update.context).reshape(shape[:2])
    for row, place in zip(batch.tokens.reshape(-1, shape[-1]), source.positions(samples).ravel(), strict=True):
        np.testing.assert_array_equal(row, shards.slice(place, place + len(row)))
    [(x, y), *others] = by_memmap(shards.folder / f"{shards.split}-00000.bin", update)
    assert len(others) == update.micro_batches - 1 and x.shape == y.shape == (shape[1], update.context)
    assert x.dtype == torch.int64 and torch.equal(x[:, 1:], y[:, :-1])


def by_memmap(path: Path, update: Update) -> list[tuple[Tensor, Tensor]]:
    """An update's inputs and targets (B, T), one pair a micro-batch, from random places of a file.

    The file is mapped anew for each micro-batch, as nanoGPT does lest the process's memory grow.
    """
    pairs = []
    for _ in range(update.micro_batches):
        ids = np.memmap(path, dtype=np.uint16, mode="r")
        places = torch.randint(len(ids) - update.context, (update.micro_batch_size,)).tolist()
        x, y = (torch.stack([row_at(ids, place + shift, update.context) for place in places]) for shift in (0, 1))
        pairs.append((x, y))
    return pairs


def row_at(ids: Any, place: int, context: int) -> Tensor:
    """A copy of `context` ids, int64."""
    return torch.from_numpy(ids[place : place + context].astype(np.int64))


def random_shards(folder: Path, tokens: int) -> TokenShards:
    """Shards of random ids, in several files."""
    chance = np.random.default_rng(0)
    dtype = dtype_for(VOCABULARY)
    splits = {}
    for name in SPLITS:
        writer = SplitWriter(folder, name, tokens // FILES)
        for _ in range(tokens // DOCUMENT if name == "train" else 1):
            ids = chance.integers(VOCABULARY, size=DOCUMENT, dtype=dtype)
            writer.add(Encoded(ids, np.array([DOCUMENT], np.int64), DOCUMENT))
        splits[name] = writer.finish()
    (folder / MANIFEST_FILE).write_text(Manifest(dtype, VOCABULARY, "0" * 64, splits).to_json())
    return TokenShards.open(folder, "train", verify=False)


def last_level_cache() -> int:
    """Bytes of the largest cache, as Linux tells them; 0 where it does not."""
    sizes = []
    for path in CACHES.glob("index*/size"):
        number, unit = path.read_text().strip()[:-1], path.read_text().strip()[-1]
        sizes.append(int(number) * {"K": 2**10, "M": 2**20}.get(unit, 0))
    return max(sizes, default=0)


@contextmanager
def on_one_core() -> Iterator[int | None]:
    """Within it this thread, and what it starts, stay on one core: the last of those that it may use."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    if not hasattr(os, "sched_setaffinity"):  # one thread is all that can be done
        yield None
        torch.set_num_threads(threads)
        return
    before = os.sched_getaffinity(0)
    core = max(before)
    os.sched_setaffinity(0, {core})
    try:
        yield core
    finally:
        os.sched_setaffinity(0, before)
        torch.set_num_threads(threads)


def calls_for(step: Step, seconds: float) -> int:
    """How many updates fill a round."""
    calls = 1
    while (core := times_of(step, calls).core * calls) < seconds / 2:
        calls *= 2
    return max(1, math.ceil(calls * seconds / core))


def times_of(step: Step, calls: int) -> Times:
    """Of one update, over so many in a row."""
    start = Times(time.perf_counter(), time.process_time())
    for _ in range(calls):
        step()
    return Times((time.perf_counter() - start.seconds) / calls, (time.process_time() - start.core) / calls)
