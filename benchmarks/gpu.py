"""The GPU's turn: parity tests, compute-sanitizer, kernels and whole steps, in one command of less than eight minutes.

    python -m benchmarks.gpu [--parts parity norms ...] [--seconds N] [--out FOLDER]

Each part is a process that has its share of the time that is left, tells what it finds line by line, and is stopped
when its time is over. The results file in the folder (else $OUT, else benchmarks/results) is rewritten while parts
run, so that nothing is lost whenever the command is cut short. A short table comes last. The exit code is 1 where a
part failed or did not come to its end, or none could be measured. Without a GPU it runs toys, which show that it works.
"""

import argparse
import contextlib
import datetime
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import environment, goals, results, table
from benchmarks.results import NO_TIME, NOT_MEASURED, Record

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 450.0
LOOK_EVERY = 2.0  # seconds between two looks at what a part has found
# what a part has for its last test after it is told to begin no more
GRACE_SHARE, GRACE_SECONDS = 0.1, 10.0
PARITY_WORKERS = 14  # of 16 cores: most of their time goes into compiling, with one thread each
LINES, UNTIL = "{lines}", "{until}"


class Step(NamedTuple):
    """Whole training updates with a file of settings: the share of the time, and who is measured at which scale.

    In the order of their turns: where the time is short, the last ones are not reached.
    """

    share: float
    gpu: str
    toy: str = "ours,plain"


STEPS = {
    "gpt2-124m": Step(
        0.3,
        "ours,plain,plain-compile,plain-compile-cudnn,ours-compile,transformers,liger",
        "ours,plain,transformers",
    ),
    "gpt2-355m": Step(0.16, "ours,plain-compile,plain-compile-cudnn"),
    "gpt2-774m": Step(0.2, "ours,plain-compile,plain-compile-cudnn"),
    "gpt2-1558m": Step(0.34, "ours,ours-no-graph,zero1,plain-compile,plain-compile-cudnn", "ours,zero1,plain"),
    "gpt1-117m": Step(0.12, "ours,plain,plain-compile"),
}
# The settings that the goals are stated for, a micro-batch of a CPU, and what shows that it all works.
STEP_SETTINGS = {
    "gpu": ("model.dropout=0", "train.batch_tokens=65536"),
    "cpu": ("model.dropout=0", "model.context=512", "train.micro_batch_size=2", "train.batch_tokens=1024"),
    "toy": (
        "model.n_layer=2", "model.n_head=2", "model.n_embd=32", "model.context=32", "model.vocab_size=400",
        "train.micro_batch_size=2", "train.batch_tokens=128", "engine.threads=1",
    ),
}  # fmt: skip
# one engine beside ZeRO's stages on one rank: share of the time, file of settings, further ones, and who is measured
SCALES = {
    "scale-gpt2-124m": (0.25, "gpt2-124m", (), "single,single-no-graph,zero0,zero1,zero2,zero3"),
    "scale-fp16": (0.15, "gpt2-124m", ("engine.precision=fp16",), "single-no-graph,zero0,zero1,zero2,zero3"),
    "scale-gpt2-355m": (0.2, "gpt2-355m", (), "single-no-graph,zero1,zero2,zero3"),
    "scale-gpt2-1558m": (0.4, "gpt2-1558m", (), "single-no-graph,zero1,zero2,zero3"),
}
STEPS_ON_A_CPU = ("gpt2-124m", "gpt1-117m")
PEERS_OF_A_PATH = {"gpu": "nanogpt-bf16-compile", "cpu": "nanogpt,nanogpt-bf16", "toy": "nanogpt"}


class Part(NamedTuple):
    """A command and its share of the time; the words LINES and UNTIL in it stand for its file and its end."""

    name: str
    share: float
    command: Sequence[str]


def parts_for(scale: str, contenders: str | None, peer_path: str | None = None) -> list[Part]:
    """All parts, in order."""
    pytest = (sys.executable, "-m", "pytest", "-q", "--no-header", "--tb=short")
    pytest += ("-p", "benchmarks.lines", "--lines", LINES, "--until", UNTIL)
    if scale == "gpu":
        parity = ("tests/kernels", "tests/model", "tests/engine", "-m", "gpu and not slow", "-n", str(PARITY_WORKERS))
        parity += ("--dist", "worksteal")
    else:
        parity = ("tests/kernels/test_grad_norm.py", "-n", "0")
    # what PyTorch would take for each worker is all of them
    threads = ("env", f"OMP_NUM_THREADS={max(1, (os.cpu_count() or 1) // PARITY_WORKERS)}")
    timed = ("-n", "0", "--benchmark-enable", "--benchmark-quiet", "--scale", scale)
    timed += ("--contenders", contenders) if contenders else ()

    def suites(*names: str) -> tuple[str, ...]:
        return (*pytest, *timed, *(f"benchmarks/test_{name}.py" for name in names))

    sanitizer = (sys.executable, "-m", "benchmarks.sanitizer", "--lines", LINES, "--until", UNTIL)
    return [
        Part("parity", 0.26, (*threads, *pytest, *parity)),
        Part("sanitizer", 0.16, sanitizer),
        Part("attention", 0.22, suites("attention")),
        Part("norms", 0.1, suites("norms")),
        Part("pointwise", 0.12, suites("gelu", "dropout", "embedding")),
        Part("losses", 0.06, suites("losses")),
        Part("optimizer", 0.08, suites("optimizer")),
        start_for(scale),
        *steps_for(scale, peer_path),
    ]


