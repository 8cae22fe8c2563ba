"""`fastgpt bench profile` at toy size: every part of an update is counted, once, with the right kind of work."""

import sys
from pathlib import Path

import pytest

from benchmarks import profile, profile_table, results
from fastgpt.cli import main
from fastgpt.settings import load_config

SETTINGS = """\
out: runs/toy
model: {n_layer: 2, n_head: 2, n_embd: 32, context: 32, vocab_size: 400}
data: {path: nowhere}
train: {steps: 9, batch_tokens: 128, micro_batch_size: 2, lr: 1e-2}
engine: {threads: 1, precision: fp32, device: cpu}
"""


class Event:
    """An operation as the profiler tells of it."""

    def __init__(self, name, microseconds=0.0, parent=None):
        self.name, self.self_cpu_time_total, self.cpu_parent = name, microseconds, parent


@pytest.fixture(scope="module")
def measured(command, tmp_path_factory):
    """A results file, and what was printed."""
    folder = tmp_path_factory.mktemp("profile")
    (folder / "toy.yaml").write_text(SETTINGS)
    words = ["--rounds", "2", "--commit", "abc1234", "--out", folder / "results"]
    done = command(sys.executable, "-m", "fastgpt", "bench", "profile", folder / "toy.yaml", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = (folder / "results").iterdir()
    return results.read(path), done.stdout


def test_every_kind_of_work_is_measured_and_the_shares_are_the_whole(measured):
    record, printed = measured
    part = record["parts"]["profile-toy"]
    rows = {row["contender"]: row for row in part["benchmarks"]}
    expected = {"matrix products", "attention", "cross-entropy", "normalisation", "GELU", "optimizer", "embedding"}
    assert expected | {profile.HOST} <= set(rows)
    assert sum(row["share"] for row in rows.values()) == pytest.approx(1, abs=0.2)  # medians of two rounds
    assert [row["median"] for row in part["benchmarks"]] == sorted((r["median"] for r in rows.values()), reverse=True)
    assert "profile of toy T=32: of " in printed and "matrix products" in printed


def test_the_matrix_products_are_compared_with_the_roof(measured, tmp_path):
    record, _ = measured
    part = record["parts"]["profile-toy"]
    (row,) = [row for row in part["benchmarks"] if "work" in row]
    (tmp_path / "toy.yaml").write_text(SETTINGS)
    # 6 operations for each weight of a matrix and token: two blocks of 12 C^2, the output matrix of 400 C
    assert row["work"] == 6 * (2 * 12 * 32**2 + 400 * 32) * 128
    assert row["work"] == profile.product_flops(load_config(tmp_path / "toy.yaml"))
    assert row["roof_share"] == pytest.approx(row["work"] / row["median"] / part["session"]["gemm"])
    page = "\n".join(profile_table.section(part["benchmarks"]))
    assert "### Profile" in page and f"{row['roof_share']:.1%}" in page


def test_operations_count_with_what_is_around_them():
    attention = Event("fastgpt::attention_in_blocks")
    backward = Event("autograd::engine::evaluate_function: AddmmBackward0")
    linear = Event("aten::linear")
    assert profile.kind_of(Event("aten::bmm", parent=attention)) == "attention"
    assert profile.kind_of(Event("aten::mm", parent=backward)) == profile.PRODUCTS
    assert profile.kind_of(Event("aten::copy_", parent=linear)) == profile.PRODUCTS
    assert profile.kind_of(Event("aten::sum", parent=backward)) == "bias gradients"
    assert profile.kind_of(Event("aten::copy_", parent=Event("Optimizer.step#FusedAdamW.step"))) == "optimizer"
    assert profile.kind_of(Event("aten::add_")) == "sums and copies"
    assert profile.kind_of(Event("aten::arange")) == profile.OTHER


def test_what_no_operation_takes_is_between_them():
    events = [Event("aten::mm", 3e5), Event("aten::mm", 1e5), Event("aten::gelu", 2e5)]
    assert profile.by_kind(events, 1.0, on_gpu=False) == pytest.approx(
        {profile.PRODUCTS: 0.4, "GELU": 0.2, profile.HOST: 0.4}
    )


def test_a_mistake_is_one_line(tmp_path: Path, capsys):
    (tmp_path / "toy.yaml").write_text(SETTINGS)
    assert main(["bench", "profile", str(tmp_path / "toy.yaml"), "--rounds", "0", "--out", str(tmp_path / "x")]) == 2
    assert capsys.readouterr().err == "fastgpt: error: --rounds must be at least 1, not 0\n"
    assert not (tmp_path / "x").exists()
