"""A run that was killed and started again gives the same losses, bit for bit, as one left alone."""

import contextlib
import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

Losses = Callable[[Path], dict[tuple[int, str], float]]
Command = Callable[..., subprocess.CompletedProcess[str]]

STEPS = 40
# two runs are compared: on a busy machine `auto` may choose bf16 for one of them and fp32 for the other
PRECISION = "engine.precision=bf16"
SETTINGS = (f"train.steps={STEPS}", "train.save_every=5", "train.eval_every=10", "train.sample_tokens=0", PRECISION)


@pytest.fixture(scope="module")
def alone(tiny: Path, tmp_path_factory: pytest.TempPathFactory, command: Command) -> Path:
    """A run of one process that nobody disturbs."""
    run = tmp_path_factory.mktemp("alone") / "run"
    outcome = command(*launcher(None), tiny, *SETTINGS, f"out={run}")
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    return run


def launcher(stage: int | None) -> list[str]:
    alone = [sys.executable, "-m", "fastgpt", "train"]
    pair = ["torchrun", "--nproc-per-node", "2", "-m", "fastgpt", "train"]
    return alone if stage is None else pair


def kill_at(words: list[str], metrics: Path, lines: int, environment: dict[str, str]) -> None:
    """Start a command and SIGKILL all its processes once its metrics have so many lines."""
    process = subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 600
        while not metrics.exists() or metrics.read_bytes().count(b"\n") < lines:
            assert process.poll() is None, "the run ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.002)
    finally:
        # torchrun gives each rank a session of its own: a signal to one group would leave the others running
        launcher = psutil.Process(process.pid)
        for each in (launcher, *launcher.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        process.wait()


def recorded(run: Path) -> set[tuple[int, str]]:
    """The whole lines of a file whose last one may be torn."""
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    return {(r["step"], r["split"]) for r in records}


@pytest.mark.parametrize(
    ("stage", "kills"),
    [
        (None, 2),
        pytest.param(3, 1, marks=pytest.mark.distributed),
        # also the loss of a node, of a stage 1: test_launching.py
        pytest.param(1, 2, marks=[pytest.mark.distributed, pytest.mark.slow]),
        pytest.param(3, 2, marks=[pytest.mark.distributed, pytest.mark.slow]),
    ],
)
def test_a_killed_run_ends_as_one_left_alone(
    stage: int | None,
    kills: int,
    tiny: Path,
    tmp_path: Path,
    alone: Path,
    command: Command,
    losses: Losses,
    environment: dict[str, str],
) -> None:
    words = [*launcher(stage), str(tiny), *SETTINGS, f"engine.zero_stage={stage or 0}"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    if stage is None:
        whole = alone
    else:
        outcome = command(*words, f"out={whole}")
        assert (STEPS, "train") in losses(whole), outcome.stderr[-3000:]

    again = [*words, f"out={killed}"]
    lines = sorted(random.Random(time.time_ns()).sample(range(8, STEPS - 8), kills))
    print("killed after lines", lines)
    for number in lines:
        kill_at(again, killed / "metrics.jsonl", number, environment)
        assert (STEPS, "train") not in recorded(killed)
    command(*again)
    assert losses(killed) == losses(whole)


@pytest.mark.slow
@pytest.mark.distributed
def test_48_layers_sharded_and_recomputed_end_as_ones_left_alone(
    tiny: Path, tmp_path: Path, command: Command, losses: Losses, environment: dict[str, str]
) -> None:
    """GPT-2's deepest stack, narrow, each block computed twice.

    ZeRO-3 shards masters, moments and gradients; parameters of less than 100,000 elements DeepSpeed keeps gathered.
    """
    deep = ("model.n_layer=48", "model.n_embd=128", "model.n_head=4", "train.activation_checkpointing=true")
    settings = ("train.steps=9", "train.save_every=2", "train.eval_every=null", "train.eval_tokens=256")
    fewer = ("train.batch_tokens=128", "train.sample_tokens=0", "train.lr=1e-3", "engine.zero_stage=3", PRECISION)
    words = [*launcher(3), str(tiny), *deep, *settings, *fewer]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    outcome = command(*words, f"out={whole}", timeout=1200)
    undisturbed = losses(whole)
    assert (9, "train") in undisturbed, outcome.stderr[-3000:]
    assert undisturbed[9, "validation"] < undisturbed[0, "validation"]

    again = [*words, f"out={killed}"]
    lines = random.Random(time.time_ns()).randrange(4, 9)
    print("killed after lines", lines)
    kill_at(again, killed / "metrics.jsonl", lines, environment)
    assert (9, "train") not in recorded(killed)
    outcome = command(*again, timeout=1200)
    assert "going on from" in outcome.stderr
    assert losses(killed) == undisturbed


def test_a_damaged_newest_checkpoint_costs_only_its_steps(
    tiny: Path, tmp_path: Path, alone: Path, command: Command, losses: Losses, environment: dict[str, str]
) -> None:
    run = tmp_path / "run"
    words = [*launcher(None), str(tiny), *SETTINGS, f"out={run}"]
    kill_at(words, run / "metrics.jsonl", 20, environment)
    newest = sorted((run / "checkpoints").glob("step-*"))[-1]
    with (newest / "state-00000.safetensors").open("r+b") as file:
        file.seek(5000)
        file.write(b"\x55" * 64)
    outcome = command(*words)
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    assert f"passing over a damaged checkpoint: {newest}" in outcome.stderr
    assert losses(run) == losses(alone)


def test_sigterm_saves_and_the_same_command_goes_on(
    tiny: Path, tmp_path: Path, alone: Path, command: Command, losses: Losses, environment: dict[str, str]
) -> None:
    run = tmp_path / "run"
    words = [*launcher(None), str(tiny), *SETTINGS, "train.save_every=null", f"out={run}"]
    process = subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    metrics = run / "metrics.jsonl"
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < 7:
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + signal.SIGTERM
    assert "stopped by SIGTERM after step" in errors
    assert "Traceback" not in errors
    outcome = command(*words)
    assert "going on from" in outcome.stderr
    assert losses(run) == losses(alone)
