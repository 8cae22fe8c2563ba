"""`fastgpt ablate` as a user runs it: a whole study, one that is stopped, and one that cannot be."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from fastgpt.ablate.jobs import Job, Stopped, carry_out
from fastgpt.ablate.lock import locked
from fastgpt.cli import main
from fastgpt.errors import UserError
from tests.ablate.study import settings, write_examples
from tests.conftest import ROOT

Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def folder(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study's settings, `study.yaml`, and those of its model."""
    made = tmp_path_factory.mktemp("study")
    small = yaml.safe_load(tiny.read_text().replace("1e-2", "1.0e-2"))
    small["train"] |= {"steps": 2, "eval_every": None, "sample_tokens": 0, "save_every": 2}
    small["engine"]["precision"] = "fp32"
    (made / "small.yaml").write_text(yaml.safe_dump(small))
    write_study(made)
    return made


def write_study(folder: Path, **more: Any) -> None:
    sst2 = folder / "sst2.tsv"
    sst2.write_text("sentence\tlabel\n" + "".join(f"w{i} w{i + 1}\t{i % 2}\n" for i in range(6)))
    tree = settings(folder, seeds=[1], jobs=2, zero_shot={"heuristics": {"sst2": str(sst2)}}, **more)
    del tree["tasks"]["second"]
    tree["layers"] = {"tasks": ["first"], "blocks": [2]}
    (folder / "study.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))


def test_a_study_trains_fine_tunes_scores_and_tells_and_repeats_nothing(folder: Path, command: Command) -> None:
    words = (sys.executable, "-m", "fastgpt", "ablate", folder / "study.yaml")
    outcome = command(*words)
    assert outcome.returncode == 0, outcome.stderr
    study = folder / "study"
    assert (study / "tables.md").read_text() in outcome.stdout
    rows = (study / "rows.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in rows] == ["row", "full", "no auxiliary LM"]
    results = {path: json.loads(path.read_text()) for path in study.glob("cells/*/*/*/result.json")}
    assert len(results) == 2  # all blocks transferred is the row itself
    for path, result in results.items():
        summary = json.loads((path.parent / "run" / "summary.json").read_text())
        assert result["score"] == summary["best"]["accuracy"]
        assert not (path.parent / "run" / "checkpoints").exists() and not (path.parent / "run" / "best").exists()
    curve = (study / "zero-shot.csv").read_text().splitlines()
    assert [line.split(",")[3] for line in curve] == ["updates", "0", "2"]
    for name in ("layers.csv", "layers.png", "layers.svg", "zero-shot.png", "zero-shot.svg", "results.json"):
        assert (study / name).stat().st_size > 0

    kept = {path: path.stat().st_mtime_ns for path in study.rglob("metrics.jsonl")}
    again = command(*words)
    assert again.returncode == 0, again.stderr
    assert "0 models to train, 2 fine-tunings of which 0 are to be done" in again.stderr
    assert {path: path.stat().st_mtime_ns for path in study.rglob("metrics.jsonl")} == kept


@pytest.mark.slow
def test_a_study_that_is_stopped_goes_on_where_it_was(
    folder: Path, tmp_path: Path, environment: dict[str, str], command: Command
) -> None:
    words = [sys.executable, "-m", "fastgpt", "ablate", str(folder / "study.yaml"), f"out={tmp_path}/study"]
    long = ["tasks.first.train.epochs=400", "tasks.first.train.save_every=20", "seeds=[1,2]", "zero_shot=null"]
    process = subprocess.Popen(
        [*words, *long], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 200
    while not list(tmp_path.glob("study/cells/*/*/*/run/checkpoints/step-*")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=100)
    assert process.returncode == 128 + signal.SIGTERM, said
    assert "stopped by SIGTERM" in said
    stopped = [json.loads(line)["step"] for line in next(tmp_path.rglob("cells/**/metrics.jsonl")).open()]
    outcome = command(*words, *long)
    assert outcome.returncode == 0, outcome.stderr
    results = list(tmp_path.glob("study/cells/*/*/*/result.json"))
    assert len(results) == 4
    log = next(tmp_path.rglob("cells/**/log.txt"))
    assert max(stopped) > 0 and any("going on from" in path.read_text() for path in log.parents[2].rglob("log.txt"))


def test_a_run_that_fails_is_told_and_does_not_stop_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "kernels")]))
    told: list[tuple[str, str]] = []
    jobs = [
        Job("bad", ("train", "nowhere.yaml"), tmp_path / "bad.log", lambda: "never"),
        Job("good", ("--help",), tmp_path / "good.log", lambda: "fine"),
    ]
    (failure,) = carry_out(jobs, 1, lambda job, outcome, seconds: told.append((job.label, outcome)))
    assert (failure.job.label, failure.code) == ("bad", 2)
    assert failure.reason == "nowhere.yaml: no such file."
    assert [label for label, _ in told] == ["bad", "good"] and told[1][1] == "fine"
    assert "usage: fastgpt" in (tmp_path / "good.log").read_text()


