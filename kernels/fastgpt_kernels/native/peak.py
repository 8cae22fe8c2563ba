"""How fast this CPU can multiply bfloat16 at most, for benchmarks: its instruction in a loop over registers."""

import time

import torch

from fastgpt_kernels.native.calls import call

OPERATIONS = 16 * 64  # of a round in one thread: instructions by multiplications and additions of each
ROUNDS = 2_000_000  # some tens of milliseconds


def peak_flops() -> float:
    """FLOP/s of all threads of PyTorch together, the best of a few tries.

    Raises:
        UnsupportedInput: these kernels cannot run here.
    """
    threads = torch.get_num_threads()
    sums = torch.empty(threads, 16)
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        call("fastgpt_multiplications", sums, ROUNDS)
        seconds.append(time.perf_counter() - start)
    return threads * ROUNDS * OPERATIONS / min(seconds)