def start_for(scale: str) -> Part:
    """The part of the start: the quickstart, which is small on any device."""
    command = (sys.executable, "-m", "fastgpt", "bench", "start", "configs/quickstart.yaml")
    command += STEP_SETTINGS["toy"] if scale == "toy" else ()
    rounds = {"gpu": "2", "cpu": "5", "toy": "1"}[scale]
    return Part("start", 0.12, (*command, "--rounds", rounds, "--lines", LINES, "--until", UNTIL))


def steps_for(scale: str, peer_path: str | None) -> list[Part]:
    """The parts of whole training updates; on a GPU one contender after the other, as its memory may ask for."""
    parts = []
    for name, step in STEPS.items():
        if scale == "cpu" and name not in STEPS_ON_A_CPU:
            continue
        contenders = {"gpu": step.gpu, "cpu": "ours,plain,plain-fp32,transformers", "toy": step.toy}[scale]
        command = (sys.executable, "-m", "fastgpt", "bench", "step", f"configs/{name}.yaml", *STEP_SETTINGS[scale])
        if peer_path and name == "gpt2-124m":
            contenders += f",{PEERS_OF_A_PATH[scale]}"
            command += ("--peer-path", peer_path)
        command += ("--contenders", contenders, "--lines", LINES, "--until", UNTIL)
        command += ("--one-at-a-time",) if scale == "gpu" else ()
        command += ("--rounds", "3") if scale == "toy" else ()
        parts.append(Part(f"step-{name}", step.share, command))
    return parts


def scales_for(scale: str) -> list[Part]:
    """The parts of `make gpu-scale`: on a GPU one rank, elsewhere two as well, with toys."""
    parts = []
    for name, (share, settings, more, engines) in SCALES.items():
        command = (sys.executable, "-m", "fastgpt", "bench", "scale", f"configs/{settings}.yaml")
        command += (*STEP_SETTINGS["gpu" if scale == "gpu" else "toy"], *more, "--engines", engines)
        command += ("--ranks", "1" if scale == "gpu" else "1,2", "--rounds", "5" if scale == "gpu" else "1")
        parts.append(Part(name, share, (*command, "--lines", LINES, "--until", UNTIL)))
    return parts


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts that were asked for."""
    usual = [part.name for part in parts_for("toy", None)]
    known = [*usual, *SCALES]
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=known, metavar="PART", help=", ".join(known))
    parser.add_argument("--scaling", action="store_true", help="the parts of ZeRO beside one engine, and no others")
    parser.add_argument("--seconds", type=positive, default=SECONDS, help="for all parts together")
    parser.add_argument("--out", type=Path, default=os.environ.get("OUT", ROOT / "benchmarks" / "results"))
    parser.add_argument("--scale", choices=("gpu", "cpu", "toy"), help="gpu where there is one, else toy")
    parser.add_argument("--contenders", type=table.chosen, help="a comma-separated choice, for the kernels")
    parser.add_argument("--peer-path", help="a folder with nanoGPT's model.py, to be measured beside a step")
    parser.add_argument("--commit", help="where git is not at hand to tell")
    parser.add_argument("--gate", action="store_true", help="exit with 1 also where a goal that was measured is missed")
    chosen = parser.parse_args(arguments)
    if problem := against_folder(Path(chosen.out)):
        parser.error(f"--out is {chosen.out}, which cannot be written to: {problem}")
    if chosen.peer_path:
        chosen.peer_path = str(Path(chosen.peer_path).resolve())
    found = describe()
    scale = chosen.scale or ("gpu" if found["kind"] == "gpu" else "toy")
    if scale == "gpu" and found["kind"] != "gpu":
        parser.error("--scale is gpu, and PyTorch sees none")
    parts = [*parts_for(scale, chosen.contenders, chosen.peer_path), *scales_for(scale)]
    wanted = chosen.parts or (SCALES if chosen.scaling else usual)
    parts = [part for part in parts if part.name in wanted]
    path, record = open_record(Path(chosen.out), found, scale, chosen.commit or environment.commit())
    passed = run(parts, chosen.seconds, path, record)
    print("\n" + "\n".join(table.summary(record)) + f"\nresults: {path}")
    missed = chosen.gate and any(verdict["reached"] is False for verdict in record["goals"])
    return 0 if passed and not missed else 1


def positive(text: str) -> float:
    """A number of seconds."""
    with contextlib.suppress(ValueError):
        if 0.0 < float(text) < math.inf:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a positive number of seconds")


def against_folder(folder: Path) -> str | None:
    """Why no file can be written into a folder, which is made where there is none; None where one can."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return error.strerror


