"""GELU after a linear map, forward and backward: the up-projection of an MLP.

    u = x W^T + b    y = GELU(u)                x (rows, K), W (N, K), b (N,)
    du = dy GELU'(u)    dx = du W    dW = du^T x    db_n = sum over rows du_n

Kept for the backward, beside x and W: u, which contains the bias, in the dtype of x. Each direction goes one of two
ways.

Forward, fused: a matrix product whose epilogue adds the bias, writes u and applies GELU to it before it is rounded. Or
cuBLAS, with the bias in its epilogue, and one pass for GELU.

Backward, fused: the product for dx forms tiles of du from dy and u as it goes along N; the programs of the first block
of columns of dx also write du, for the product for dW, and their rows' sums of du, of which PyTorch adds the partial
sums into db. Or one pass for du and db, then cuBLAS. dW is cuBLAS's in both.

Which way is the faster depends on the GPU and on K and N. `linear_gelu_ways.json` says it for those that were timed:
arch (sm_90), K, N, the tile of forward and of backward or null for cuBLAS, and chosen_by, the GPU and the day. Nobody
has timed any yet. What is not listed goes to cuBLAS, as does float32. Nothing is added atomically, so that
a repeat gives the same bits.

Limits: float32, float16, bfloat16, one dtype for x, W and b; any rows, K and N.

Numerics: float32 sums; float32 products with all their bits in the fused ways, and as PyTorch's
`float32_matmul_precision` says ("highest", unless it is set) in cuBLAS's. u, du and the results are each rounded once;
db sums du before its rounding.

Sources: tiles and the grouped order of programs, which share rows and columns in the L2 cache: Tillet, Kung and Cox,
"Triton" (2019), and its tutorial on matrix products; GELU as in `gelu.py`.
"""

import functools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt_kernels import checks, gelu, launch
from fastgpt_kernels.checks import Approximate
from fastgpt_kernels.gelu import value_and_slope
from fastgpt_kernels.tiles import listed
from fastgpt_kernels.torch_ops.gelu import in_autocast_dtype

PATH = Path(__file__).with_name("linear_gelu_ways.json")
GROUP = 8  # blocks of rows whose programs run together


class Tile(NamedTuple):
    """How a fused product is cut: a program's rows and columns of the result, and the stretch of a turn of its loop."""

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int


class Ways(NamedTuple):
    """How each direction goes: fused with this tile, or by cuBLAS (None)."""

    forward: Tile | None
    backward: Tile | None


class Entry(NamedTuple):
    """One line of the table: the fastest ways in 16 bits on an architecture, and on what and when that was measured."""

    arch: str
    K: int
    N: int
    forward: Tile | None
    backward: Tile | None
    chosen_by: str


CUBLAS = Ways(None, None)
# What may be chosen in 16 bits, by direction and architecture: no tile spills registers where K and N are multiples of
# 16. Other sizes are right, too, but loaded in parts too small to be worth timing.
_AMPERE = {
    "forward": (Tile(128, 128, 32, 8, 3), Tile(128, 128, 32, 8, 4), Tile(128, 64, 64, 8, 3), Tile(64, 128, 64, 8, 3)),
    "backward": (Tile(64, 128, 64, 8, 3), Tile(64, 128, 32, 8, 4), Tile(64, 256, 32, 8, 3), Tile(64, 64, 64, 8, 3)),
}
_HOPPER = (Tile(64, 256, 64, 8, 3), Tile(64, 128, 64, 4, 4), Tile(128, 128, 32, 8, 4))
_CDNA = (Tile(128, 128, 32, 8, 2), Tile(128, 64, 64, 4, 2), Tile(64, 64, 64, 4, 2), Tile(64, 128, 32, 4, 2))
CANDIDATES = {
    ("forward", "sm_80"): _AMPERE["forward"],
    ("forward", "sm_89"): _AMPERE["forward"],
    ("forward", "sm_90"): (Tile(128, 128, 64, 8, 3), *_HOPPER),
    ("forward", "sm_100"): (Tile(128, 128, 64, 8, 3), *_HOPPER),
    ("forward", "gfx942"): _CDNA,
    ("backward", "sm_80"): _AMPERE["backward"],
    ("backward", "sm_89"): _AMPERE["backward"],
    ("backward", "sm_90"): (Tile(128, 256, 32, 8, 3), *_HOPPER),
    ("backward", "sm_100"): (Tile(128, 128, 64, 8, 3), *_HOPPER),
    ("backward", "gfx942"): _CDNA,
}


