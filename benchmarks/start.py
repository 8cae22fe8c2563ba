"""`fastgpt bench start`: from the start of a process to help, and to the end of the first update.

A run is `fastgpt train` as a user starts it, in a fresh process and a new run folder, until `metrics.jsonl` has the
line of step 1; then it is ended. One run that does not count goes before: it prepares the corpus, compiles bytecode,
and fills the caches of compilers. Where the time goes is told by processes of their own, `benchmarks.start_worker`.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import environment, gpu, session
from benchmarks.results import NO_TIME, Record
from benchmarks.session import Keeping, say, timed
from benchmarks.shapes import Scale
from fastgpt.config import Config
from fastgpt.engine.host import available_cores
from fastgpt.engine.precision import resolve_device
from fastgpt.errors import UserError
from fastgpt.settings import load_config
from fastgpt.sizes import parameter_count

ROUNDS, HELP_ROUNDS = 5, 10
LOOK_EVERY = 0.005  # seconds
LATE = 600.0  # a run that has not come to its first update by then is given up
TOY_PARAMETERS = 1_000_000
IMPORT_LINE = re.compile(r"import time:\s+(\d+) \|\s+\d+ \|\s*(\S+)")
# what a CPU can show of a GPT-2: little text to validate on, and none to sample
SMALL_GPT2 = (
    "model.context=512", "train.micro_batch_size=2", "train.batch_tokens=1024", "train.eval_tokens=1024",
    "train.sample_tokens=0", "data.path=stdlib", "data.tokenizer=auto", "data.validation_fraction=0.02",
)  # fmt: skip


class Run(NamedTuple):
    """What is started."""

    name: str
    path: str
    overrides: tuple[str, ...]
    config: Config


@dataclass
class Measured:
    """What is known of a run."""

    run: Run
    seconds: list[float] = field(default_factory=list)  # to the first update
    laps: list[dict[str, float]] = field(default_factory=list)
    imports: dict[str, float] = field(default_factory=dict)
    problem: str | None = None


class Failed(Exception):  # noqa: N818 - a row of the table
    """A process that did not do what it was started for, and why."""


def run(config: str | None = None, overrides: Sequence[str] = (), *, rounds: int = ROUNDS, **keeping: Any) -> int:
    """Measure, keep what was found, and print it.

    Args:
        config: a file of settings; by default the quickstart, and on a CPU the smallest GPT-2 as well.
        overrides: settings that replace the file's.
        rounds: fresh processes of each.
        keeping: the fields of `Keeping`.

    Returns:
        The exit code: 1 where a process failed.

    Raises:
        UserError: an option or settings that cannot be.
    """
    if rounds < 1:
        raise UserError(f"--rounds must be at least 1, not {rounds}")
    kept = Keeping(**keeping)
    runs = runs_of(config, overrides)
    on_gpu = resolve_device(runs[0].config.engine.device).type == "cuda"
    scale: Scale = "gpu" if on_gpu else "cpu"
    if all(parameter_count(each.config.model) < TOY_PARAMETERS for each in runs):
        scale = "toy"
    return Session(runs, rounds, scale, kept.end, on_gpu=on_gpu).carry_out(kept)


def runs_of(config: str | None, overrides: Sequence[str]) -> list[Run]:
    """What is asked for; by default the quickstart, and what a CPU can show of a GPT-2 in little time."""
    if config:
        return [run_of(config, overrides)]
    configs = gpu.ROOT / "configs"
    runs = [run_of(str(configs / "quickstart.yaml"))]
    if resolve_device("auto").type == "cpu":
        runs.append(run_of(str(configs / "gpt2-124m.yaml"), SMALL_GPT2, "gpt2-124m T=512"))
    return runs


def run_of(path: str, overrides: Sequence[str] = (), name: str | None = None) -> Run:
    """A run with these settings."""
    absolute = str(Path(path).absolute())  # its process works elsewhere
    return Run(name or Path(path).stem, absolute, tuple(overrides), load_config(path, overrides))


class Session(session.Session):
    """Help and all runs, in fresh processes."""

    def __init__(self, runs: Sequence[Run], rounds: int, scale: Scale, end: float, *, on_gpu: bool) -> None:
        super().__init__("start", scale, end, on_gpu=on_gpu)
        self.rounds = rounds
        self.help: list[float] = []
        self.measured = [Measured(each) for each in runs]
        self.session = {"load": environment.load(), "clocks": {}, "threads": len(available_cores())}

    def measure(self) -> None:
        """Help first, then rounds of all runs."""
        try:
            seconds_of_help()  # compiles bytecode
            self.help = [seconds_of_help() for _ in range(HELP_ROUNDS)]
            self.keep()
            with tempfile.TemporaryDirectory(prefix="fastgpt-start-") as folder:
                for each in self.measured:
                    self.guarded(each, Path(folder), self.warm_up)
                for number in range(self.rounds):
                    for each in self.measured:
                        if number == 0 or time.time() < self.end:
                            self.guarded(each, Path(folder), self.take_turn)
                for each in self.measured:
                    if time.time() < self.end:
                        self.guarded(each, Path(folder), self.look_at_imports)
        finally:
            self.keep()

    def guarded(self, each: Measured, folder: Path, do: Callable[[Measured, Path], None]) -> None:
        """Let one run do something; what ends it does not end the others."""
        if each.problem is None:
            try:
                do(each, folder)
            except Failed as problem:
                each.problem = str(problem)
                say(f"{each.run.name}: {each.problem}")
            self.keep()

    def warm_up(self, each: Measured, folder: Path) -> None:
        """The run that does not count."""
        if time.time() >= self.end:
            raise Failed(NO_TIME)
        say(f"{each.run.name}: {seconds_to_first_update(each.run, folder):.2f} s before anything was cached")

    def take_turn(self, each: Measured, folder: Path) -> None:
        """A run, and one that tells where the time goes."""
        each.seconds.append(seconds_to_first_update(each.run, folder))
        each.laps.append(json.loads(watched(each.run, folder).stdout))
        say(f"{each.run.name}: {each.seconds[-1]:.2f} s to the end of the first update")

    def look_at_imports(self, each: Measured, folder: Path) -> None:
        """Whose modules are loaded, and for how long; the clock of each import costs time itself."""
        each.imports = import_seconds(watched(each.run, folder, "-X", "importtime").stderr)

    def lines(self) -> list[Record]:
        """A line for help, and one for each run that has come to something."""
        lines = [self.line("help", "help", self.help)] if self.help else []
        for each in self.measured:
            name = each.run.name
            about = {"settings": list(each.run.overrides), "parameters": parameter_count(each.run.config.model)}
            if each.problem == NO_TIME:
                lines.append(self.common(name, "first update") | {"outcome": "skipped", "reason": NO_TIME})
            elif each.problem:
                lines.append(self.common(name, "first update") | {"outcome": "failed", "reason": each.problem})
            elif each.seconds and each.laps:
                laps = {key: session.median([lap[key] for lap in each.laps]) for key in each.laps[0]}
                found = {"split": laps, "imports": each.imports} | about
                lines.append(self.line(name, "first update", each.seconds) | found)
        return lines

    def common(self, case: str, direction: str) -> Record:
        """What every line has."""
        about = {"operation": "start", "case": case, "direction": direction, "contender": "ours"}
        return {"test": f"start {case}", "outcome": "passed", "seconds": self.seconds} | about

    def line(self, case: str, direction: str, seconds: Sequence[float]) -> Record:
        """What was measured of a process."""
        times = {**timed(seconds), "timed_by": "a fresh process from its start", "load": environment.load()}
        return self.common(case, direction) | times | {"session": self.session}

    def failure(self) -> str | None:
        """The first run that failed."""
        failed = (each for each in self.measured if each.problem and each.problem != NO_TIME)
        return next((f"{each.run.name}: {each.problem}" for each in failed), None)


def seconds_of_help() -> float:
    """From the start of `fastgpt --help` to its end."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "fastgpt", "--help"], **surroundings(), stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start


