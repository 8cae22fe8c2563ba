import json
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

from fastgpt.engine import host
from fastgpt.engine.host import prepare_host

CPU, GPU = torch.device("cpu"), torch.device("cuda")

PROGRAM = """
import json, os, sys
import torch
from fastgpt.engine.host import prepare_host
rank, world, threads = (int(word) for word in sys.argv[1:])
before = sorted(os.sched_getaffinity(0))
found = prepare_host(torch.device("cpu"), threads or None, local_rank=rank, local_world_size=world)
print(json.dumps([before, sorted(os.sched_getaffinity(0)), found, torch.get_num_threads()]))
"""

FAULTS = """
import resource, sys
import torch
from fastgpt.engine.host import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()
x = torch.zeros(2**24)
for turn in range(60):
    if turn == 50:  # aligned blocks come to rest after a few turns
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    y = x + 1
    del y
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""

Run = Callable[..., subprocess.CompletedProcess[str]]


def ranks(command: Run, world: int, threads: int = 0) -> list[list[list[int]]]:
    outcomes = [command(sys.executable, "-c", PROGRAM, str(rank), str(world), str(threads)) for rank in range(world)]
    assert all(outcome.returncode == 0 for outcome in outcomes), outcomes[0].stderr
    return [json.loads(outcome.stdout) for outcome in outcomes]


@pytest.mark.skipif(len(host.available_cores()) < 2, reason="one core cannot be shared out")
def test_ranks_of_a_host_share_its_cores_out(command: Run) -> None:
    (cores, first, *threads), (_, second, *_) = ranks(command, 2)
    assert not set(first) & set(second) and set(first) | set(second) <= set(cores)
    assert threads == [len(cores) // 2] * 2 and len(first) == len(cores) // 2


def test_one_rank_has_all_cores_and_the_threads_that_were_asked_for(command: Run) -> None:
    ((cores, mine, found, threads),) = ranks(command, 1)
    assert mine == cores and found == threads == len(cores)
    ((_, mine, found, threads),) = ranks(command, 1, threads=3)
    assert mine == cores and found == threads == 3


def test_ranks_that_ask_for_more_than_there_is_are_bound_to_nothing(command: Run) -> None:
    for cores, mine, found, _ in ranks(command, 2, threads=len(host.available_cores())):
        assert mine == cores and found == len(cores)


@pytest.mark.skipif(not host.keep_freed_memory(), reason="the C library is not glibc")
def test_memory_that_is_freed_is_not_cleared_anew(command: Run) -> None:
    faults = {way: int(command(sys.executable, "-c", FAULTS, way).stdout) for way in ("kept", "given back")}
    # each turn writes 64 MiB: 16,384 pages
    assert faults["kept"] < 1_000 < faults["given back"]


def test_on_a_gpu_the_threads_are_set_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "keep_freed_memory", lambda: pytest.fail("for CPUs only"))
    monkeypatch.setattr(host.os, "sched_setaffinity", lambda *_: pytest.fail("for CPUs only"))
    before = torch.get_num_threads()
    try:
        assert prepare_host(GPU, 1, local_rank=1, local_world_size=2) == torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
