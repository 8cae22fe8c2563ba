"""What the Triton files share: where kernels can run, what they take, and how many programs fill the device."""

import contextlib
import functools
from collections.abc import Sequence
from contextvars import ContextVar
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt_kernels import checks
from fastgpt_kernels.errors import raise_if_any

REMEDY = "Set kernels.backend to 'torch' to run it without Triton."
# contract a * b + c to one rounding: the default of Triton up to 3.9, and no longer of those after it
OPTIONS = {"enable_fp_fusion": True}

# Triton reads TRITON_INTERPRET when a kernel is defined, so one process either interprets or compiles
INTERPRETED: bool = triton.knobs.runtime.interpret

# the architecture that kernels are compiled for without such a device, by compile_report.py
compiling_for: ContextVar[str | None] = ContextVar("compiling_for", default=None)


def against(**arguments: object) -> list[str]:
    """Reasons why the Triton kernels cannot take these tensors: device, dtype, no elements."""
    reasons = []
    for name, x in arguments.items():
        # what no backend takes is said by the checks
        if not isinstance(x, Tensor):
            continue
        if x.device.type != "cuda" and not INTERPRETED:
            reasons.append(f"{name} is on {x.device}; a GPU is needed, or TRITON_INTERPRET=1 from the start")
        if x.is_floating_point() and x.dtype not in checks.DTYPES:
            reasons.append(f"{name} is {x.dtype}; supported: float32, float16, bfloat16")
        if x.numel() == 0:
            reasons.append(f"{name} has shape {checks.shape_of(x)}; it needs at least one element")
    return reasons


def refuse(operation: str, wrong: Sequence[str], unfit: Sequence[str]) -> None:
    """Raise `UnsupportedInput` when there is a reason to.

    Args:
        operation: what was called.
        wrong: reasons why no backend takes the arguments.
        unfit: reasons why the Triton kernels do not.
    """
    raise_if_any([*wrong, *unfit], operation, "triton", checks.REMEDY if wrong else REMEDY)


def within_reach(x: Tensor, row_stride: int, rows: int) -> Tensor:
    """x, or a dense copy where a kernel could not reach all of so many rows: within a tile, it reckons with 32 bits.

    Args:
        x: its last dimension is a row.
        row_stride: between the rows of a tile.
        rows: of the largest tile.
    """
    return x if rows * row_stride + x.shape[-1] * x.stride(-1) < 2**31 else x.contiguous()


def on_device_of(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device: make it the one that holds x."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """The number of streaming multiprocessors of a GPU; for the interpreter, a few."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@functools.cache
def cache_bytes(device: torch.device) -> int:
    """The size of the L2 cache of a GPU; for the interpreter, 1 MB."""
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 2**20


def architecture(device: torch.device) -> str:
    """What the tile table calls a device: "sm_90" for an H100, "gfx942" for an MI300, "interpreter" without a GPU."""
    return compiling_for.get() or _architecture(device)


@functools.cache
def _architecture(device: torch.device) -> str:
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(device).gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def with_all_registers(device: torch.device, warps: int = 8) -> dict[str, Any]:
    """Options of a kernel that needs many registers.

    Left alone, NVIDIA's assembler spills some a little for the sake of more programs at a time.
    """
    nvidia = architecture(device).startswith("sm_")
    return OPTIONS | ({"maxnreg": min(255, 2_048 // warps)} if nvidia else {})


def partial_sums(device: torch.device, tasks: int) -> int:
    """How many programs share a sum over rows: enough to fill the device, so few that their partial sums are cheap."""
    return min(tasks, 2 * multiprocessors(device))


@triton.jit
def dot(
    a,  # (M, K)
    b,  # (K, N)
    acc,  # (M, N) float32
    INTERPRETED: tl.constexpr,
):
    """acc + a b, with float32 sums; float32 operands keep all their bits, where a GPU would round them to tf32."""
    if INTERPRETED:
        # A GPU sums the products of a row and a column in one order, in every tile and in its transpose. The CPU's BLAS
        # does not: in float32 the backward would recompute other scores than those of the forward. Nor can the
        # interpreter multiply bfloat16, of which it takes the bit patterns.
        return acc + tl.dot(a.to(tl.float64), b.to(tl.float64)).to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")
