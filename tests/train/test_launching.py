"""Runs of several ranks, under every launcher's variables, across two "nodes", and stopped from outside."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

pytestmark = pytest.mark.distributed

Losses = Callable[[Path], dict[tuple[int, str], float]]
Command = Callable[..., subprocess.CompletedProcess[str]]
# in fp32, and with a rate at which the order of sums makes no difference that grows
SETTINGS = ("train.sample_tokens=0", "engine.zero_stage=1", "engine.precision=fp32", "train.lr=1e-3")
LONG = (*SETTINGS, "train.steps=40", "train.save_every=4", "train.eval_every=null")
TRAIN = [sys.executable, "-m", "fastgpt", "train"]
SECONDS_TO_NOTICE = 60


@pytest.fixture(scope="module")
def alone(tiny: Path, tmp_path_factory: pytest.TempPathFactory, command: Command) -> Path:
    """The long run on one rank, undisturbed."""
    run = tmp_path_factory.mktemp("alone") / "run"
    outcome = command(*TRAIN, tiny, *LONG, f"out={run}")
    assert outcome.returncode == 0, outcome.stderr
    return run


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def srun(rank: int) -> dict[str, str]:
    return {
        "SLURM_JOB_ID": "70",
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_TASKS_PER_NODE": "2",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NODEID": "0",
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank),
    }


def open_mpi(rank: int) -> dict[str, str]:
    names = ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")
    return {f"OMPI_COMM_WORLD_{name}": str(v) for name, v in zip(names, (rank, 2, rank, 2), strict=True)}


def hydra(rank: int) -> dict[str, str]:
    return {"PMI_RANK": str(rank), "PMI_SIZE": "2", "MPI_LOCALRANKID": str(rank), "MPI_LOCALNRANKS": "2"}


@contextlib.contextmanager
def started(*commands: tuple[list[str], dict[str, str]]) -> Iterator[list[subprocess.Popen[str]]]:
    """Processes with these words and environments, all of whose descendants are gone afterwards."""
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    running = [subprocess.Popen(words, env=environment, **pipes) for words, environment in commands]  # type: ignore[call-overload]
    try:
        yield running
    finally:
        for process in running:
            kill(process.pid)


def family(process: int) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(process)
        return [parent, *parent.children(recursive=True)]
    return []


def kill(process: int) -> None:
    for each in family(process):
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()


def wait_for_steps(run: Path, steps: int, processes: list[subprocess.Popen[str]]) -> None:
    deadline = time.monotonic() + 240
    metrics = run / "metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count('"train"') < steps:
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in processes), [p.communicate()[1] for p in processes]
        time.sleep(0.02)


def steps_of(run: Path) -> list[int]:
    records = map(json.loads, (run / "metrics.jsonl").open())
    return [record["step"] for record in records if record["split"] == "train"]


@pytest.mark.parametrize(
    "launcher", [srun, pytest.param(open_mpi, marks=pytest.mark.slow), pytest.param(hydra, marks=pytest.mark.slow)]
)
def test_ranks_find_each_other_under_the_variables_of_a_launcher(
    launcher: Callable[[int], dict[str, str]],
    tiny: Path,
    tmp_path: Path,
    losses: Losses,
    alone: Path,
    environment: dict[str, str],
) -> None:
    """And no lock holds them up that was left by a start which was killed.

    DeepSpeed's own start on a CPU would compile an operation, and wait for ever for whoever seems to compile it.
    """
    lock = tmp_path / "extensions" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    run = tmp_path / "run"
    words = [*TRAIN, str(tiny), *LONG]
    # other runs of this test may go on at the same time
    meeting = {"MASTER_PORT": str(free_port()), "TORCH_EXTENSIONS_DIR": str(lock.parents[1])}
    commands = [([*words, f"out={run}"], environment | meeting | launcher(rank)) for rank in range(2)]
    with started(*commands) as ranks:
        messages = [rank.communicate(timeout=240)[1] for rank in ranks]
        assert [rank.returncode for rank in ranks] == [0, 0], messages
    assert "deepspeed engine ZeRO-1 on 2 x cpu" in messages[0] and lock.exists()
    one, two = losses(alone), losses(run)
    assert one.keys() == two.keys()
    assert max(abs(one[key] - two[key]) for key in one) <= 1e-5


def test_a_run_on_two_nodes_survives_the_loss_of_one(
    tiny: Path, tmp_path: Path, losses: Losses, alone: Path, command: Command, environment: dict[str, str]
) -> None:
    run = tmp_path / "run"
    hosts, port = tmp_path / "hostfile", str(free_port())
    hosts.write_text("node-a slots=1\nnode-b slots=1\n")

    def node(number: int) -> tuple[list[str], dict[str, str]]:
        place = ["--hostfile", str(hosts), "--no_ssh", "--node_rank", str(number)]
        meeting = ["--master_addr", "127.0.0.1", "--master_port", port]
        words = ["deepspeed", *place, *meeting, "--module", "fastgpt", "train", str(tiny), *LONG, f"out={run}"]
        return words, environment

    with started(node(0), node(1)) as nodes:
        wait_for_steps(run, 10, nodes)
        kill(nodes[1].pid)
        gone = time.monotonic()
        messages = nodes[0].communicate(timeout=SECONDS_TO_NOTICE + 60)[1]
        assert time.monotonic() - gone < SECONDS_TO_NOTICE
        assert nodes[0].returncode != 0
    (line,) = re.findall("fastgpt: error.*", messages)
    assert "fastgpt: error on rank 0: another rank died or cannot be reached (" in line
    assert "The same command goes on from the newest checkpoint" in line
    assert "Traceback" not in messages
    reached = steps_of(run)[-1]
    assert 10 <= reached < 40

    outcome = command(*TRAIN, tiny, *LONG, f"out={run}")  # on the node that is left
    assert outcome.returncode == 0, outcome.stderr
    assert "going on from" in outcome.stderr
    assert steps_of(run) == list(range(1, 41))
    one, two = losses(alone), losses(run)
    assert max(abs(one[key] - two[key]) for key in one) <= 1e-5


def test_sigterm_to_the_deepspeed_command_saves_and_ends_every_rank(
    tiny: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    run = tmp_path / "run"
    settings = [*SETTINGS, "train.steps=100000", "train.eval_every=null", "train.save_every=null", f"out={run}"]
    words = ["deepspeed", "--num_gpus", "2", "--master_port", str(free_port()), "--module", "fastgpt", "train"]
    with started(([*words, str(tiny), *settings], environment)) as (runner,):
        wait_for_steps(run, 3, [runner])
        everyone = family(runner.pid)
        assert len(everyone) >= 4  # the runner, launch.py, two ranks
        os.kill(runner.pid, signal.SIGTERM)
        _, alive = psutil.wait_procs(everyone, timeout=60)
        assert not alive
    (checkpoint,) = (run / "checkpoints").glob("step-*")
    assert int(checkpoint.name.removeprefix("step-")) == steps_of(run)[-1]


def test_ranks_that_do_not_meet_say_so_in_a_line(tiny: Path, tmp_path: Path, environment: dict[str, str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(taken.getsockname()[1])}
        words = [*TRAIN, str(tiny), *SETTINGS, f"out={tmp_path / 'run'}"]
        with started((words, environment | place | srun(0))) as (rank,):
            _, messages = rank.communicate(timeout=120)
    assert rank.returncode == 2, messages
    (line,) = [line for line in messages.splitlines() if line.startswith("fastgpt: error")]
    assert f"the 2 ranks did not meet at 127.0.0.1:{place['MASTER_PORT']} (MASTER_ADDR, MASTER_PORT)" in line
    assert "Traceback" not in messages and not (tmp_path / "run").exists()
