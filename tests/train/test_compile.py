"""`fastgpt train` with engine.compile: what a user sees, and what a second start finds."""

import json
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastgpt.cli import main
from fastgpt.engine.base import Update
from fastgpt.ramp import BatchSizes
from fastgpt.train.watchers import FirstUpdate, Measured

PROGRAM = Path(__file__).with_name("compile_program.py")
Losses = Callable[[Path], dict[tuple[int, str], float]]


def test_a_machine_without_a_cpp_compiler_is_one_line(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from torch._inductor import config

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    with config.patch({"cpp.cxx": (None, "no-such-g++")}), torch.compiler.config.patch(cache_key_tag=""):
        assert main(["train", str(tiny), f"out={tmp_path / 'run'}", "engine.compile=true"]) == 2
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith(
        "fastgpt: error: engine.compile: needs a C++ compiler on a CPU, and no-such"
    )
    assert "Traceback" not in error
    assert not (tmp_path / "run").exists()


def test_the_time_of_the_first_update_of_a_start_is_told(caplog: pytest.LogCaptureFixture) -> None:
    watcher = FirstUpdate(BatchSizes(6000, 600, 10**6))  # a ramp: the first updates are smaller than those later on
    watcher.begin(7)
    assert [step for step in range(7, 12) if watcher.looks_at(step)] == [8], "others need not wait for the device"
    with caplog.at_level(logging.INFO, logger="fastgpt"):
        for step, rate in ((8, 20.0), (9, 100.0)):
            update = Update(step, loss=1.0, grad_norm=1.0, learning_rate=0.1, applied=True)
            watcher.after(Measured(update, tokens=600 * step, tokens_per_second=rate))
    assert [record.message for record in caplog.records] == [
        "engine.compile: the first update, with compiling, took 30.0 s"
    ]


@pytest.mark.slow
def test_a_second_start_compiles_nothing_and_gives_the_same_bits(
    tiny: Path, tmp_path: Path, environment: dict[str, str], losses: Losses
) -> None:
    ours = {k: v for k, v in environment.items() if k not in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")}
    ours |= {"XDG_CACHE_HOME": str(tmp_path / "cache")}

    def start(name: str, kernels: str, *words: str) -> tuple[dict[str, Any], str]:
        results = tmp_path / f"{name}.json"
        command = [sys.executable, PROGRAM, results, kernels, tiny, f"out={tmp_path / name}", "engine.compile=true"]
        done = subprocess.run([*command, *words], env=ours, capture_output=True, text=True, timeout=600)
        assert results.exists(), done.stderr[-4000:]
        found: dict[str, Any] = json.loads(results.read_text())
        assert found["code"] == 0 and found["stats"]["unique_graphs"] == 2
        return found, done.stderr

    first, told = start("first", "-")
    assert (first["aot_autograd"]["autograd_cache_miss"], first["inductor"]["fxgraph_cache_miss"]) == (2, 4)
    assert f"the first update compiles the blocks; compiled code is kept in {tmp_path / 'cache'}" in told
    assert "engine.compile: the first update, with compiling, took " in told

    second, _ = start("second", "-")
    assert second["aot_autograd"]["autograd_cache_hit"] == 2
    assert second["inductor"]["fxgraph_cache_hit"] == 4
    assert "autograd_cache_miss" not in second["aot_autograd"]
    assert "fxgraph_cache_miss" not in second["inductor"]
    assert losses(tmp_path / "second") == losses(tmp_path / "first")

    # a run that is gone on with, from the checkpoint of update 8
    start("resumed", "-", "train.steps=8", "train.schedule=constant")
    start("resumed", "-", "train.schedule=constant")
    start("whole", "-", "train.schedule=constant")
    assert (
        losses(tmp_path / "resumed").items()
        >= {at: loss for at, loss in losses(tmp_path / "whole").items() if at[1] == "train"}.items()
    )

    # PyTorch knows our operations by their names: of others it must not take the graphs
    other, _ = start("other", "other-kernels")
    assert (other["aot_autograd"]["autograd_cache_miss"], other["inductor"]["fxgraph_cache_miss"]) == (2, 4)