def describe() -> Record:
    """The environment, asked by a process of its own."""
    command = [sys.executable, "-m", "benchmarks.environment"]
    found: Record = json.loads(subprocess.run(command, cwd=ROOT, env=child_environment(), check=True, stdout=-1).stdout)
    return found


def child_environment() -> dict[str, str]:
    """This environment, with the sources first: the packages may be installed, or not."""
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(path for path in paths if path), "PYTHONUNBUFFERED": "1"}


def open_record(folder: Path, found: Record, scale: str, commit: str) -> tuple[Path, Record]:
    """The results file, and what it holds already of this device, day and commit."""
    now = datetime.datetime.now(datetime.UTC)
    date = str(now.date())
    # toys are no measurements: they must not take the place of one
    device = found["device"] + (" toy" if scale == "toy" else "")
    path = folder / results.file_name(device, date, commit)
    record = results.read(path) or {"format": results.FORMAT, "parts": {}}
    record |= {"device": found["device"], "kind": found["kind"], "scale": scale, "date": date, "commit": commit}
    return path, record | {"written": now.isoformat(timespec="seconds"), "environment": found, "goals": []}


def run(parts: Sequence[Part], seconds: float, path: Path, record: Record) -> bool:
    """Run parts one after another within so many seconds, and keep what they find.

    Returns:
        Whether each passed that could be measured here, and one could.
    """
    end = time.monotonic() + seconds
    for part in parts:
        record["parts"].pop(part.name, None)
    for number, part in enumerate(parts):
        # what one leaves of its time is for those after it
        shares = sum(later.share for later in parts[number:])
        limit = max(0.0, end - time.monotonic()) * part.share / shares
        print(f"\n{part.name}: {limit:.0f} s", flush=True)

        def keep(found: Record, name: str = part.name) -> None:
            record["parts"][name] = found
            record["goals"] = goals.of_record(record)
            record["written"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            results.write(path, record)

        run_part(part, limit, keep)
    outcomes = [record["parts"][part.name]["outcome"] for part in parts]
    return all(map(ended_well, outcomes)) and "passed" in outcomes


def run_part(part: Part, limit: float, keep: Callable[[Record], Any]) -> None:
    """Run a part for at most so many seconds; `keep` is given what it has found, now and then and at the end."""
    start = time.time()
    about = {"started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "limit": limit}
    until = start + limit - min(GRACE_SHARE * limit, GRACE_SECONDS)
    with tempfile.TemporaryDirectory() as folder:
        lines = Path(folder) / "lines.jsonl"

        def look(outcome: str) -> Record:
            seconds = time.time() - start
            return {"outcome": outcome, **about, "seconds": seconds, **results.part_of(results.lines_of(lines))}

        filled = [{LINES: str(lines), UNTIL: str(until)}.get(word, word) for word in part.command]
        with started(filled) as process:
            while process.poll() is None and time.time() < start + limit:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(min(LOOK_EVERY, max(0.05, start + limit - time.time())))
                keep(look("stopped with the command"))
            code = process.poll()
        found = look("")
        keep(found | {"outcome": outcome_of(code, limit, found)})


@contextlib.contextmanager
def started(command: Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
    """A process that ends with the block, and with it all that it started."""
    process = subprocess.Popen(command, cwd=ROOT, env=child_environment(), start_new_session=True)
    try:
        yield process
    finally:
        # also where it has ended by itself: what it leaves behind would run beside the next part
        kill_session(process.pid)
        process.wait()


def kill_session(leader: int) -> None:
    """Kill the processes of a session: the leader's group, and on Linux the other groups as well."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)
    killed: set[int] = set()
    while found := set(session(leader)) - killed:  # some may begin while others are looked for
        killed |= found
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def session(leader: int) -> Iterator[int]:
    """The processes of a session, as Linux lists them."""
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(ProcessLookupError):
            if os.getsid(int(entry.name)) == leader:
                yield int(entry.name)


def outcome_of(code: int | None, limit: float, found: Record) -> str:
    """How a part went: its exit code (None: stopped) and what it found."""
    counts = found["counts"]
    if code is None:
        return f"stopped after {limit:.0f} s"
    if code:
        return f"failed with exit code {code}"
    if counts.get(NO_TIME):
        return f"out of time: {counts[NO_TIME]} not reached in {limit:.0f} s"
    if "passed" in counts:
        return "passed"
    return f"{NOT_MEASURED}: {found['reasons'][0]}" if counts else "failed: nothing ran"


def ended_well(outcome: str) -> bool:
    """Whether a part did what it could: what cannot be measured on a machine is no failure."""
    return outcome == "passed" or outcome.startswith(NOT_MEASURED)


if __name__ == "__main__":
    # a SIGTERM, as from `timeout`, must end the parts as well
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(main())