@triton.jit
def _forward_kernel(
    x_ptr,  # (rows, K)
    weight_ptr,  # (N, K)
    bias_ptr,  # (N,)
    y_ptr,  # (rows, N)
    u_ptr,  # (rows, N), or None where it is not kept
    rows,
    K,
    N,
    TANH: tl.constexpr,
    WHOLE: tl.constexpr,  # INNER divides K
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    GROUP: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    row_block, column_block = _place(tl.cdiv(rows, ROWS), tl.cdiv(N, COLUMNS), GROUP)
    row = row_block * ROWS + tl.arange(0, ROWS)
    column = column_block * COLUMNS + tl.arange(0, COLUMNS)
    inner = tl.arange(0, INNER)
    # rows and columns beyond the last repeat others, so that loads need no mask for them; nothing of them is stored
    x_tile = x_ptr + (row % rows).to(tl.int64)[:, None] * K + inner[None, :]
    weight_tile = weight_ptr + (column % N).to(tl.int64)[None, :] * K + inner[:, None]
    u = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, K, INNER):
        if WHOLE:
            x = tl.load(x_tile)
            weight = tl.load(weight_tile)
        else:
            x = tl.load(x_tile, mask=(inner < K - start)[None, :], other=0.0)
            weight = tl.load(weight_tile, mask=(inner < K - start)[:, None], other=0.0)
        u = launch.dot(x, weight, u, INTERPRETED)
        x_tile += INNER
        weight_tile += INNER
    u += tl.load(bias_ptr + column, mask=column < N, other=0.0).to(tl.float32)[None, :]
    offset = row.to(tl.int64)[:, None] * N + column[None, :]
    inside = (row < rows)[:, None] & (column < N)[None, :]
    if u_ptr is not None:
        tl.store(u_ptr + offset, u.to(u_ptr.dtype.element_ty), mask=inside)
    y, _ = value_and_slope(u, TANH)
    tl.store(y_ptr + offset, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    weight_ptr,  # (N, K)
    u_ptr,  # (rows, N)
    dy_ptr,  # (rows, N)
    dx_ptr,  # (rows, K)
    du_ptr,  # (rows, N)
    dbias_ptr,  # (blocks of rows, N) float32 partial sums
    rows,
    K,
    N,
    TANH: tl.constexpr,
    WHOLE: tl.constexpr,  # INNER divides N
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    GROUP: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    row_block, column_block = _place(tl.cdiv(rows, ROWS), tl.cdiv(K, COLUMNS), GROUP)
    row = row_block * ROWS + tl.arange(0, ROWS)
    column = column_block * COLUMNS + tl.arange(0, COLUMNS)
    inner = tl.arange(0, INNER)
    row_offset = row.to(tl.int64)[:, None] * N
    weight_tile = weight_ptr + inner.to(tl.int64)[:, None] * K + (column % K)[None, :]
    dx = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, N, INNER):
        n = start + inner
        # rows beyond the last would count in db
        inside = (row < rows)[:, None] & (n < N)[None, :]
        if WHOLE:
            inside = (row < rows)[:, None]
            weight = tl.load(weight_tile)
        else:
            weight = tl.load(weight_tile, mask=(n < N)[:, None], other=0.0)
        offset = row_offset + n[None, :]
        u = tl.load(u_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        _, slope = value_and_slope(u, TANH)
        du = dy * slope
        rounded = du.to(weight.dtype)
        if column_block == 0:
            tl.store(du_ptr + offset, rounded, mask=inside)
            tl.store(dbias_ptr + row_block.to(tl.int64) * N + n, tl.sum(du, 0), mask=n < N)
        dx = launch.dot(rounded, weight, dx, INTERPRETED)
        weight_tile += INNER * tl.cast(K, tl.int64)
    offset = row.to(tl.int64)[:, None] * K + column[None, :]
    inside = (row < rows)[:, None] & (column < K)[None, :]
    tl.store(dx_ptr + offset, dx.to(dx_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _place(row_blocks, column_blocks, GROUP: tl.constexpr):
    """The block of rows and of columns of this program: programs of GROUP blocks of rows run through all columns."""
    program = tl.program_id(0)
    first = program // (GROUP * column_blocks) * GROUP
    together = tl.minimum(row_blocks - first, GROUP)
    within = program % (GROUP * column_blocks)
    return first + within % together, within // together


def parse(text: str) -> tuple[Entry, ...]:
    """The table from its text."""
    rows: list[dict[str, Any]] = json.loads(text)
    directions = ("forward", "backward")
    return tuple(Entry(**row | {name: Tile(*row[name]) if row[name] else None for name in directions}) for row in rows)


def write(table: Iterable[Entry]) -> str:
    """The text of a table: one entry a line."""
    return "[\n" + ",\n".join(json.dumps(entry._asdict()) for entry in table) + "\n]\n"


@functools.cache
def measured() -> dict[tuple[str, int, int], Ways]:
    """The table, by architecture, K and N."""
    return {(entry.arch, entry.K, entry.N): Ways(entry.forward, entry.backward) for entry in parse(PATH.read_text())}


def chosen(device: torch.device, dtype: torch.dtype, K: int, N: int) -> Ways:
    """The ways of the table, or cuBLAS."""
    if dtype == torch.float32 or device.type != "cuda":
        return CUBLAS
    return measured().get((listed(launch.architecture(device)), K, N), CUBLAS)


def launch_forward(
    x: Tensor, weight: Tensor, bias: Tensor, approximate: str, tile: Tile | None, keep: bool = True
) -> tuple[Tensor, Tensor]:
    """y and u of contiguous x (rows, K), weight (N, K) and bias; u is empty where it is not to be kept.

    Args:
        x: the input.
        weight: the matrix.
        bias: (N,).
        approximate: "tanh" or "none".
        tile: of the fused product, or None for cuBLAS.
        keep: whether there will be a backward.
    """
    if tile is None:
        u = torch.addmm(bias, x, weight.t())
        return gelu.launch_gelu_forward(u, approximate), u if keep else x.new_empty(0)
    (rows, K), N = x.shape, len(weight)
    y = x.new_empty((rows, N))
    u = x.new_empty((rows, N) if keep else 0)
    with launch.on_device_of(x):
        _forward_kernel[(triton.cdiv(rows, tile.rows) * triton.cdiv(N, tile.columns),)](
            x,
            weight,
            bias,
            y,
            u if keep else None,
            rows,
            K,
            N,
            approximate == "tanh",
            K % tile.inner == 0,
            tile.rows,
            tile.columns,
            tile.inner,
            GROUP,
            launch.INTERPRETED,
            num_warps=tile.warps,
            num_stages=tile.stages,
            **launch.OPTIONS,
        )
    return y, u


def launch_backward(
    weight: Tensor, u: Tensor, dy: Tensor, approximate: str, tile: Tile | None, need_x: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """dx (empty where it is not needed), du and db from contiguous weight (N, K), u and dy (rows, N).

    Args:
        weight: the matrix.
        u: what GELU was applied to.
        dy: the gradient of its value.
        approximate: "tanh" or "none".
        tile: of the fused product, or None for cuBLAS.
        need_x: whether to compute dx.
    """
    if tile is None or not need_x:
        du, dbias = gelu.launch_bias_gelu_backward(u, None, dy, approximate)
        return du @ weight if need_x else u.new_empty(0), du, dbias
    (rows, N), K = u.shape, weight.shape[1]
    dx = u.new_empty((rows, K))
    du = torch.empty_like(u)
    row_blocks = triton.cdiv(rows, tile.rows)
    dbias = torch.empty((row_blocks, N), dtype=torch.float32, device=u.device)
    with launch.on_device_of(u):
        _backward_kernel[(row_blocks * triton.cdiv(K, tile.columns),)](
            weight,
            u,
            dy,
            dx,
            du,
            dbias,
            rows,
            K,
            N,
            approximate == "tanh",
            N % tile.inner == 0,
            tile.rows,
            tile.columns,
            tile.inner,
            GROUP,
            launch.INTERPRETED,
            num_warps=tile.warps,
            num_stages=tile.stages,
            **launch.OPTIONS,
        )
    return dx, du, dbias.sum(0).to(u.dtype)


@torch.library.custom_op("fastgpt::linear_gelu", mutates_args=())
def _linear_gelu(x: Tensor, weight: Tensor, bias: Tensor, approximate: str, keep: bool) -> tuple[Tensor, Tensor]:
    N, K = weight.shape
    tile = chosen(x.device, x.dtype, K, N).forward
    # a product in a custom op is seen by autocast a second time
    with torch.autocast(x.device.type, enabled=False):
        y, u = launch_forward(
            x.reshape(-1, K).contiguous(), weight.contiguous(), bias.contiguous(), approximate, tile, keep
        )
    return y.view(*x.shape[:-1], N), u


@_linear_gelu.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, approximate: str, keep: bool) -> tuple[Tensor, Tensor]:
    N, K = weight.shape
    return x.new_empty((*x.shape[:-1], N)), x.new_empty((x.numel() // K, N) if keep else 0)


@torch.library.custom_op("fastgpt::linear_gelu_backward", mutates_args=())
def _linear_gelu_backward(
    weight: Tensor, u: Tensor, dy: Tensor, approximate: str, need_x: bool
) -> tuple[Tensor, Tensor, Tensor]:
    N, K = weight.shape
    tile = chosen(u.device, u.dtype, K, N).backward
    with torch.autocast(u.device.type, enabled=False):
        return launch_backward(weight.contiguous(), u, dy.reshape(-1, N).contiguous(), approximate, tile, need_x)


@_linear_gelu_backward.register_fake
def _(weight: Tensor, u: Tensor, dy: Tensor, approximate: str, need_x: bool) -> tuple[Tensor, Tensor, Tensor]:
    N, K = weight.shape
    # not len(u), which would make the compiler's graph one for that number of rows
    return u.new_empty((u.shape[0], K) if need_x else 0), u.new_empty(u.shape), u.new_empty(N)


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, str, bool], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, ctx.approximate, _ = inputs
    ctx.save_for_backward(x, weight, output[1])


def _differentiate(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, u = ctx.saved_tensors
    need_x = ctx.needs_input_grad[0]
    dx, du, dbias = _linear_gelu_backward(weight, u, dy, ctx.approximate, need_x)
    dweight = None
    if ctx.needs_input_grad[1]:
        with torch.autocast(x.device.type, enabled=False):
            dweight = du.t() @ x.reshape(-1, x.shape[-1])
    return dx.view(x.shape) if need_x else None, dweight, dbias, None, None


_linear_gelu.register_autograd(_differentiate, setup_context=_setup)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor, approximate: Approximate = "tanh") -> Tensor:
    """GELU of x weight^T + bias, in Triton and cuBLAS; only u = x weight^T + bias is kept beside the inputs.

    Args:
        x: (..., K), float32, float16 or bfloat16; made contiguous where it is not.
        weight: (N, K), as in nn.Linear, in the dtype of x.
        bias: (N,), in the dtype of x. Under autocast, all three are cast to its dtype.
        approximate: "tanh" (GPT's) or "none" (exact, with erf).

    Returns:
        (..., N) in the dtype of x, contiguous.

    Raises:
        UnsupportedInput: for arguments outside these.
    """
    wrong = checks.against_linear_gelu(x, weight, bias, approximate)
    launch.refuse("linear_gelu", wrong, launch.against(x=x, weight=weight, bias=bias))
    x, weight, bias = in_autocast_dtype(x, weight, bias)
    keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, weight, bias))
    y: Tensor = _linear_gelu(x, weight, bias, approximate, keep)[0]
    return y