def job(folder: Path, name: str, words: tuple[str, ...] = ("--help",), finish: Callable[[], str] = str) -> Job:
    return Job(name, words, folder / f"{name}.log", finish)


def test_what_cannot_be_kept_ends_the_study_and_starts_nothing_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "kernels")]))

    def full() -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    jobs = [job(tmp_path, "kept", finish=full), *(job(tmp_path, f"waits-{i}") for i in range(20))]
    with pytest.raises(OSError, match="No space left"):
        carry_out(jobs, 1, lambda job, outcome, seconds: None)
    assert len(list(tmp_path.glob("waits-*.log"))) <= 1  # that was begun meanwhile


def test_a_run_that_is_killed_is_told_as_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed = [sys.executable, "-c", "import os; print('half way', flush=True); os.kill(os.getpid(), 9)"]
    start = subprocess.Popen
    monkeypatch.setattr("fastgpt.ablate.jobs.subprocess.Popen", lambda words, **more: start(killed, **more))
    (failure,) = carry_out([job(tmp_path, "one")], 1, lambda job, outcome, seconds: None)
    assert failure.reason == "killed by SIGKILL (the system does so for want of memory); last: half way"


@pytest.mark.parametrize(("sent", "got"), [("SIGHUP", "SIGTERM"), ("SIGINT", "SIGINT")])
def test_a_signal_ends_the_runs_so_that_they_save_and_leaves_the_logs_of_others(
    sent: str, got: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = (
        "import signal, sys; signal.pthread_sigmask(signal.SIG_BLOCK, [2, 15]); print('on', flush=True); "
        "print(signal.Signals(signal.sigwait([2, 15])).name); sys.exit(1)"
    )
    waiting = [sys.executable, "-c", program]
    start = subprocess.Popen
    monkeypatch.setattr("fastgpt.ablate.jobs.subprocess.Popen", lambda words, **more: start(waiting, **more))
    (tmp_path / "waits.log").write_text("of another time")

    def send() -> None:
        while "on" not in ((tmp_path / "one.log").read_text() if (tmp_path / "one.log").exists() else ""):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.Signals[sent])

    # as a terminal has it: whoever runs the tests may ignore the signal
    before = signal.signal(signal.Signals[sent], signal.SIG_DFL)
    try:
        threading.Thread(target=send).start()
        with pytest.raises(Stopped, match=sent):
            carry_out([job(tmp_path, "one"), job(tmp_path, "waits")], 1, lambda job, outcome, seconds: None)
    finally:
        signal.signal(signal.Signals[sent], before)
    assert (tmp_path / "one.log").read_text().split() == ["on", got]
    assert (tmp_path / "waits.log").read_text() == "of another time"


def test_what_nohup_has_ignored_stays_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = subprocess.Popen
    hangs_up = [sys.executable, "-c", f"import os; os.kill({os.getpid()}, 1)"]
    monkeypatch.setattr("fastgpt.ablate.jobs.subprocess.Popen", lambda words, **more: start(hangs_up, **more))
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert carry_out([job(tmp_path, "one")], 1, lambda job, outcome, seconds: None) == []
    finally:
        signal.signal(signal.SIGHUP, before)


def test_one_study_in_a_folder_at_a_time_also_where_runs_of_a_killed_one_go_on(tmp_path: Path) -> None:
    with locked(tmp_path / "study") as held:
        with pytest.raises(UserError, match="a study is carried out in it, or runs of one that was killed go on"):
            locked(tmp_path / "study").__enter__()
        run = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=[held])
    with pytest.raises(UserError, match="choose another 'out'"):
        locked(tmp_path / "study").__enter__()
    run.communicate(b"\n")
    with locked(tmp_path / "study"):
        pass


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("models.small=nowhere.yaml", "nowhere.yaml: no such file"),
        ("models.small=nowhere", "command line: models.small: nowhere: no such folder"),
        ("zero_shot.heuristics.sst2=nowhere.tsv", "zero_shot.heuristics.sst2: nowhere.tsv"),
        ("zero_shot.heuristics.sst3=nowhere.tsv", "'sst3' is not a heuristic; .* Did you mean sst2?"),
        ("tasks.first.task.metrics=[accurcy]", "accurcy"),
        ("rows.full.model=lstm", "rows.full.model must be one of small, not 'lstm'"),
    ],
)
def test_what_cannot_be_is_told_before_anything_is_written(
    word: str, message: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_examples(tmp_path / "train.jsonl")
    assert main(["ablate", str(folder / "study.yaml"), f"out={tmp_path}/study", word]) == 2
    said = capsys.readouterr().err
    assert re.search(message, said), said
    assert "Traceback" not in said and said.count("\n") == 1
    assert not (tmp_path / "study").exists()
