"""Commands of fastgpt that a study runs, several at a time, each in a process of its own."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

# what our commands get for it: they save at the first two, and a terminal that is closed is no reason not to
STOPPED_BY = {signal.SIGINT: signal.SIGINT, signal.SIGTERM: signal.SIGTERM, signal.SIGHUP: signal.SIGTERM}


class Job(NamedTuple):
    """One command."""

    label: str  # for people
    words: tuple[str, ...]  # after `fastgpt`
    log: Path  # what it prints
    finish: Callable[[], str]  # called once it has succeeded; gives what it came to, in words
    threads: int | None = None  # of PyTorch on the CPU, for a command whose settings do not say


class Failure(NamedTuple):
    """A command that did not succeed."""

    job: Job
    code: int
    reason: str


class Stopped(Exception):  # noqa: N818 - it is no error
    """A signal ended the study; what was running has saved where it stands."""

    def __init__(self, number: int) -> None:
        super().__init__(f"{signal.Signals(number).name}; the same command goes on from there")
        self.exit_code = 128 + number


Tell = Callable[[Job, str, float], None]
"""Called with a job that is done, what it came to, and the seconds that it took."""


def carry_out(jobs: Sequence[Job], at_once: int, tell: Tell, *, hold: Sequence[int] = ()) -> list[Failure]:
    """Run commands, so many at a time, and tell of each one that is done; those that fail do not stop the others.

    Args:
        jobs: the commands.
        at_once: how many.
        tell: called with each that is done.
        hold: descriptors of files that the commands keep open, even where we are killed.

    Raises:
        Stopped: by a signal, which the commands that were running got too.
        Exception: what `finish` and `tell` raise; the commands that were running are ended as by SIGTERM.
    """
    if not jobs:
        return []
    failures: list[Failure] = []
    running = _Running(hold)
    with running.passing_signals_on(), ThreadPoolExecutor(at_once) as pool:
        pending: set[Future[_Outcome]] = {pool.submit(running.run, job) for job in jobs}
        try:
            while pending:
                # with a time limit, since a signal's handler runs between two waits
                done, pending = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
                for future in done:
                    outcome = future.result()
                    if outcome.code == 0:
                        tell(outcome.job, outcome.job.finish(), outcome.seconds)
                    elif not running.signalled:
                        failure = Failure(outcome.job, outcome.code, _reason(outcome))
                        failures.append(failure)
                        tell(outcome.job, f"failed: {failure.reason} (log: {outcome.job.log})", outcome.seconds)
        except BaseException:
            # a full disk, or nobody who reads what is told: without this the pool would run all that waits first
            running.stop(signal.SIGTERM)
            raise
    if running.signalled:
        raise Stopped(running.signalled)
    return failures


class _Outcome(NamedTuple):
    job: Job
    code: int
    seconds: float


class _Running:
    """The processes that are running; once a signal has come no more are started."""

    def __init__(self, hold: Sequence[int]) -> None:
        self.signalled = 0
        self._hold = tuple(hold)
        self._processes: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()

    def run(self, job: Job) -> _Outcome:
        """One command to its end."""
        start = time.monotonic()
        with self._lock:
            if self.signalled:
                return _Outcome(job, 128 + self.signalled, 0.0)
            process = self._started(job)
            self._processes.add(process)
        code = process.wait()
        with self._lock:
            self._processes.discard(process)
        return _Outcome(job, code, time.monotonic() - start)

    def _started(self, job: Job) -> subprocess.Popen[bytes]:
        job.log.parent.mkdir(parents=True, exist_ok=True)
        threads = {} if job.threads is None else {"OMP_NUM_THREADS": str(job.threads)}
        with job.log.open("wb") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "fastgpt", *job.words],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # signals come from us, not also from the terminal
                pass_fds=self._hold,
                env=os.environ | threads,
            )

    @contextmanager
    def passing_signals_on(self) -> Iterator[None]:
        """A signal that ends us ends the commands first, which then save where they stand."""

        def pass_on(number: int, frame: object) -> None:
            # in a thread: the handler may have interrupted the one that holds the lock
            self.signalled = number
            threading.Thread(target=self.stop, args=(number,)).start()

        if threading.current_thread() is not threading.main_thread():
            yield
            return
        # what whoever started us has us ignore (nohup) stays ignored
        heard = [number for number in STOPPED_BY if signal.getsignal(number) is not signal.SIG_IGN]
        before = {number: signal.signal(number, pass_on) for number in heard}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def stop(self, number: int) -> None:
        """End what is running, and start no more."""
        with self._lock:
            self.signalled = number
            for process in self._processes:
                if process.poll() is None:
                    os.kill(process.pid, STOPPED_BY[signal.Signals(number)])


def _reason(outcome: _Outcome) -> str:
    """Why a command failed: what it said last, and the signal that killed it."""
    text = outcome.job.log.read_text(encoding="utf-8", errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    said = [line for line in lines if line.startswith("fastgpt: error")]
    last = (said or lines or ["it said nothing"])[-1].removeprefix("fastgpt: error: ")
    if outcome.code >= 0:
        return last
    memory = " (the system does so for want of memory)" if outcome.code == -signal.SIGKILL else ""
    return f"killed by {signal.Signals(-outcome.code).name}{memory}; last: {last}"
