"""Layer normalisation over the last dimension, forward and backward.

For each row x of N columns, with weight w and bias b:

    mean = sum_n x_n / N        rstd = 1 / sqrt(sum_n (x_n - mean)^2 / N + eps)
    y_n  = h_n w_n + b_n        h_n = (x_n - mean) rstd

    g_n  = dy_n w_n
    dx_n = rstd (g_n - mean(g) - h_n mean(g h))
    dw_n = sum over rows dy_n h_n
    db_n = sum over rows dy_n

The forward holds a row in registers, takes the variance from the centred values and corrects the mean by their sum;
it keeps mean and rstd. The backward runs a fixed number of programs, each over its own rows, with one partial sum of
dw and db each; PyTorch adds the partial sums. Nothing is added atomically, so that a repeat on the same device gives
the same bits. Rows too wide for the registers to hold those sums as well are read a second time, by a kernel over
blocks of columns.

Limits: up to 16,384 columns; x in float32, float16 or bfloat16, weight and bias in any of the three.

Numerics: statistics and sums in float32, kept in float32; one rounding to the output's dtype.

Source: Ba, Kiros and Hinton, "Layer Normalization" (2016), section 3.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt_kernels import checks, launch
from fastgpt_kernels.errors import raise_if_any

MAX_COLUMNS = 16_384
# the widest row whose parameter gradients fit in registers beside it
MAX_COLUMNS_IN_ONE_PASS = 4_096
TILE_ELEMENTS = 2_048  # narrow rows share a program
COLUMN_BLOCK, ROW_BLOCK = 128, 32


@triton.jit
def _forward_kernel(
    x_ptr,  # (rows, N)
    weight_ptr,  # (N,)
    bias_ptr,  # (N,)
    y_ptr,  # (rows, N)
    mean_ptr,  # (rows,) float32, kept for the backward
    rstd_ptr,  # (rows,) float32, kept for the backward
    rows,
    eps,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < N)[None, :]
    offset = row[:, None] * N + column[None, :]

    x = tl.load(x_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(x, 1) / N
    # padding lanes hold 0, not mean: unmasked they would add mean^2 to the variance
    centred = tl.where(inside, x - mean[:, None], 0.0)
    # what the first sum lost by rounding, which counts where the mean is large beside the spread
    rest = tl.sum(centred, 1) / N
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / N - rest * rest + eps)
    centred -= rest[:, None]
    mean += rest
    weight = tl.load(weight_ptr + column, mask=column < N, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + column, mask=column < N, other=0.0).to(tl.float32)
    y = centred * rstd[:, None] * weight[None, :] + bias[None, :]

    tl.store(y_ptr + offset, y.to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(mean_ptr + row, mean, mask=row < rows)
    tl.store(rstd_ptr + row, rstd, mask=row < rows)


@triton.jit
def _backward_kernel(
    x_ptr,  # (rows, N)
    weight_ptr,  # (N,)
    dy_ptr,  # (rows, N)
    mean_ptr,  # (rows,) float32
    rstd_ptr,  # (rows,) float32
    dx_ptr,  # (rows, N)
    dweight_ptr,  # (programs, N) float32 partial sums, or None
    dbias_ptr,  # (programs, N) float32 partial sums, or None
    rows,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program, programs = tl.program_id(0), tl.num_programs(0)
    column = tl.arange(0, BLOCK)
    weight = tl.load(weight_ptr + column, mask=column < N, other=0.0).to(tl.float32)
    dweight = tl.zeros((ROWS, BLOCK), tl.float32)
    dbias = tl.zeros((ROWS, BLOCK), tl.float32)

    for tile in range(program, tl.cdiv(rows, ROWS), programs):
        row = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (column < N)[None, :]
        offset = row[:, None] * N + column[None, :]
        mean = tl.load(mean_ptr + row, mask=row < rows, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)[:, None]
        dy = tl.load(dy_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        # padding lanes need no mask here: each term below has a factor dy or weight, which are 0 there
        normed = (x - mean) * rstd
        if dweight_ptr is not None:
            dweight += dy * normed
            dbias += dy
        g = dy * weight[None, :]
        mean_g = tl.sum(g, 1)[:, None] / N
        mean_gh = tl.sum(g * normed, 1)[:, None] / N
        dx = (g - mean_g - normed * mean_gh) * rstd
        tl.store(dx_ptr + offset, dx.to(dx_ptr.dtype.element_ty), mask=inside)

    if dweight_ptr is not None:
        partial = program.to(tl.int64) * N + column
        tl.store(dweight_ptr + partial, tl.sum(dweight, 0), mask=column < N)
        tl.store(dbias_ptr + partial, tl.sum(dbias, 0), mask=column < N)


@triton.jit
def _backward_parameters_kernel(
    x_ptr,  # (rows, N)
    dy_ptr,  # (rows, N)
    mean_ptr,  # (rows,) float32
    rstd_ptr,  # (rows,) float32
    dweight_ptr,  # (programs, N) float32 partial sums
    dbias_ptr,  # (programs, N) float32 partial sums
    rows,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program, programs = tl.program_id(0), tl.num_programs(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    dweight = tl.zeros((BLOCK,), tl.float32)
    dbias = tl.zeros((BLOCK,), tl.float32)
    for tile in range(program, tl.cdiv(rows, ROWS), programs):
        row = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (column < N)[None, :]
        offset = row[:, None] * N + column[None, :]
        mean = tl.load(mean_ptr + row, mask=row < rows, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)[:, None]
        dy = tl.load(dy_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        dweight += tl.sum(dy * (x - mean) * rstd, 0)
        dbias += tl.sum(dy, 0)
    partial = program.to(tl.int64) * N + column
    tl.store(dweight_ptr + partial, dweight, mask=column < N)
    tl.store(dbias_ptr + partial, dbias, mask=column < N)


def launch_forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """y in the shape of x (..., N contiguous), and mean and rstd of each row in float32."""
    N = x.shape[-1]
    rows = x.numel() // N
    y = torch.empty_like(x)
    mean = torch.empty(rows, dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    ROWS, BLOCK, num_warps = _tile(N)
    with launch.on_device_of(x):
        _forward_kernel[(triton.cdiv(rows, ROWS),)](
            x, weight, bias, y, mean, rstd, rows, eps, N, ROWS, BLOCK, num_warps=num_warps, **launch.OPTIONS
        )
    return y, mean, rstd


def launch_backward(
    x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, dy: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, weight and bias; x and dy are contiguous."""
    N = x.shape[-1]
    rows = mean.numel()
    dx = torch.empty_like(x)
    ROWS, BLOCK, num_warps = _tile(N)
    programs = launch.partial_sums(x.device, triton.cdiv(rows, ROWS))
    one_pass = N <= MAX_COLUMNS_IN_ONE_PASS
    parameter_programs = programs if one_pass else launch.partial_sums(x.device, triton.cdiv(rows, 8 * ROW_BLOCK))
    dweight = torch.empty((parameter_programs, N), dtype=torch.float32, device=x.device)
    dbias = torch.empty_like(dweight)
    sums = (dweight, dbias) if one_pass else (None, None)
    with launch.on_device_of(x):
        _backward_kernel[(programs,)](
            x, weight, dy, mean, rstd, dx, *sums, rows, N, ROWS, BLOCK, num_warps=num_warps, **launch.OPTIONS
        )
        if not one_pass:
            _backward_parameters_kernel[(parameter_programs, triton.cdiv(N, COLUMN_BLOCK))](
                x, dy, mean, rstd, dweight, dbias, rows, N, ROW_BLOCK, COLUMN_BLOCK, num_warps=4, **launch.OPTIONS
            )
    return dx, dweight.sum(0).to(weight.dtype), dbias.sum(0).to(bias.dtype)


