"""`fastgpt bench data` at toy size: every shape, everybody, on one core."""

import os
import sys
import time

import pytest

from benchmarks import data, goals, report, results
from benchmarks.shapes import DATA, REAL_BATCH
from fastgpt.cli import main

CONTENDERS = ["shards", "prefetch", "memmap"]


@pytest.fixture(scope="module")
def measured(command, tmp_path_factory):
    """The results of a run, and what it printed."""
    folder = tmp_path_factory.mktemp("measured")
    words = ["--toy", "--rounds", "2", "--out", folder, "--commit", "abc1234"]
    done = command(sys.executable, "-m", "fastgpt", "bench", "data", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.iterdir()
    return results.read(path), done.stdout


def test_every_shape_is_measured_by_everybody(measured):
    record, printed = measured
    part = record["parts"]["data"]
    assert record["scale"] == "toy" and part["outcome"] == "passed" and record["goals"] == []
    assert {update.context for update in DATA} == {64, 256, 1024}
    assert {update.micro_batch_size for update in DATA} == {1, 8, 64}
    assert [(row["case"], row["contender"]) for row in part["benchmarks"]] == [
        (update.name, name) for update in DATA for name in CONTENDERS
    ]
    for row in part["benchmarks"]:
        assert row["tokens_per_second"] == row["tokens"] / row["median"] and row["rounds"] == 2
        assert row["core_median"] > 0 and row["min"] <= row["median"]
    assert part["session"]["threads"] == 1 and part["session"]["core"] == max(os.sched_getaffinity(0))
    assert printed.strip().splitlines()[-2:-1] == ["data: passed"]


def test_the_page_has_a_table_of_the_data_path_and_its_goals(measured):
    record, _ = measured
    page = report.page([record | {"scale": "cpu", "kind": "cpu"}])
    assert "### Data" in page and "### data" not in page
    assert all(f"| {update.name} | {update.tokens:,} |" in page for update in DATA)
    real = [update for update in DATA if update.tokens >= REAL_BATCH]
    assert len(real) == 9
    for update in real:
        assert f"| data {update.name} batch: million tokens/s | 20 | " in page


def test_goals_of_the_data_path_are_of_what_training_consumes():
    about = {"operation": "data", "direction": "batch", "case": "8 x 1 x 1024"}
    rows = [about | {"contender": "shards", "tokens_per_second": 5e7, "median": 1.0}]
    rows += [about | {"contender": "prefetch", "tokens_per_second": 1.9e7, "median": 1.0}]
    (verdict,) = (v for v in goals.judge(rows, "cpu") if v["measured"] is not None)
    assert verdict["measured"] == 19 and verdict["reached"] is False


def test_the_process_may_use_its_cores_again_afterwards():
    before = os.sched_getaffinity(0)
    with data.on_one_core() as core:
        assert os.sched_getaffinity(0) == {core}
    assert os.sched_getaffinity(0) == before


def test_time_that_is_over_ends_the_run_between_shapes(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "TOY_TOKENS", 2**17)
    path = tmp_path / "lines.jsonl"
    assert data.run(toy=True, rounds=1, lines=path, until=time.time()) == 0
    assert results.lines_of(path) == []


def test_a_contender_that_gives_other_rows_is_found(tmp_path, monkeypatch):
    shards = data.random_shards(tmp_path, 2**17)
    data.check(shards, DATA[0])
    monkeypatch.setattr(data.ShardSource, "positions", lambda self, samples: samples * 0)
    data.check(shards, DATA[0])  # another order is no other text
    monkeypatch.setattr(type(shards), "gather", lambda self, starts, length: data.np.zeros((len(starts), length), int))
    with pytest.raises(AssertionError):
        data.check(shards, DATA[0])


def test_rounds_below_one_are_refused(tmp_path, capsys):
    assert main(["bench", "data", "--rounds", "0", "--out", str(tmp_path)]) == 2
    assert "--rounds must be at least 1, not 0" in capsys.readouterr().err
    assert main(["bench", "data", "train.lr=3", "--out", str(tmp_path)]) == 2
    assert "train.lr=3 is not an argument" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
