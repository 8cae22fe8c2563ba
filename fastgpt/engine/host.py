"""What a process asks of its CPU and its C library before it trains: cores, threads, and memory that stays."""

import ctypes
import os
import sys
from collections.abc import Callable
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

# of glibc's mallopt(3)
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST = 2**31 - 1


def prepare_host(device: torch.device, threads: int | None, *, local_rank: int = 0, local_world_size: int = 1) -> int:
    """Set the threads of this rank, on a CPU its cores too, and let memory that is freed stay with the process.

    Args:
        device: what the run computes on.
        threads: asked for; None shares the cores between the ranks of this host.
        local_rank: number of this rank among those of this host.
        local_world_size: ranks of this host.

    Returns:
        The number of threads.
    """
    cores = available_cores()
    threads = threads or max(1, len(cores) // local_world_size)
    # a launcher may have bound each rank already: then there are no cores to share out
    shared_out = local_world_size > 1 and threads * local_world_size <= len(cores)
    if device.type == "cpu" and shared_out and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores[local_rank * threads : (local_rank + 1) * threads])
    torch.set_num_threads(threads)
    if device.type == "cpu":
        keep_freed_memory()
    return threads


def available_cores() -> list[int]:
    """The cores that this process may run on, in order."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def keep_freed_memory() -> bool:
    """Let glibc keep large blocks for the next step; whether it could be told.

    By default it maps each large block anew and returns it to the kernel when it is freed, so that every activation of
    every step is memory that the kernel has to clear, page by page, at its first use.
    """
    if not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):  # musl's allocator has no such thresholds
        return False
    return bool(libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST) and libc.mallopt(_M_TRIM_THRESHOLD, _LARGEST))


def to_device(values: npt.NDArray[Any], device: torch.device) -> Tensor:
    """An array on the device, by a copy from pinned memory that nobody waits for."""
    x = torch.from_numpy(values)
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def to_host(x: Tensor) -> Callable[[], Tensor]:
    """Begin to copy a tensor to the CPU; what comes back gives the copy.

    It waits for the copy alone, not for what the device has been asked to do since: read in the plain way, a result of
    one update would come after the work of the next, which is in the queue behind it.
    """
    if x.device.type != "cuda":
        return lambda: x
    copy = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    copy.copy_(x, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(x.device))

    def wait() -> Tensor:
        copied.synchronize()
        return copy

    return wait
