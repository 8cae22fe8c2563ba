"""What the benchmarks of the command line have in common: a session finds lines, which are kept as it goes on.

Alone, a session has a part of a results file; for the command that collects several parts it writes lines only.
"""

import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import environment, goals, gpu, results, table
from benchmarks.results import Record
from benchmarks.shapes import Scale
from fastgpt.errors import UserError


class Keeping(NamedTuple):
    """Where findings go, and until when: the options that every benchmark has.

    `seconds` and `until`, a time as `time.time()` gives it: begin nothing later. `out` is the folder of the results
    file, by default $OUT, else benchmarks/results. `commit` is told where git is not at hand. `lines` is the only file
    that is written where it is given.
    """

    seconds: float | None = None
    until: float | None = None
    out: str | None = None
    commit: str | None = None
    lines: Path | None = None

    @property
    def end(self) -> float:
        """The time after which nothing may begin."""
        if self.seconds is not None and self.seconds <= 0:
            raise UserError(f"--seconds must be above 0, not {self.seconds:g}")
        ends = [self.until, None if self.seconds is None else time.time() + self.seconds]
        return min((end for end in ends if end is not None), default=math.inf)


class Session:
    """A run of one benchmark."""

    def __init__(self, part: str, scale: Scale, end: float, *, on_gpu: bool) -> None:
        self.part, self.scale, self.end, self.on_gpu = part, scale, end, on_gpu
        self.keep: Callable[[], Any] = lambda: None
        self.started = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self.started

    def measure(self) -> None:
        """Do everything; `keep` is called whenever something was found."""
        raise NotImplementedError

    def lines(self) -> list[Record]:
        """Everything found so far."""
        raise NotImplementedError

    def failure(self) -> str | None:
        """Why the run as a whole has failed, or None."""
        return None

    def carry_out(self, keeping: Keeping) -> int:
        """Measure, keep what was found, and print it; the exit code, 1 for a failure."""
        if keeping.lines is not None:
            lines = keeping.lines
            self.keep = lambda: results.write_lines(lines, self.lines())
            self.measure()
        else:
            keeper = Keeper(self, keeping)
            self.keep = keeper
            self.measure()
            keeper(finished=True)
            print("\n" + "\n".join(table.part_summary(keeper.record, self.part)) + f"\nresults: {keeper.path}")
        return 1 if self.failure() else 0


class Keeper:
    """Writes the results file, whenever it is called."""

    def __init__(self, session: Session, keeping: Keeping) -> None:
        folder = Path(keeping.out or os.environ.get("OUT") or gpu.ROOT / "benchmarks" / "results")
        found = gpu.describe()
        if not session.on_gpu:
            found |= {"device": found["cpu"], "kind": "cpu"}
        commit = keeping.commit or environment.commit()
        self.path, self.record = gpu.open_record(folder, found, session.scale, commit)
        self.session = session
        limit = None if math.isinf(session.end) else session.end - time.time()
        self.about = {"started": self.record["written"], "limit": limit}

    def __call__(self, *, finished: bool = False) -> None:
        session = self.session
        found = results.part_of(session.lines())
        outcome = "stopped with the command"
        if finished:
            failure = session.failure()
            outcome = f"failed: {failure}" if failure else gpu.outcome_of(0, self.about["limit"] or 0.0, found)
        self.record["parts"][session.part] = {
            "outcome": outcome, **self.about, "seconds": session.seconds, **found,
        }  # fmt: skip
        self.record["goals"] = goals.of_record(self.record)
        results.write(self.path, self.record)


def median(values: Sequence[float]) -> float:
    """The middle one."""
    return statistics.median(values)


def spread(values: Sequence[float]) -> float:
    """The interquartile range."""
    if len(values) < 2:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return high - low


def timed(seconds: Sequence[float]) -> Record:
    """What is said of repeated measurements of a time."""
    return {
        "median": median(seconds),
        "iqr": spread(seconds),
        "times": list(seconds),
        "min": min(seconds),
        "rounds": len(seconds),
    }


def say(text: str) -> None:
    """A line of progress."""
    print(text, file=sys.stderr, flush=True)
