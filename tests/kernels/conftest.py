"""Where the kernels of these tests run: Triton's interpreter without a GPU, the GPU itself (marker gpu) with one."""

import os
from collections.abc import Iterator

import pytest
import torch

# before any kernel is defined: a process either interprets or compiles
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from fastgpt_kernels import Ops, load_ops


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """The device of a test's tensors."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    if request.param == "cpu" and request.node.get_closest_marker("gpu"):
        pytest.skip("too large for the interpreter")
    if request.param == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("the kernels of this process are compiled for its GPU; TRITON_INTERPRET=1 interprets them")
    return request.param


@pytest.fixture
def triton_ops(device: str) -> Ops:
    """The Triton backend, interpreted or on the GPU."""
    return load_ops("triton")


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan() -> Iterator[None]:
    """An output that a kernel forgets to write shows as NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)
