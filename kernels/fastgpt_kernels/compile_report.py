"""Every kernel compiled ahead of time, without a GPU, as its operation would launch it: registers, spills, shared memory.

    python -m fastgpt_kernels.compile_report --only attention --arch 90

prints one line for each kernel, dtype and shape, and exits with code 1 when one of them spills registers, asks for more
shared memory than the architecture has, or lacks the tensor-core instructions that it should have. The operations run on
meta tensors with Triton's driver replaced by one that knows only its target, so that tile sizes, alignment and every other
specialisation are those of a real launch.
"""

import argparse
import contextlib
import io
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from fastgpt_kernels import attention, launch

# the largest dynamic shared memory of a block: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"
SHARED_MEMORY_LIMIT = {80: 163 * 1024, 90: 227 * 1024}
HALF = (torch.float16, torch.bfloat16)


class Case(NamedTuple):
    """One operation at one dtype and size, as a call that makes its launches."""

    operation: str
    size: str
    dtype: torch.dtype
    launch: Callable[[], object]
    tensor_cores: bool = False


class Compiled(NamedTuple):
    """What the compiler says of one kernel of a case."""

    case: Case
    arch: int
    kernel: str
    registers: int
    spills: int  # bytes stored or loaded
    shared: int  # bytes
    wgmma: bool
    seconds: float

    def faults(self) -> list[str]:
        """What is wrong with it."""
        faults = []
        if self.spills:
            faults.append(f"spills {self.spills} bytes")
        if self.shared > SHARED_MEMORY_LIMIT[self.arch]:
            faults.append(f"needs more than {SHARED_MEMORY_LIMIT[self.arch]} bytes of shared memory")
        if self.case.tensor_cores and self.arch == 90 and not self.wgmma:
            faults.append("has no wgmma")
        return faults
