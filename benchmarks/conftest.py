"""How kernels are timed: after a check, in turns of synchronised calls, with the device and versions on record."""

import platform
import time
from collections.abc import Callable

import pytest
import torch
from fastgpt_kernels import Ops, load_ops
from fastgpt_kernels.testing import assert_as_close_as_torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

ROUNDS, CALLS_PER_ROUND, WARM_UP_ROUNDS = 20, 10, 3


@pytest.fixture(scope="session")
def device() -> str:
    """The GPU where there is one; else the CPU, with toy shapes."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(params=["reference", "torch", "triton"])
def ops(request: pytest.FixtureRequest, device: str) -> Ops:
    """Each backend in turn: written out, PyTorch's built-ins, ours."""
    if request.param == "triton" and device == "cpu":
        pytest.skip("the interpreter is not worth timing")
    return load_ops(request.param)


@pytest.fixture
def check(ops: Ops) -> Callable[..., None]:
    """Fails where the backend is not as close to the mathematics as PyTorch; the reference has no such duty."""

    def run(call: Callable[..., Tensor], *inputs: Tensor) -> None:
        if ops.name != "reference":
            assert_as_close_as_torch(call, *inputs, ops=ops)

    return run


@pytest.fixture(params=["forward", "both"])
def measure(request: pytest.FixtureRequest, benchmark: BenchmarkFixture, device: str) -> Callable[..., None]:
    """Times the forward, or forward and backward, of a call, and keeps what it amounts to.

    The median and spread are per call. The result's `extra_info` has the work of a call (floating-point operations, or
    bytes read and written), the formula that counts it, and the rate that follows from the median.
    """

    def synchronised_clock() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def run(call: Callable[..., Tensor], *inputs: Tensor, work: tuple[float, float], formula: str) -> None:
        leaves = [x.detach().requires_grad_() for x in inputs]
        dout = torch.randn_like(call(*leaves))

        def forward() -> None:
            with torch.no_grad():
                call(*leaves)

        def both() -> None:
            torch.autograd.grad(call(*leaves), leaves, dout)

        benchmark._timer = synchronised_clock
        benchmark.pedantic(
            forward if request.param == "forward" else both,
            rounds=ROUNDS,
            iterations=CALLS_PER_ROUND,
            warmup_rounds=WARM_UP_ROUNDS,
        )
        amount = work[0] if request.param == "forward" else sum(work)
        benchmark.extra_info |= {"work": amount, "formula": formula, "device": device}
        if benchmark.stats:  # absent under --benchmark-disable
            benchmark.extra_info["rate"] = amount / benchmark.stats.stats.median

    return run


def pytest_benchmark_update_machine_info(machine_info: dict[str, object]) -> None:
    """Put the device and the versions beside the commit that pytest-benchmark records."""
    import triton

    machine_info |= {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
    }