def _tile(N: int) -> tuple[int, int, int]:
    """Rows of a tile, its padded columns, and warps."""
    BLOCK = triton.next_power_of_2(N)
    return max(1, TILE_ELEMENTS // BLOCK), BLOCK, min(16, max(4, BLOCK // 1024))


@torch.library.custom_op("fastgpt::layer_norm", mutates_args=())
def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return launch_forward(x.contiguous(), weight.contiguous(), bias.contiguous(), eps)


@_layer_norm.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    rows = x.numel() // x.shape[-1]
    return x.new_empty(x.shape), x.new_empty(rows, dtype=torch.float32), x.new_empty(rows, dtype=torch.float32)


@torch.library.custom_op("fastgpt::layer_norm_backward", mutates_args=())
def _layer_norm_backward(
    x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, dy: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return launch_backward(x.contiguous(), weight.contiguous(), bias, mean, rstd, dy.contiguous())


@_layer_norm_backward.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape), bias.new_empty(bias.shape)


def _setup_context(
    ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, float], output: tuple[Tensor, Tensor, Tensor]
) -> None:
    x, weight, bias, _ = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, weight, bias, mean, rstd)


def _differentiate(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    return *_layer_norm_backward(*ctx.saved_tensors, dy), None


_layer_norm.register_autograd(_differentiate, setup_context=_setup_context)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """Each row of x with mean 0 and variance 1, times weight plus bias, in Triton.

    Args:
        x: (..., N), float32, float16 or bfloat16, N at most 16,384; made contiguous where it is not.
        weight: (N,), in any of these dtypes.
        bias: (N,), in any of these dtypes.
        eps: added to the variance.

    Returns:
        (..., N), contiguous, in the dtype of x.

    Raises:
        UnsupportedInput: for arguments outside these.
    """
    raise_if_any(checks.against_layer_norm(x, weight, bias), "layer_norm", "triton", checks.REMEDY)
    reasons = launch.against(x=x, weight=weight, bias=bias)
    if x.shape[-1] > MAX_COLUMNS:
        reasons.insert(0, f"x has {x.shape[-1]} columns; at most {MAX_COLUMNS} fit in registers")
    raise_if_any(reasons, "layer_norm", "triton", launch.REMEDY)
    y: Tensor = _layer_norm(x, weight, bias, eps)[0]
    return y
