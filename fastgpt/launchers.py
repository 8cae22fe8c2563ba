"""What each launcher tells the processes that it starts, in environment variables.

torchrun and the `deepspeed` launcher set the same names; Slurm's `srun` and the launchers of MPI have their own, and
leave it to the processes to agree on a meeting point.
"""

import os
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

from fastgpt.errors import UserError

Environment = Mapping[str, str]

LOOPBACK = "127.0.0.1"
DEFAULT_PORT = 29500  # torchrun's
# Slurm's jobs take ports by their number: below those that Linux hands out by itself, which begin at 32768
SLURM_PORTS = range(12_000, 32_000)
VISIBLE = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")


class Launch(NamedTuple):
    """Who this process is among those of its run, and where they meet."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    launcher: str = "torchrun"  # or deepspeed, srun, mpirun
    master: str | None = None  # the host of rank 0, where the launcher leaves it to us
    port: int | None = None
    own_gpu: bool = False  # of its host's GPUs it sees no other than its own

    @property
    def gpu(self) -> int:
        """The number of this process's GPU among those that it sees."""
        return 0 if self.own_gpu else self.local_rank


ALONE = Launch(rank=0, world_size=1, local_rank=0, local_world_size=1, launcher="")


def find_launch() -> Launch | None:
    """What the launcher of this process says, or None where none started it.

    Raises:
        UserError: a launcher's variable is missing, or is no number.
    """
    found = (launcher(os.environ) for launcher in LAUNCHERS)
    return next((launch for launch in found if launch is not None), None)


def torchrun(environment: Environment) -> Launch | None:
    """torchrun's variables, and the `deepspeed` launcher's."""
    if "RANK" not in environment or "WORLD_SIZE" not in environment:
        return None
    world_size = _number(environment, "WORLD_SIZE", least=1)
    # the `deepspeed` launcher says LOCAL_SIZE, torchrun LOCAL_WORLD_SIZE
    local = next((name for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE") if name in environment), None)
    return Launch(
        rank=_number(environment, "RANK"),
        world_size=world_size,
        local_rank=_number(environment, "LOCAL_RANK") if "LOCAL_RANK" in environment else 0,
        local_world_size=_number(environment, local, least=1) if local else world_size,
        launcher="deepspeed" if "CROSS_SIZE" in environment else "torchrun",
    )


def srun(environment: Environment) -> Launch | None:
    """A task of a Slurm step, which the script of a batch job is not: there SLURM_PROCID is 0, and no step is."""
    if "SLURM_PROCID" not in environment or "SLURM_STEP_NUM_TASKS" not in environment:
        return None
    world_size = _number(environment, "SLURM_STEP_NUM_TASKS", least=1)
    if world_size == 1:
        return None  # as an interactive shell of salloc is
    node = _number(environment, "SLURM_NODEID")
    job, step = _number(environment, "SLURM_JOB_ID"), _number(environment, "SLURM_STEP_ID")
    return Launch(
        rank=_number(environment, "SLURM_PROCID"),
        world_size=world_size,
        local_rank=_number(environment, "SLURM_LOCALID"),
        local_world_size=tasks_of_nodes(_text(environment, "SLURM_STEP_TASKS_PER_NODE"))[node],
        launcher="srun",
        master=first_host(_text(environment, "SLURM_STEP_NODELIST")),
        port=SLURM_PORTS[(31 * job + step) % len(SLURM_PORTS)],
        own_gpu=_sees_one_gpu(environment),
    )


def open_mpi(environment: Environment) -> Launch | None:
    """A process of Open MPI's mpirun."""
    prefix = "OMPI_COMM_WORLD_"
    return _mpi(environment, prefix + "RANK", prefix + "SIZE", prefix + "LOCAL_RANK", prefix + "LOCAL_SIZE")


def hydra(environment: Environment) -> Launch | None:
    """A process of Hydra, the mpiexec of MPICH, MVAPICH and Intel MPI."""
    return _mpi(environment, "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")


# srun first: inside a Slurm job MPI's launchers start theirs through it, but a torchrun under srun counts as torchrun
LAUNCHERS: tuple[Callable[[Environment], Launch | None], ...] = (torchrun, open_mpi, hydra, srun)


def _mpi(environment: Environment, rank: str, size: str, local_rank: str, local_size: str) -> Launch | None:
    if not {rank, size, local_rank, local_size} <= set(environment):
        return None
    world_size, local_world_size = _number(environment, size, least=1), _number(environment, local_size, least=1)
    if world_size != local_world_size and "MASTER_ADDR" not in environment:
        raise UserError(
            f"mpirun started {world_size} ranks on several hosts: give them the host of rank 0 "
            "(mpirun -x MASTER_ADDR=HOST with Open MPI, mpiexec -genv MASTER_ADDR HOST with MPICH and Intel MPI)"
        )
    return Launch(
        rank=_number(environment, rank),
        world_size=world_size,
        local_rank=_number(environment, local_rank),
        local_world_size=local_world_size,
        launcher="mpirun",
        master=LOOPBACK,
        port=DEFAULT_PORT,
        own_gpu=_sees_one_gpu(environment),
    )


def _sees_one_gpu(environment: Environment) -> bool:
    """Whether a GPU was chosen for this process, as `srun --gpus-per-task 1` does and scripts around MPI's ranks do."""
    visible = [environment[name] for name in VISIBLE if environment.get(name)]
    return bool(visible) and "," not in visible[0]


def first_host(nodes: str) -> str:
    """The first of a list of hosts in Slurm's notation: gpu003 of "gpu[003-005,9],cpu1"."""
    first = re.match(r"(?:[^\[,]|\[[^\]]*\])*", nodes)
    assert first  # it matches nothing, too
    return re.sub(r"\[([^\]]*)\]", lambda match: re.split("[-,]", match[1])[0], first[0])


def tasks_of_nodes(text: str) -> list[int]:
    """How many tasks each host of a step has, from Slurm's notation: 4, 4, 3 from "4(x2),3"."""
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if not match:
            raise UserError(f"the environment variable SLURM_STEP_TASKS_PER_NODE cannot be read: '{text}'")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def _text(environment: Environment, variable: str) -> str:
    """An environment variable that a launcher sets."""
    if variable not in environment:
        raise UserError(f"the environment variable {variable} is missing, which this launcher sets with others")
    return environment[variable]


def _number(environment: Environment, variable: str, least: int = 0) -> int:
    """The same as an integer."""
    text = _text(environment, variable)
    if not text.isdecimal() or int(text) < least:
        raise UserError(f"the environment variable {variable} must be an integer of at least {least}, not '{text}'")
    return int(text)
