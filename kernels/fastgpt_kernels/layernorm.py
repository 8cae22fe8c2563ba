"""Layer normalisation over the last dimension, alone and of a residual sum, forward and backward.

For each row x of N columns, with weight w and bias b:

    mean = sum_n x_n / N        rstd = 1 / sqrt(sum_n (x_n - mean)^2 / N + eps)
    y_n  = h_n w_n + b_n        h_n = (x_n - mean) rstd

    g_n  = dy_n w_n
    dx_n = rstd (g_n - mean(g) - h_n mean(g h))
    dw_n = sum over rows dy_n h_n
    db_n = sum over rows dy_n

add_layer_norm normalises s = residual + dropout(x), rounded to the residual's dtype, and returns s as well. With ds
the gradient of s from elsewhere, and z the mask of dropout.py over the factor 1 - p:

    d_residual = ds + dLN, with dLN the dx above        dx = z d_residual

The forward holds a row in registers, takes the variance from the centred values and corrects the mean by their sum;
it keeps mean and rstd. The backward runs a fixed number of programs, each over its own rows, with one partial sum of
dw and db each; PyTorch adds the partial sums. Nothing is added atomically, so that a repeat on the same device gives
the same bits. Rows too wide for the registers to hold those sums as well are read a second time, by a kernel over
blocks of columns.

Triton's tensors have powers of two elements. A row is therefore held in pieces, each a power of two: 768 = 3 x 256,
1600 = 1024 + 512 + 64, 5120 = 5 x 1024. No lane of these is empty; three pieces cover every other width to within an
eighth.

Limits: up to 16,384 columns; x in float32, float16 or bfloat16, weight and bias in any of the three, residual in the
dtype of x or float32.

Numerics: statistics and sums in float32, kept in float32; one rounding to the output's dtype. s is rounded before its
statistics are taken, so that the backward, which reads s, sees the numbers that were normalised.

Source: Ba, Kiros and Hinton, "Layer Normalization" (2016), section 3.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt_kernels import checks, launch
from fastgpt_kernels.checks import Seed
from fastgpt_kernels.dropout import _dropout, keep
from fastgpt_kernels.seeds import seed_tensor

MAX_COLUMNS = 16_384
# the widest row whose parameter gradients fit in registers beside it
MAX_COLUMNS_IN_ONE_PASS = 8_192
# narrow rows share a program; the backward holds more of each
TILE_ELEMENTS, BACKWARD_TILE_ELEMENTS = 4_096, 2_048
SMALLEST_PIECE = 16
# a multiple of so large a power of two is held in equal pieces, whose sums need one reduction across threads
SMALLEST_EQUAL_PIECE = 128
LARGEST_EQUAL_PIECE = 4_096  # the smaller the pieces, the fewer numbers a sum of several holds at a time
WARPS_PER_MULTIPROCESSOR = 16  # of the backward, whose programs stay
COLUMN_BLOCK, ROW_BLOCK = 128, 32


@triton.jit
def _forward_kernel(
    x_ptr,  # (rows, N)
    residual_ptr,  # (rows, N), or None
    weight_ptr,  # (N,)
    bias_ptr,  # (N,)
    seed_ptr,  # (1,) int64, or None: no dropout
    y_ptr,  # (rows, N)
    sum_ptr,  # (rows, N), or None: residual + dropout(x)
    mean_ptr,  # (rows,) float32, kept for the backward
    rstd_ptr,  # (rows,) float32, kept for the backward
    rows,
    eps,
    p,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    PIECES: tl.constexpr,  # (first column, columns) of each
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    x = ()
    for i in tl.static_range(len(PIECES)):
        piece = _load(x_ptr, row, rows, N, PIECES[i][0], PIECES[i][1])
        if seed_ptr is not None:
            piece = _drop(piece, tl.load(seed_ptr), row, p, N, PIECES[i][0], ROWS, PIECES[i][1])
        if residual_ptr is not None:
            piece += _load(residual_ptr, row, rows, N, PIECES[i][0], PIECES[i][1])
            piece = _store(sum_ptr, piece, row, rows, N, PIECES[i][0], PIECES[i][1])
        x = x + (piece,)

    mean = _row_sums(x, PIECES) / N
    centred = ()
    squares = ()
    for i in tl.static_range(len(PIECES)):
        # padding lanes hold 0, not mean: unmasked they would add mean^2 to the variance
        piece = tl.where(_inside(row, rows, N, PIECES[i][0], PIECES[i][1]), x[i] - mean[:, None], 0.0)
        centred = centred + (piece,)
        squares = squares + (piece * piece,)
    # what the first sum lost by rounding, which counts where the mean is large beside the spread
    rest = _row_sums(centred, PIECES) / N
    rstd = 1.0 / tl.sqrt(_row_sums(squares, PIECES) / N - rest * rest + eps)
    for i in tl.static_range(len(PIECES)):
        weight = _load_vector(weight_ptr, N, PIECES[i][0], PIECES[i][1])
        bias = _load_vector(bias_ptr, N, PIECES[i][0], PIECES[i][1])
        y = (centred[i] - rest[:, None]) * rstd[:, None] * weight + bias
        _store(y_ptr, y, row, rows, N, PIECES[i][0], PIECES[i][1])
    tl.store(mean_ptr + row, mean + rest, mask=row < rows)
    tl.store(rstd_ptr + row, rstd, mask=row < rows)


@triton.jit
def _backward_kernel(
    x_ptr,  # (rows, N), what was normalised
    weight_ptr,  # (N,)
    seed_ptr,  # (1,) int64, or None: no dropout
    dy_ptr,  # (rows, N)
    dsum_ptr,  # (rows, N), or None: a gradient of what was normalised from elsewhere
    mean_ptr,  # (rows,) float32
    rstd_ptr,  # (rows,) float32
    dx_ptr,  # (rows, N)
    ddropped_ptr,  # (rows, N), or None: dx through the mask, or in another dtype
    dweight_ptr,  # (programs, N) float32 partial sums, or None
    dbias_ptr,  # (programs, N) float32 partial sums, or None
    rows,
    p,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    PIECES: tl.constexpr,
):
    program, programs = tl.program_id(0), tl.num_programs(0)
    dweight = ()
    dbias = ()
    for i in tl.static_range(len(PIECES)):
        dweight = dweight + (_zeros(ROWS, PIECES[i][1]),)
        dbias = dbias + (_zeros(ROWS, PIECES[i][1]),)

    for tile in range(program, tl.cdiv(rows, ROWS), programs):
        row = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)
        mean = tl.load(mean_ptr + row, mask=row < rows, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)[:, None]
        # padding lanes need no mask here: each term below has a factor dy or weight, which are 0 there
        normed = ()
        g = ()
        products = ()
        new_dweight = ()
        new_dbias = ()
        for i in tl.static_range(len(PIECES)):
            h = (_load(x_ptr, row, rows, N, PIECES[i][0], PIECES[i][1]) - mean) * rstd
            dy = _load(dy_ptr, row, rows, N, PIECES[i][0], PIECES[i][1])
            if dweight_ptr is not None:
                new_dweight = new_dweight + (dweight[i] + dy * h,)
                new_dbias = new_dbias + (dbias[i] + dy,)
            dy *= _load_vector(weight_ptr, N, PIECES[i][0], PIECES[i][1])
            normed = normed + (h,)
            g = g + (dy,)
            products = products + (dy * h,)
        if dweight_ptr is not None:
            dweight = new_dweight
            dbias = new_dbias
        mean_g = (_row_sums(g, PIECES) / N)[:, None]
        mean_gh = (_row_sums(products, PIECES) / N)[:, None]
        for i in tl.static_range(len(PIECES)):
            dx = (g[i] - mean_g - normed[i] * mean_gh) * rstd
            if dsum_ptr is not None:
                dx += _load(dsum_ptr, row, rows, N, PIECES[i][0], PIECES[i][1])
            _store(dx_ptr, dx, row, rows, N, PIECES[i][0], PIECES[i][1])
            if ddropped_ptr is not None:
                if seed_ptr is not None:
                    dx = _drop(dx, tl.load(seed_ptr), row, p, N, PIECES[i][0], ROWS, PIECES[i][1])
                _store(ddropped_ptr, dx, row, rows, N, PIECES[i][0], PIECES[i][1])

    if dweight_ptr is not None:
        for i in tl.static_range(len(PIECES)):
            _store_sums(dweight_ptr, dweight[i], program, N, PIECES[i][0], PIECES[i][1])
            _store_sums(dbias_ptr, dbias[i], program, N, PIECES[i][0], PIECES[i][1])


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


@triton.jit
def _inside(row, rows, N: tl.constexpr, START: tl.constexpr, COLUMNS: tl.constexpr):
    """Which elements of a piece are elements of the matrix."""
    inside = (row < rows)[:, None]
    if START + COLUMNS > N:
        inside = inside & (START + tl.arange(0, COLUMNS) < N)[None, :]
    return inside


@triton.jit
def _load(ptr, row, rows, N: tl.constexpr, START: tl.constexpr, COLUMNS: tl.constexpr):
    """A piece of some rows, (ROWS, COLUMNS) float32."""
    offset = row[:, None] * N + (START + tl.arange(0, COLUMNS))[None, :]
    return tl.load(ptr + offset, mask=_inside(row, rows, N, START, COLUMNS), other=0.0).to(tl.float32)


@triton.jit
def _load_vector(ptr, N: tl.constexpr, START: tl.constexpr, COLUMNS: tl.constexpr):
    """A piece of one row that all rows share, (1, COLUMNS) float32."""
    column = START + tl.arange(0, COLUMNS)
    return tl.load(ptr + column, mask=column < N, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _store(ptr, values, row, rows, N: tl.constexpr, START: tl.constexpr, COLUMNS: tl.constexpr):
    """Store a piece of some rows, and return it as rounded."""
    offset = row[:, None] * N + (START + tl.arange(0, COLUMNS))[None, :]
    rounded = values.to(ptr.dtype.element_ty)
    tl.store(ptr + offset, rounded, mask=_inside(row, rows, N, START, COLUMNS))
    return rounded.to(tl.float32)


@triton.jit
def _store_sums(ptr, values, program, N: tl.constexpr, START: tl.constexpr, COLUMNS: tl.constexpr):
    """Store a piece of one program's partial sums."""
    column = START + tl.arange(0, COLUMNS)
    tl.store(ptr + program.to(tl.int64) * N + column, tl.sum(values, 0), mask=column < N)


