"""The two roofs of a device, measured in the session of what is compared with them: a matrix product and a copy."""

import importlib
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from fastgpt_kernels.native.library import reasons_against
from torch import Tensor

from benchmarks import environment
from benchmarks.shapes import Scale

# M = N = K of the product, and bytes of the copied tensor: large enough that nothing but the unit in question counts
SIZES: dict[Scale, tuple[int, int]] = {"gpu": (8192, 2**30), "cpu": (2048, 2**28), "toy": (128, 2**20)}
REPEATS: dict[Scale, int] = {"gpu": 30, "cpu": 7, "toy": 3}


class Roofs(NamedTuple):
    """FLOP/s of a product in the dtype of the suites, bytes/s of a copy (read and written), and what was read then."""

    gemm: float
    copy: float
    dtype: str
    clocks: dict[str, str]
    load: list[float]

    def of(self, unit: str) -> float:
        """The roof of work counted in "FLOP" or in "byte"."""
        return self.gemm if unit == "FLOP" else self.copy

    def record(self) -> dict[str, Any]:
        """For a results file."""
        return self._asdict()


def measure(device: str, scale: Scale, dtype: torch.dtype) -> Roofs:
    """Both roofs, each the median of several calls, on random data: zeros would run faster."""
    size, copied = SIZES[scale]
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(size, size, device=device, generator=generator).to(dtype) for _ in range(2))
    gemm = 2 * size**3 / min(median_seconds(call, device, REPEATS[scale]) for call in _products(a, b))
    clocks = clocks_under_load(lambda: a @ b, device)
    source = torch.randn(copied // 4, device=device, generator=generator)
    target = torch.empty_like(source)
    copy = 2 * copied / median_seconds(lambda: target.copy_(source), device, REPEATS[scale])
    return Roofs(gemm, copy, str(dtype).removeprefix("torch."), clocks, environment.load())


def _products(a: Tensor, b: Tensor) -> Iterator[Callable[[], Any]]:
    """PyTorch's product, and ours where a CPU has one: the roof is the faster of them."""
    yield lambda: a @ b
    if not reasons_against():
        linear = importlib.import_module("fastgpt_kernels.native.linear")  # of this name the package holds the function
        if linear.multiplies(a, b):
            yield lambda: linear.product(a, b)


def median_seconds(call: Callable[[], Any], device: str, repeats: int) -> float:
    """Seconds of a call after as many to warm up; on a GPU by its own events, so that the host has no part in it."""
    for _ in range(repeats):
        call()
    if device == "cpu":
        return statistics.median(host_seconds(call) for _ in range(repeats))
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        call()
        mark.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) * 1e-3 for a, b in itertools.pairwise(marks))


def host_seconds(call: Callable[[], Any]) -> float:
    """Seconds of one call on a CPU."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def clocks_under_load(call: Callable[[], Any], device: str) -> dict[str, str]:
    """The clocks while the GPU works: an idle one has slowed down before anybody reads them."""
    if device == "cpu":
        return {}
    for _ in range(300):
        call()
    found = environment.clocks()
    torch.cuda.synchronize()
    return found
