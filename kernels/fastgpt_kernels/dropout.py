"""Dropout, alone and added to a residual, with its mask regenerated in the backward, never stored.

    y_n = x_n z_n                   dx_n = dy_n z_n        z_n = 1 / (1 - p) where u_n >= p, else 0
    y_n = residual_n + x_n z_n      the same dx_n; d_residual = dy

u_n is uniform on [0, 1), from Philox 4x32-10 with the seed as key: element n takes word n mod 4 of call n / 4, where
n is its index in memory order as if the rows (of the last dimension) were padded to a multiple of four columns. Four
neighbours share a call, and a thread holds at least four neighbours, so that the mask moves no data between threads.
`keep`, below, serves every kernel. The mask depends on nothing else, neither on tile sizes nor on the device.

Limits: float32, float16, bfloat16; any shape; residual in the dtype of x or float32.

Numerics: u has 31 random bits; the product and the sum are taken in float32 and rounded once.

Source: Srivastava et al., "Dropout" (2014), section 10 (the scaled form). Salmon et al., "Parallel random numbers: as
easy as 1, 2, 3" (2011), section 3.3 (Philox).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt_kernels import checks, launch
from fastgpt_kernels.checks import Seed
from fastgpt_kernels.seeds import seed_tensor

BLOCK = 2_048  # elements of a program


@triton.jit
def keep(
    seed,  # int64
    row,  # (ROWS,) int64
    p,
    N,  # columns of a row
    START: tl.constexpr,  # a multiple of 4
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Whether each of these rows keeps its elements from column START on: (ROWS, COLUMNS)."""
    call = (row * tl.cdiv(N, 4))[:, None] + (START // 4 + tl.arange(0, COLUMNS // 4))[None, :]
    low, high = (call & 0xFFFFFFFF).to(tl.uint32), (call >> 32).to(tl.uint32)
    words = tl.philox(seed, low, high, 0, 0)
    even = tl.join(tl.uint_to_uniform_float(words[0]) >= p, tl.uint_to_uniform_float(words[2]) >= p)
    odd = tl.join(tl.uint_to_uniform_float(words[1]) >= p, tl.uint_to_uniform_float(words[3]) >= p)
    return tl.reshape(tl.join(even, odd), (ROWS, COLUMNS))


@triton.jit
def _dropout_kernel(
    x_ptr,  # (n,)
    residual_ptr,  # (n,), or None
    seed_ptr,  # (1,) int64
    y_ptr,  # (n,)
    n,
    p,
    N,  # columns of a row, or None: every row has a multiple of four, or there is one row
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    number = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    kept = keep(tl.load(seed_ptr), block, p, BLOCK, 0, 1, BLOCK)
    if N is None:
        offset = number
        inside = offset < n
    else:
        row, column = number // (tl.cdiv(N, 4) * 4), number % (tl.cdiv(N, 4) * 4)
        offset = row * N + column
        inside = (column < N) & (offset < n)
    x = tl.load(x_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    y = tl.where(kept, x * (1.0 / (1.0 - p)), 0.0)
    if residual_ptr is not None:
        y += tl.load(residual_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + offset, y.to(y_ptr.dtype.element_ty), mask=inside)


def launch_dropout(x: Tensor, p: float, seed: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A contiguous x through the mask of the seed, in its own dtype or another; also the backward, with dy for x."""
    y = torch.empty_like(x, dtype=dtype)
    _launch(x, None, p, seed, y)
    return y


def launch_dropout_add(x: Tensor, residual: Tensor, p: float, seed: Tensor) -> Tensor:
    """residual + dropout(x), both contiguous."""
    y = torch.empty_like(residual)
    _launch(x, residual, p, seed, y)
    return y


def _launch(x: Tensor, residual: Tensor | None, p: float, seed: Tensor, y: Tensor) -> None:
    N = x.shape[-1] if x.dim() else 1
    rows = x.numel() // N
    padded = N % 4 != 0 and rows > 1
    numbers = rows * (triton.cdiv(N, 4) * 4) if padded else x.numel()
    with launch.on_device_of(x):
        _dropout_kernel[(triton.cdiv(numbers, BLOCK),)](
            x, residual, seed, y, x.numel(), p, N if padded else None, BLOCK, **launch.OPTIONS
        )


@torch.library.custom_op("fastgpt::dropout", mutates_args=())
def _dropout(x: Tensor, p: float, seed: Tensor, dtype: torch.dtype) -> Tensor:
    return launch_dropout(x.contiguous(), p, seed, dtype)


@_dropout.register_fake
def _(x: Tensor, p: float, seed: Tensor, dtype: torch.dtype) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype)


def _setup_dropout(ctx: Any, inputs: tuple[Tensor, float, Tensor, torch.dtype], output: Tensor) -> None:
    x, ctx.p, seed, _ = inputs
    ctx.dtype = x.dtype
    ctx.save_for_backward(seed)


def _differentiate_dropout(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return _dropout(dy, ctx.p, *ctx.saved_tensors, ctx.dtype), None, None, None


_dropout.register_autograd(_differentiate_dropout, setup_context=_setup_dropout)


@torch.library.custom_op("fastgpt::dropout_add", mutates_args=())
def _dropout_add(x: Tensor, residual: Tensor, p: float, seed: Tensor) -> Tensor:
    return launch_dropout_add(x.contiguous(), residual.contiguous(), p, seed)


@_dropout_add.register_fake
def _(x: Tensor, residual: Tensor, p: float, seed: Tensor) -> Tensor:
    return residual.new_empty(residual.shape)


def _setup_dropout_add(ctx: Any, inputs: tuple[Tensor, Tensor, float, Tensor], output: Tensor) -> None:
    x, _, ctx.p, seed = inputs
    ctx.dtype = x.dtype
    ctx.save_for_backward(seed)


def _differentiate_dropout_add(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return _dropout(dy, ctx.p, *ctx.saved_tensors, ctx.dtype), dy, None, None


_dropout_add.register_autograd(_differentiate_dropout_add, setup_context=_setup_dropout_add)


def dropout(x: Tensor, p: float, seed: Seed | None) -> Tensor:
    """x / (1 - p) for the elements that the seed keeps, each with probability 1 - p, and 0 for the others; in Triton.

    Args:
        x: any shape, float32, float16 or bfloat16; made contiguous where it is not.
        p: probability, in [0, 1), of dropping an element; with 0, x itself is returned.
        seed: int in [0, 2^63) or int64 tensor of one element; needed where p > 0.

    Returns:
        The shape and dtype of x, contiguous. The same seed gives the same mask, in the backward too.

    Raises:
        UnsupportedInput: for arguments outside these.
    """
    launch.refuse("dropout", checks.against_dropout_of(x, p, seed), launch.against(x=x))
    if p == 0.0 or seed is None:
        return x
    y: Tensor = _dropout(x, p, seed_tensor(seed, x.device), x.dtype)
    return y


def dropout_add(x: Tensor, residual: Tensor, p: float, seed: Seed | None) -> Tensor:
    """residual + dropout(x) in one pass, in Triton; without dropout it is PyTorch's sum.

    Args:
        x: any shape, float32, float16 or bfloat16; made contiguous where it is not.
        residual: the shape of x, in its dtype or float32; made contiguous where it is not.
        p: probability, in [0, 1), of dropping an element of x.
        seed: int in [0, 2^63) or int64 tensor of one element; needed where p > 0.

    Returns:
        The shape of x and the dtype of residual; contiguous where p > 0. The mask is that of `dropout`.

    Raises:
        UnsupportedInput: for arguments outside these.
    """
    wrong = checks.against_dropout_add(x, residual, p, seed)
    launch.refuse("dropout_add", wrong, launch.against(x=x, residual=residual))
    if p == 0.0 or seed is None:
        return residual + x
    y: Tensor = _dropout_add(x, residual, p, seed_tensor(seed, x.device))
    return y