@triton.jit
def _zeros(ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    return tl.zeros((ROWS, COLUMNS), tl.float32)


@triton.jit
def _drop(values, seed, row, p, N: tl.constexpr, START: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Dropout of a piece of some rows."""
    return tl.where(keep(seed, row, p, N, START, ROWS, COLUMNS), values * (1.0 / (1.0 - p)), 0.0)


@triton.jit
def _row_sums(pieces, PIECES: tl.constexpr):
    """The sum of each row, (ROWS,); pieces of one size are added before the reduction across threads."""
    equal = pieces[0]
    total = 0.0
    for i in tl.static_range(1, len(PIECES)):
        if PIECES[i][1] == PIECES[i - 1][1]:
            equal += pieces[i]
        else:
            total += tl.sum(equal, 1)
            equal = pieces[i]
    return total + tl.sum(equal, 1)


class Tile(NamedTuple):
    """The rows of a program at a time, and how it holds them."""

    rows: int
    pieces: tuple[tuple[int, int], ...]  # (first column, columns)
    warps: int


def tile(N: int, elements: int = TILE_ELEMENTS) -> Tile:
    """How a program holds rows of N columns, about so many elements."""
    sizes = piece_sizes(N)
    pieces = tuple((sum(sizes[:i]), size) for i, size in enumerate(sizes))
    rows = 1 << max(0, (elements // sum(sizes)).bit_length() - 1)
    return Tile(rows, pieces, min(16, max(4, triton.next_power_of_2(sum(sizes)) // 1024)))


def piece_sizes(N: int) -> list[int]:
    """Powers of two, none larger than the one before, that cover N columns."""
    factor = min(N & -N, LARGEST_EQUAL_PIECE)  # a power of two that divides N
    if N // factor <= 7 and (factor >= SMALLEST_EQUAL_PIECE or N == factor >= SMALLEST_PIECE):
        return [factor] * (N // factor)
    sizes: list[int] = []
    rest = N
    while rest > 0:
        size = 1 << rest.bit_length() - 1 if len(sizes) < 2 else triton.next_power_of_2(rest)
        sizes.append(max(SMALLEST_PIECE, size))
        rest -= sizes[-1]
    padded = max(SMALLEST_PIECE, triton.next_power_of_2(N))
    return sizes if sum(sizes) < padded else [padded]


def launch_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    residual: Tensor | None = None,
    p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, what was normalised (x itself without a residual), and mean and rstd of each row; all are contiguous."""
    N = x.shape[-1]
    rows = x.numel() // N
    y = torch.empty_like(x)
    total = None if residual is None else torch.empty_like(residual)
    mean = torch.empty(rows, dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    shape = tile(N)
    with launch.on_device_of(x):
        _forward_kernel[(triton.cdiv(rows, shape.rows),)](
            x,
            residual,
            weight,
            bias,
            seed,
            y,
            total,
            mean,
            rstd,
            rows,
            eps,
            p,
            N,
            shape.rows,
            shape.pieces,
            num_warps=shape.warps,
            **launch.OPTIONS,
        )
    return y, x if total is None else total, mean, rstd


def launch_backward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    dy: Tensor,
    dsum: Tensor | None = None,
    p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x (what was normalised), weight, bias, and of what was dropped and added to make x.

    All are contiguous. The last has the dtype of dy; it is the first where the two are the same numbers.
    """
    N = x.shape[-1]
    rows = mean.numel()
    dx = torch.empty_like(x)
    ddropped = None if seed is None and dy.dtype == x.dtype else torch.empty_like(dy)
    shape = tile(N, BACKWARD_TILE_ELEMENTS)
    tiles = triton.cdiv(rows, shape.rows)
    programs = min(tiles, launch.multiprocessors(x.device) * (WARPS_PER_MULTIPROCESSOR // shape.warps))
    one_pass = N <= MAX_COLUMNS_IN_ONE_PASS
    parameter_programs = programs if one_pass else launch.partial_sums(x.device, triton.cdiv(rows, 8 * ROW_BLOCK))
    dweight = torch.empty((parameter_programs, N), dtype=torch.float32, device=x.device)
    dbias = torch.empty_like(dweight)
    sums = (dweight, dbias) if one_pass else (None, None)
    with launch.on_device_of(x):
        _backward_kernel[(programs,)](
            x,
            weight,
            seed,
            dy,
            dsum,
            mean,
            rstd,
            dx,
            ddropped,
            *sums,
            rows,
            p,
            N,
            shape.rows,
            shape.pieces,
            num_warps=shape.warps,
            **launch.with_all_registers(x.device, shape.warps),
        )
        if not one_pass:
            _backward_parameters_kernel[(parameter_programs, triton.cdiv(N, COLUMN_BLOCK))](
                x, dy, mean, rstd, dweight, dbias, rows, N, ROW_BLOCK, COLUMN_BLOCK, num_warps=4, **launch.OPTIONS
            )
    gradients = dweight.sum(0).to(weight.dtype), dbias.sum(0).to(bias.dtype)
    return dx, *gradients, dx if ddropped is None else ddropped


@torch.library.custom_op("fastgpt::layer_norm", mutates_args=())
def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    y, _, mean, rstd = launch_forward(x.contiguous(), weight.contiguous(), bias.contiguous(), eps)
    return y, mean, rstd


@_layer_norm.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    rows = x.numel() // x.shape[-1]
    return x.new_empty(x.shape), x.new_empty(rows, dtype=torch.float32), x.new_empty(rows, dtype=torch.float32)


@torch.library.custom_op("fastgpt::layer_norm_backward", mutates_args=())
def _layer_norm_backward(
    x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, dy: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return launch_backward(x.contiguous(), weight.contiguous(), bias, mean, rstd, dy.contiguous())[:3]


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


@torch.library.custom_op("fastgpt::add_layer_norm", mutates_args=())
def _add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, p: float, seed: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return launch_forward(x.contiguous(), weight.contiguous(), bias.contiguous(), eps, residual.contiguous(), p, seed)


@_add_layer_norm.register_fake
def _(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, p: float, seed: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = x.numel() // x.shape[-1]
    return (
        x.new_empty(x.shape),
        residual.new_empty(residual.shape),
        x.new_empty(rows, dtype=torch.float32),
        x.new_empty(rows, dtype=torch.float32),
    )


@torch.library.custom_op("fastgpt::add_layer_norm_backward", mutates_args=())
def _add_layer_norm_backward(
    s: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    dy: Tensor,
    ds: Tensor | None,
    p: float,
    seed: Tensor | None,
) -> list[Tensor]:
    """The gradients of residual, weight, bias, and of x where it is not that of residual: an op returns no aliases."""
    ds = None if ds is None else ds.contiguous()
    *gradients, dx = launch_backward(s, weight.contiguous(), bias, mean, rstd, dy.contiguous(), ds, p, seed)
    return gradients if dx is gradients[0] else [*gradients, dx]


@_add_layer_norm_backward.register_fake
def _(
    s: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    dy: Tensor,
    ds: Tensor | None,
    p: float,
    seed: Tensor | None,
) -> list[Tensor]:
    gradients = [s.new_empty(s.shape), weight.new_empty(weight.shape), bias.new_empty(bias.shape)]
    return gradients if seed is None and dy.dtype == s.dtype else [*gradients, dy.new_empty(dy.shape)]


def _setup_add_context(
    ctx: Any,
    inputs: tuple[Tensor, Tensor, Tensor, Tensor, float, float, Tensor | None],
    output: tuple[Tensor, Tensor, Tensor, Tensor],
) -> None:
    x, _, weight, bias, _, ctx.p, seed = inputs
    _, s, mean, rstd = output
    ctx.dtype = x.dtype
    ctx.mark_non_differentiable(mean, rstd)
    # a block that uses one of the two results only pays for no gradient of the other
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(s, weight, bias, mean, rstd, seed)


def _differentiate_add(ctx: Any, dy: Tensor | None, ds: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    s, weight, bias, mean, rstd, seed = ctx.saved_tensors
    if dy is not None:
        dresidual, dweight, dbias, *dx = _add_layer_norm_backward(s, weight, bias, mean, rstd, dy, ds, ctx.p, seed)
        return dx[0] if dx else dresidual, dresidual, dweight, dbias, None, None, None
    if ds is None:
        return (None,) * 7
    if seed is None:
        return ds.to(ctx.dtype), ds, None, None, None, None, None
    dx = _dropout(ds, ctx.p, seed, ctx.dtype)
    return dx, ds, None, None, None, None, None


_add_layer_norm.register_autograd(_differentiate_add, setup_context=_setup_add_context)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """Each row of x with mean 0 and variance 1, times weight plus bias, in Triton.

    Args:
        x: (..., N), float32, float16 or bfloat16, N at most 16,384; made contiguous where it is not.
        weight: (N,), in any of these dtypes.
        bias: (N,), in any of these dtypes.
        eps: added to the variance; at least 0.

    Returns:
        (..., N), contiguous, in the dtype of x.

    Raises:
        UnsupportedInput: for arguments outside these.
    """
    wrong = checks.against_layer_norm(x, weight, bias, eps)
    launch.refuse("layer_norm", wrong, _against_width(x) + launch.against(x=x, weight=weight, bias=bias))
    y: Tensor = _layer_norm(x, weight, bias, eps)[0]
    return y


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    *,
    dropout_p: float = 0.0,
    seed: Seed | None = None,
) -> tuple[Tensor, Tensor]:
    """The layer norm of s = residual + dropout(x), and s, in one pass forward and one backward, in Triton.

    Args:
        x: (..., N), float32, float16 or bfloat16, N at most 16,384; made contiguous where it is not.
        residual: (..., N), in the dtype of x or float32; made contiguous where it is not.
        weight: (N,), in any of these dtypes.
        bias: (N,), in any of these dtypes.
        eps: added to the variance; at least 0.
        dropout_p: probability, in [0, 1), of dropping an element of x.
        seed: int in [0, 2^63) or int64 tensor of one element; needed where dropout_p > 0.

    Returns:
        The normalised s in the dtype of x, and s in the dtype of residual; both (..., N), contiguous. The mask is that
        of `dropout`.

    Raises:
        UnsupportedInput: for arguments outside these.
    """
    wrong = checks.against_add_layer_norm(x, residual, weight, bias, eps, dropout_p, seed)
    unfit = _against_width(x) + launch.against(x=x, residual=residual, weight=weight, bias=bias)
    launch.refuse("add_layer_norm", wrong, unfit)
    drawn = None if dropout_p == 0.0 or seed is None else seed_tensor(seed, x.device)
    normed, s, _, _ = _add_layer_norm(x, residual, weight, bias, eps, dropout_p, drawn)
    return normed, s


def _against_width(x: Tensor) -> list[str]:
    if not isinstance(x, Tensor) or x.dim() == 0 or x.shape[-1] <= MAX_COLUMNS:
        return []
    return [f"x has {checks.shape_of(x)[-1]} columns; at most {MAX_COLUMNS} fit in registers"]
