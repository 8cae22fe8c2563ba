"""`fastgpt bench start` with a run of seconds: what it measures, and what it tells of a run that cannot start."""

import json
import sys

import pytest

from benchmarks import goals, report, results, start, start_table
from fastgpt.cli import main


@pytest.fixture(scope="module")
def measured(command, tiny, tmp_path_factory):
    """The results of one round, and what it printed."""
    folder = tmp_path_factory.mktemp("measured")
    words = [tiny, "train.steps=400", "--rounds", "1", "--out", folder, "--commit", "abc1234"]
    done = command(sys.executable, "-m", "fastgpt", "bench", "start", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.iterdir()
    return results.read(path), done.stdout


def test_help_and_the_first_update_are_measured(measured):
    record, printed = measured
    part = record["parts"]["start"]
    assert record["scale"] == "toy" and part["outcome"] == "passed"
    helped, run = part["benchmarks"]
    assert (helped["case"], helped["rounds"]) == ("help", start.HELP_ROUNDS)
    assert (run["case"], run["direction"], run["rounds"]) == ("tiny", "first update", 1)
    assert helped["median"] < run["median"] and run["settings"] == ["train.steps=400"]
    assert printed.strip().splitlines()[-2] == "start: passed"


def test_the_laps_of_a_start_are_all_there_and_the_update_is_apart(measured):
    record, _ = measured
    run = record["parts"]["start"]["benchmarks"][1]
    assert list(run["split"]) == list(dict.fromkeys(run["split"])) and set(run["split"]) == set(start_table.PARTS)
    assert all(seconds >= 0 for seconds in run["split"].values()) and run["split"]["first update"] > 0
    names = list(run["imports"])
    assert {"torch", "numpy", "fastgpt", "Python's own"} <= set(names) and names[0] == "torch"
    assert "sympy" not in names, "PyTorch's compiler is loaded"


def test_the_page_has_a_table_of_starts_and_their_goals(measured):
    record, _ = measured
    page = report.page([record | {"scale": "cpu", "kind": "cpu"}])
    assert "### Start" in page and "| tiny | " in page and "**tiny**: `train.steps=400`." in page
    assert "| start help help: seconds, at most | 0.5 | " in page
    assert "| start quickstart first update: seconds, at most | 10 | not measured |" in page


@pytest.mark.parametrize("kind", ["cpu", "gpu"])
def test_a_start_may_take_so_long_and_no_longer(kind):
    def row(case, direction, seconds):
        return {"operation": "start", "case": case, "direction": direction, "contender": "ours", "median": seconds}

    rows = [row("help", "help", 0.5), row("quickstart", "first update", 10.1)]
    reached = {v["goal"]: v["reached"] for v in goals.judge(rows, kind) if v["measured"] is not None}
    assert reached == {
        "start help help: seconds, at most": True,
        "start quickstart first update: seconds, at most": False,
    }


def test_a_run_that_cannot_start_says_why(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(start, "HELP_ROUNDS", 1)
    path = tmp_path / "lines.jsonl"
    assert start.run(str(tiny), ["data.path=/nowhere/text.txt"], rounds=1, lines=path) == 1
    _, run = results.lines_of(path)
    assert run["outcome"] == "failed" and "exit code 2: fastgpt: error: /nowhere/text.txt" in run["reason"]


def test_time_that_is_over_begins_no_run(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(start, "HELP_ROUNDS", 1)
    monkeypatch.setattr(start, "seconds_to_first_update", None)  # a call would fail
    path = tmp_path / "lines.jsonl"
    assert start.run(str(tiny), rounds=1, lines=path, until=0.0) == 0
    part = results.part_of(results.lines_of(path))
    assert part["counts"] == {"passed": 1, "no time left": 1}


def test_a_line_in_the_writing_is_no_update_yet(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert not start.has_first_update(path)
    validated, updated = (json.dumps({"step": n, "split": split}) for n, split in ((0, "validation"), (1, "train")))
    path.write_text(f"{validated}\n{updated}")
    assert not start.has_first_update(path)
    path.write_text(f"{validated}\n{updated}\n")
    assert start.has_first_update(path)


def test_imports_are_counted_by_package():
    printed = (
        "import time: self [us] | cumulative | imported package\nimport time:       100 |        100 |   torch._C\n"
        "import time:      2000 |       2100 | torch\nimport time:        30 |         30 | json.decoder\nother words\n"
    )
    assert start.import_seconds(printed) == {"torch": 0.0021, "Python's own": 0.00003}


def test_rounds_below_one_are_refused(tiny, tmp_path, capsys):
    assert main(["bench", "start", str(tiny), "--rounds", "0", "--out", str(tmp_path)]) == 2
    assert "--rounds must be at least 1, not 0" in capsys.readouterr().err
    assert main(["bench", "start", str(tiny), "train.stepz=1", "--out", str(tmp_path)]) == 2
    assert "train.stepz is not a setting" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