def seconds_to_first_update(run: Run, folder: Path) -> float:
    """From the start of `fastgpt train` to the first line of an update."""
    with new_run_folder(folder) as out, (folder / "printed").open("w+") as printed:
        words = ("-m", "fastgpt", "train", *words_of(run, folder, out))
        start = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, *words], **surroundings(), stdout=printed, stderr=printed, start_new_session=True
        )
        try:
            while not has_first_update(out / "metrics.jsonl"):
                if process.poll() is not None or time.perf_counter() > start + LATE:
                    printed.seek(0)
                    raise Failed(reason_of(process.poll(), printed.read()))
                time.sleep(LOOK_EVERY)
            return time.perf_counter() - start
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def watched(run: Run, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """A run that ends by itself at its first update, with its laps as JSON on standard output."""
    with new_run_folder(folder) as out:
        command = [sys.executable, *options, "-m", "benchmarks.start_worker", str(time.time())]
        words = [*command, *words_of(run, folder, out)]
        try:
            done = subprocess.run(words, **surroundings(), capture_output=True, text=True, timeout=LATE)
        except subprocess.TimeoutExpired:
            raise Failed(reason_of(None, "")) from None
    if done.returncode:
        raise Failed(reason_of(done.returncode, done.stderr))
    return done


def words_of(run: Run, folder: Path, out: Path) -> list[str]:
    """The settings of a run as a command takes them."""
    return [run.path, *run.overrides, f"out={out}", f"data.cache={folder / 'cache'}"]


@contextlib.contextmanager
def new_run_folder(folder: Path) -> Iterator[Path]:
    """A run folder that is not there yet."""
    with tempfile.TemporaryDirectory(dir=folder) as inner:
        yield Path(inner) / "run"


def surroundings() -> dict[str, Any]:
    """Where a process runs."""
    return {"cwd": gpu.ROOT, "env": gpu.child_environment()}


def has_first_update(metrics: Path) -> bool:
    """Whether the line of the first update is there, whole."""
    try:
        *lines, _ = metrics.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        return False
    return any(record["split"] == "train" for record in map(json.loads, lines))


def reason_of(code: int | None, printed: str) -> str:
    """Why a process came to nothing, in a line."""
    last = (printed.strip().splitlines() or ["it printed nothing"])[-1]
    return f"no update in {LATE:.0f} s" if code is None else f"exit code {code}: {last[:200]}"


def import_seconds(printed: str) -> dict[str, float]:
    """Seconds by package, from what `-X importtime` prints: each module's own, the longest first."""
    microseconds: Counter[str] = Counter()
    for line in printed.splitlines():
        if found := IMPORT_LINE.match(line):
            package = found[2].partition(".")[0]
            microseconds["Python's own" if package in sys.stdlib_module_names else package] += int(found[1])
    return {name: number / 1e6 for name, number in microseconds.most_common()}
