"""GELU, alone and with the bias of the projection before it, forward and backward.

    y = u Phi(u),  u = x or x + b          Phi: the standard normal distribution, phi its density
    exact:  Phi(u) = (1 + erf(u / sqrt 2)) / 2              y' = Phi(u) + u phi(u)
    tanh:   Phi(u) ~ (1 + tanh(w / 2)) / 2 = sigmoid(w)     y' = s + u s (1 - s) dw/du,  s = sigmoid(w)
            w = 2 sqrt(2 / pi) (u + 0.044715 u^3)

    dx = dy y'(u)        db_n = sum over rows dx_n

The sigmoid form needs one exponential and no tanh, and loses no digits where s or 1 - s is small. The backward of
bias_gelu runs a fixed number of programs for each block of columns, each with one partial sum of db over its own
rows; PyTorch adds the partial sums. Nothing is added atomically, so that a repeat on the same device gives the same
bits.

Limits: float32, float16, bfloat16; any shape.

Numerics: all in float32, the sum x + b included; one rounding to the output's dtype. db sums dx before its rounding.

Source: Hendrycks and Gimpel, "Gaussian Error Linear Units" (2016), section 2.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt_kernels import checks, launch
from fastgpt_kernels.checks import Approximate

BLOCK = 1_024  # elements of a program of gelu
ROW_BLOCK, COLUMN_BLOCK = 8, 256  # tile of a program of bias_gelu

_SQRT_HALF = tl.constexpr(math.sqrt(0.5))
_SQRT_2_OVER_PI = tl.constexpr(math.sqrt(2.0 / math.pi))
_1_OVER_SQRT_2_PI = tl.constexpr(1.0 / math.sqrt(2.0 * math.pi))
_CUBIC = tl.constexpr(0.044715)


@triton.jit
def _gelu_forward_kernel(
    x_ptr,  # (n,)
    y_ptr,  # (n,)
    n,
    TANH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    u = tl.load(x_ptr + offset, mask=offset < n, other=0.0).to(tl.float32)
    y, _ = value_and_slope(u, TANH)
    tl.store(y_ptr + offset, y.to(y_ptr.dtype.element_ty), mask=offset < n)


@triton.jit
def _gelu_backward_kernel(
    x_ptr,  # (n,)
    dy_ptr,  # (n,)
    dx_ptr,  # (n,)
    n,
    TANH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    u = tl.load(x_ptr + offset, mask=offset < n, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + offset, mask=offset < n, other=0.0).to(tl.float32)
    _, slope = value_and_slope(u, TANH)
    tl.store(dx_ptr + offset, (dy * slope).to(dx_ptr.dtype.element_ty), mask=offset < n)


@triton.jit
def _bias_gelu_forward_kernel(
    x_ptr,  # (rows, N)
    bias_ptr,  # (N,)
    y_ptr,  # (rows, N)
    rows,
    N,
    TANH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    column_blocks = tl.cdiv(N, COLUMNS)
    column = tl.program_id(0) % column_blocks * COLUMNS + tl.arange(0, COLUMNS)
    row = (tl.program_id(0) // column_blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = (row < rows)[:, None] & (column < N)[None, :]
    offset = row[:, None] * N + column[None, :]
    bias = tl.load(bias_ptr + column, mask=column < N, other=0.0).to(tl.float32)
    u = tl.load(x_ptr + offset, mask=inside, other=0.0).to(tl.float32) + bias[None, :]
    y, _ = value_and_slope(u, TANH)
    tl.store(y_ptr + offset, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _bias_gelu_backward_kernel(
    x_ptr,  # (rows, N)
    bias_ptr,  # (N,), or None where x contains it
    dy_ptr,  # (rows, N)
    dx_ptr,  # (rows, N)
    dbias_ptr,  # (programs, N) float32 partial sums
    rows,
    N,
    TANH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    program, programs = tl.program_id(0), tl.num_programs(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    bias = tl.zeros((COLUMNS,), tl.float32)
    if bias_ptr is not None:
        bias += tl.load(bias_ptr + column, mask=column < N, other=0.0).to(tl.float32)
    dbias = tl.zeros((ROWS, COLUMNS), tl.float32)
    for tile in range(program, tl.cdiv(rows, ROWS), programs):
        row = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (column < N)[None, :]
        offset = row[:, None] * N + column[None, :]
        u = tl.load(x_ptr + offset, mask=inside, other=0.0).to(tl.float32) + bias[None, :]
        dy = tl.load(dy_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        _, slope = value_and_slope(u, TANH)
        dx = dy * slope
        dbias += dx
        tl.store(dx_ptr + offset, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    tl.store(dbias_ptr + program.to(tl.int64) * N + column, tl.sum(dbias, 0), mask=column < N)


@triton.jit
def value_and_slope(u, TANH: tl.constexpr):
    """GELU of float32 numbers, and its derivative; the compiler drops the one that is not used."""
    if TANH:
        w = (u + u * u * u * _CUBIC) * (2.0 * _SQRT_2_OVER_PI)
        # from exp(-|w|) both s and 1 - s come without cancellation, and nothing overflows
        e = tl.exp(-tl.abs(w))
        larger = 1.0 / (1.0 + e)
        s = tl.where(w < 0.0, e * larger, larger)
        dw = (1.0 + u * u * (3.0 * _CUBIC)) * (2.0 * _SQRT_2_OVER_PI)
        return u * s, s + u * dw * (e * larger * larger)
    cdf = 0.5 * (1.0 + tl.erf(u * _SQRT_HALF))
    return u * cdf, cdf + u * tl.exp(u * u * -0.5) * _1_OVER_SQRT_2_PI


def launch_gelu_forward(x: Tensor, approximate: str) -> Tensor:
    """GELU of a contiguous x."""
    y = torch.empty_like(x)
    with launch.on_device_of(x):
        _gelu_forward_kernel[(triton.cdiv(x.numel(), BLOCK),)](
            x, y, x.numel(), approximate == "tanh", BLOCK, **launch.OPTIONS
        )
    return y


def launch_gelu_backward(x: Tensor, dy: Tensor, approximate: str) -> Tensor:
    """The gradient of x; both are contiguous."""
    dx = torch.empty_like(x)
    with launch.on_device_of(x):
        _gelu_backward_kernel[(triton.cdiv(x.numel(), BLOCK),)](
            x, dy, dx, x.numel(), approximate == "tanh", BLOCK, **launch.OPTIONS
        )
    return dx


def launch_bias_gelu_forward(x: Tensor, bias: Tensor, approximate: str) -> Tensor:
    """GELU of x + bias; both are contiguous."""
    N = x.shape[-1]
    rows = x.numel() // N
    y = torch.empty_like(x)
    with launch.on_device_of(x):
        _bias_gelu_forward_kernel[(triton.cdiv(rows, ROW_BLOCK) * triton.cdiv(N, COLUMN_BLOCK),)](
            x, bias, y, rows, N, approximate == "tanh", ROW_BLOCK, COLUMN_BLOCK, **launch.OPTIONS
        )
    return y


def launch_bias_gelu_backward(x: Tensor, bias: Tensor | None, dy: Tensor, approximate: str) -> tuple[Tensor, Tensor]:
    """The gradients of x and bias; all are contiguous. Without a bias, that of one which x contains, in its dtype."""
    N = x.shape[-1]
    rows = x.numel() // N
    dx = torch.empty_like(x)
    column_blocks = triton.cdiv(N, COLUMN_BLOCK)
    programs = triton.cdiv(launch.partial_sums(x.device, triton.cdiv(rows, ROW_BLOCK) * column_blocks), column_blocks)
    dbias = torch.empty((programs, N), dtype=torch.float32, device=x.device)
    with launch.on_device_of(x):
        _bias_gelu_backward_kernel[(programs, column_blocks)](
            x, bias, dy, dx, dbias, rows, N, approximate == "tanh", ROW_BLOCK, COLUMN_BLOCK, **launch.OPTIONS
        )
    return dx, dbias.sum(0).to(x.dtype if bias is None else bias.dtype)


@torch.library.custom_op("fastgpt::gelu", mutates_args=())
def _gelu(x: Tensor, approximate: str) -> Tensor:
    return launch_gelu_forward(x.contiguous(), approximate)


@_gelu.register_fake
def _(x: Tensor, approximate: str) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("fastgpt::gelu_backward", mutates_args=())
def _gelu_backward(x: Tensor, dy: Tensor, approximate: str) -> Tensor:
    return launch_gelu_backward(x.contiguous(), dy.contiguous(), approximate)


@_gelu_backward.register_fake
def _(x: Tensor, dy: Tensor, approximate: str) -> Tensor:
    return x.new_empty(x.shape)


def _setup_gelu(ctx: Any, inputs: tuple[Tensor, str], output: Tensor) -> None:
    x, ctx.approximate = inputs
    ctx.save_for_backward(x)


def _differentiate_gelu(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
    return _gelu_backward(*ctx.saved_tensors, dy, ctx.approximate), None


_gelu.register_autograd(_differentiate_gelu, setup_context=_setup_gelu)


@torch.library.custom_op("fastgpt::bias_gelu", mutates_args=())
def _bias_gelu(x: Tensor, bias: Tensor, approximate: str) -> Tensor:
    return launch_bias_gelu_forward(x.contiguous(), bias.contiguous(), approximate)


@_bias_gelu.register_fake
def _(x: Tensor, bias: Tensor, approximate: str) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("fastgpt::bias_gelu_backward", mutates_args=())
def _bias_gelu_backward(x: Tensor, bias: Tensor, dy: Tensor, approximate: str) -> tuple[Tensor, Tensor]:
    return launch_bias_gelu_backward(x.contiguous(), bias.contiguous(), dy.contiguous(), approximate)


@_bias_gelu_backward.register_fake
def _(x: Tensor, bias: Tensor, dy: Tensor, approximate: str) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), bias.new_empty(bias.shape)


def _setup_bias_gelu(ctx: Any, inputs: tuple[Tensor, Tensor, str], output: Tensor) -> None:
    x, bias, ctx.approximate = inputs
    ctx.save_for_backward(x, bias)


def _differentiate_bias_gelu(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return *_bias_gelu_backward(*ctx.saved_tensors, dy, ctx.approximate), None


_bias_gelu.register_autograd(_differentiate_bias_gelu, setup_context=_setup_bias_gelu)


def gelu(x: Tensor, approximate: Approximate = "tanh") -> Tensor:
    """GELU in Triton.

    Args:
        x: any shape, float32, float16 or bfloat16; made contiguous where it is not.
        approximate: "tanh" (GPT's) or "none" (exact, with erf).

    Returns:
        The shape and dtype of x, contiguous.

    Raises:
        UnsupportedInput: for arguments outside these.
    """
    launch.refuse("gelu", checks.against_gelu(x, approximate), launch.against(x=x))
    y: Tensor = _gelu(x, approximate)
    return y


def bias_gelu(x: Tensor, bias: Tensor, approximate: Approximate = "tanh") -> Tensor:
    """GELU of x + bias in one pass, in Triton; x + bias is neither rounded nor stored.

    Args:
        x: (..., N), float32, float16 or bfloat16; made contiguous where it is not.
        bias: (N,), in any of these dtypes.
        approximate: "tanh" (GPT's) or "none" (exact, with erf).

    Returns:
        The shape and dtype of x, contiguous.

    Raises:
        UnsupportedInput: for arguments outside these.
    """
    launch.refuse("bias_gelu", checks.against_bias_gelu(x, bias, approximate), launch.against(x=x, bias=bias))
    y: Tensor = _bias_gelu(x, bias, approximate)
    return y
