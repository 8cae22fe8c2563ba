"""What launchers say in the environment, read."""

import pytest

from fastgpt.errors import UserError
from fastgpt.launchers import VISIBLE, Launch, find_launch, first_host, tasks_of_nodes

SRUN = {
    "SLURM_JOB_ID": "70",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NUM_TASKS": "11",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2),3",
    "SLURM_STEP_NODELIST": "gpu[003-005]",
    "SLURM_NODEID": "2",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    # of the job, not of the step
    "SLURM_NTASKS": "12",
    "SLURM_TASKS_PER_NODE": "4(x3)",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
HYDRA = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "3", "MPI_LOCALNRANKS": "4"}
TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
DEEPSPEED = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_SIZE": "4", "CROSS_RANK": "1", "CROSS_SIZE": "2"}


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch):
    """Puts variables into an environment that has none of a launcher."""
    for name in {*SRUN, *OPEN_MPI, *HYDRA, *TORCHRUN, *DEEPSPEED, "MASTER_ADDR", *VISIBLE}:
        monkeypatch.delenv(name, raising=False)

    def put(variables: dict[str, str]) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return put


@pytest.mark.parametrize(
    ("variables", "launch"),
    [
        ({}, None),
        (TORCHRUN, Launch(5, 8, 1, 4, "torchrun")),
        (DEEPSPEED, Launch(5, 8, 1, 4, "deepspeed")),
        (SRUN, Launch(9, 11, 1, 3, "srun", "gpu003", 12_000 + 31 * 70 + 2)),
        (OPEN_MPI | {"MASTER_ADDR": "node1"}, Launch(3, 4, 1, 2, "mpirun", "127.0.0.1", 29500)),
        (HYDRA, Launch(3, 4, 3, 4, "mpirun", "127.0.0.1", 29500)),
        # torchrun started by srun, and Open MPI's processes inside a Slurm job
        (SRUN | TORCHRUN, Launch(5, 8, 1, 4, "torchrun")),
        (SRUN | OPEN_MPI | {"MASTER_ADDR": "node1"}, Launch(3, 4, 1, 2, "mpirun", "127.0.0.1", 29500)),
        # srun --mpi=pmi2 sets two of Hydra's
        (SRUN | {"PMI_RANK": "9", "PMI_SIZE": "11"}, Launch(9, 11, 1, 3, "srun", "gpu003", 12_000 + 31 * 70 + 2)),
    ],
)
def test_each_launcher_is_understood(variables: dict[str, str], launch: Launch | None, say) -> None:
    say(variables)
    assert find_launch() == launch


def test_the_script_of_a_batch_job_and_an_interactive_shell_are_no_ranks(say) -> None:
    batch = {"SLURM_JOB_ID": "70", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NTASKS": "8"}
    say(batch)
    assert find_launch() is None
    say({"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"})
    assert find_launch() is None


@pytest.mark.parametrize(
    ("variables", "visible", "gpu"),
    [
        (SRUN, None, 1),
        (SRUN, "0,1,2", 1),
        (SRUN, "2", 0),
        (HYDRA, "3", 0),
        # these launchers choose no GPU for a rank: it is the user's choice for all of them
        (TORCHRUN, "2", 1),
        (DEEPSPEED, "2", 1),
    ],
)
def test_a_rank_that_sees_its_own_gpu_alone_takes_it(
    variables: dict[str, str], visible: str | None, gpu: int, say
) -> None:
    say(variables | ({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}))
    launch = find_launch()
    assert launch is not None and launch.gpu == gpu


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu7", "gpu7"),
        ("gpu7,gpu8", "gpu7"),
        ("gpu[003-005,9],cpu1", "gpu003"),
        ("gpu[9,003-005]", "gpu9"),
        ("rack[1-2]node[03,05].local,other", "rack1node03.local"),
    ],
)
def test_the_first_host_of_a_list_is_found(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_tasks_are_counted_by_node() -> None:
    assert tasks_of_nodes("4(x2),3") == [4, 4, 3]
    assert tasks_of_nodes("8") == [8]
    with pytest.raises(UserError, match=r"SLURM_STEP_TASKS_PER_NODE cannot be read: '4x2'"):
        tasks_of_nodes("4x2")


@pytest.mark.parametrize("left_out", ["SLURM_LOCALID", "SLURM_JOB_ID", "SLURM_STEP_NODELIST"])
def test_a_variable_that_is_missing_is_named(left_out: str, say) -> None:
    say({name: value for name, value in SRUN.items() if name != left_out})
    with pytest.raises(UserError, match=f"{left_out} is missing"):
        find_launch()


def test_a_number_that_is_none_is_named(say) -> None:
    say(HYDRA | {"PMI_SIZE": "many"})
    with pytest.raises(UserError, match="PMI_SIZE must be an integer of at least 1, not 'many'"):
        find_launch()


def test_mpi_on_several_hosts_has_to_be_told_where_to_meet(say) -> None:
    say(OPEN_MPI)
    with pytest.raises(UserError, match="mpirun -x MASTER_ADDR=HOST"):
        find_launch()


def test_ports_of_jobs_are_not_those_that_linux_hands_out(say) -> None:
    for job in (0, 1, 999_999, 2**31):
        say(SRUN | {"SLURM_JOB_ID": str(job)})
        launch = find_launch()
        assert launch is not None and launch.port is not None and 1024 < launch.port < 32_768
