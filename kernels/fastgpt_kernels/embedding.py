"""Token plus position embedding, with dropout, forward and backward.

    y_bt = z_bt (W_tok + P_t)           tok = tokens_bt; W (V, N), P (at least T, N)
    dW_v = sum over b, t with tokens_bt = v of z_bt dy_bt
    dP_t = sum over b of z_bt dy_bt

z is the mask of dropout.py over the factor 1 - p, drawn again in the backward; it is 1 without dropout.

dW without atomics: the tokens are sorted, which keeps those that are equal in their order, and the sorted list is cut
into chunks of CHUNK. Within its chunk a program adds up each run of equal tokens. A run that lies in one chunk is done:
its sum is a row of dW. A run that crosses the border of a chunk leaves a partial sum on either side, at most two in a
chunk:

    chunk     0           1           2           3
    sorted    a a a b  |  b c d d  |  d d d d  |  d e e f
                    o     i   o       i           i          o: of a run that began here, i: of one that began before

A second kernel adds the partial sums of each such run into its row: o, and the i of the chunks after it as long as they
begin with the same token, ROWS of them at a time. A frequent token, of which a text of 65,536 may have 10,000, is thus
shared out among as many programs as it takes. Rows of tokens that do not occur stay zero, as do those of P from T on.

Limits: float32, float16 or bfloat16, both tables in one; any N. A token outside the table gives a row of NaN, and none
of its gradient reaches W.

Numerics: float32 sums of unrounded terms, in an order that depends on the tokens alone (dP: b ascending; dW: ascending
positions within a chunk, then the chunks); the factor 1 / (1 - p) multiplies the sums; one rounding.

Sources: Radford et al., "Improving Language Understanding by Generative Pre-Training" (2018), section 3.1 (the sum of
the two). Blelloch, "Prefix Sums and Their Applications" (1990), section 1.5 (segmented scans).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt_kernels import checks, launch
from fastgpt_kernels.checks import Seed
from fastgpt_kernels.dropout import keep
from fastgpt_kernels.seeds import seed_tensor

ROW_BLOCK, COLUMN_BLOCK = 16, 128  # tile of a program of the forward
CHUNK = 32  # sorted tokens of a program
GROUP = 4  # rows that are loaded before the first of them is needed
SUM_COLUMN_BLOCK = 256  # columns of a sum, by one warp
PARTIAL_ROWS = 16  # partial sums that are loaded together
POSITION_BLOCK = 4  # positions of a program


@triton.jit
def _forward_kernel(
    tokens_ptr,  # (B, T) integers
    token_table_ptr,  # (V, N)
    position_table_ptr,  # (at least T, N)
    seed_ptr,  # (1,) int64, or None: no dropout
    y_ptr,  # (B, T, N)
    stride_b,
    stride_t,
    rows,  # B T
    T,
    V,
    N,
    p,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    column_blocks = tl.cdiv(N, COLUMNS)
    column_block = tl.program_id(0) % column_blocks
    column = column_block * COLUMNS + tl.arange(0, COLUMNS)
    place = tl.program_id(0) // column_blocks * ROWS + tl.arange(0, ROWS)
    row, position = place.to(tl.int64), (place % T).to(tl.int64)
    inside = (place < rows)[:, None] & (column < N)[None, :]
    token = tl.load(tokens_ptr + row // T * stride_b + position * stride_t, mask=place < rows, other=0).to(tl.int64)
    known = (token >= 0) & (token < V)
    y = tl.load(
        token_table_ptr + token[:, None] * N + column[None, :], mask=inside & known[:, None], other=float("nan")
    ).to(tl.float32)
    y += tl.load(position_table_ptr + position[:, None] * N + column[None, :], mask=inside, other=0.0).to(tl.float32)
    if seed_ptr is not None:
        kept = _keep(tl.load(seed_ptr), row, column_block, p, N, ROWS, COLUMNS)
        y = tl.where(kept, y * (1.0 / (1.0 - p)), 0.0)
    tl.store(y_ptr + row[:, None] * N + column[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _run_sums_kernel(
    sorted_ptr,  # (n,) integers: the tokens in ascending order
    order_ptr,  # (n,) int64: the row of dy of each
    dy_ptr,  # (n, N)
    seed_ptr,  # (1,) int64, or None: no dropout
    dtable_ptr,  # (V, N), zeros; gets the sums of the runs that lie in one chunk
    partial_ptr,  # (2, chunks, N) float32: of a chunk's run that began before it, and of one that goes on after it
    n,
    V,
    N,
    p,
    CHUNK: tl.constexpr,
    GROUP: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    column_blocks = tl.cdiv(N, COLUMNS)
    column_block = tl.program_id(0) % column_blocks
    column = (column_block * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    chunk = tl.program_id(0) // column_blocks
    partial_ptr += chunk.to(tl.int64) * N + column
    other_partial = tl.cast(tl.cdiv(n, CHUNK), tl.int64) * N  # for one token, n is a constant

    token = tl.load(sorted_ptr + chunk * CHUNK).to(tl.int64)
    before = tl.load(sorted_ptr + chunk * CHUNK - 1, mask=chunk > 0, other=-1).to(tl.int64)
    total = tl.zeros((1, COLUMNS), tl.float32)
    for start in range(0, CHUNK, GROUP):
        first = chunk * CHUNK + start
        group = ()
        next_tokens = ()
        for i in tl.static_range(GROUP):
            # after the last token comes one that is no token
            next_token = tl.load(sorted_ptr + first + i + 1, mask=first + i + 1 < n, other=-1).to(tl.int64)
            next_tokens += (next_token,)
            place = first + i + tl.arange(0, 1)
            row = tl.load(order_ptr + place, mask=place < n, other=0)
            inside = (place < n)[:, None] & (column < N)
            dy = tl.load(dy_ptr + row[:, None] * N + column, mask=inside, other=0.0).to(tl.float32)
            if seed_ptr is not None:
                dy = tl.where(_keep(tl.load(seed_ptr), row, column_block, p, N, 1, COLUMNS), dy, 0.0)
            group += (dy,)
        for i in tl.static_range(GROUP):
            total += group[i]
            ends = next_tokens[i] != token
            known = (token >= 0) & (token < V)
            whole = (total * (1.0 / (1.0 - p))).to(dtable_ptr.dtype.element_ty)
            done = ends & (token != before) & known
            tl.store(dtable_ptr + token * N + column, whole, mask=column < tl.where(done, N, 0))
            at_border = first + i + 1 == (chunk + 1) * CHUNK
            leaves = (ends & (token == before)) | ((next_tokens[i] == token) & at_border)
            partial_row = partial_ptr + tl.where(token == before, 0, other_partial)
            tl.store(partial_row, total, mask=column < tl.where(leaves, N, 0))
            total = tl.where(ends, 0.0, total)
            token = next_tokens[i]


@triton.jit
def _join_runs_kernel(
    sorted_ptr,  # (n,) integers: the tokens in ascending order
    partial_ptr,  # (2, chunks, N) float32
    dtable_ptr,  # (V, N); gets the sums of the runs that cross chunks
    n,
    V,
    N,
    p,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    column_blocks = tl.cdiv(N, COLUMNS)
    column = tl.program_id(0) % column_blocks * COLUMNS + tl.arange(0, COLUMNS)
    chunk = tl.program_id(0) // column_blocks
    chunks = tl.cdiv(n, CHUNK)
    token = tl.load(sorted_ptr + tl.minimum(chunk * CHUNK + CHUNK, n) - 1).to(tl.int64)
    before = tl.load(sorted_ptr + chunk * CHUNK - 1, mask=chunk > 0, other=-1).to(tl.int64)
    following = tl.load(sorted_ptr + chunk * CHUNK + CHUNK, mask=chunk + 1 < chunks, other=-1).to(tl.int64)
    if (following == token) & (before != token) & (token >= 0) & (token < V):
        first_sum = tl.load(partial_ptr + (chunks + chunk).to(tl.int64) * N + column, mask=column < N, other=0.0)
        sums = tl.zeros((ROWS, COLUMNS), tl.float32)
        first = chunk + 1
        while following == token:
            later = first + tl.arange(0, ROWS)
            begins = tl.load(sorted_ptr + later * CHUNK, mask=later < chunks, other=-1).to(tl.int64)
            # sorted: the chunks that begin with the token are the first of these
            inside = (begins == token)[:, None] & (column < N)[None, :]
            sums += tl.load(partial_ptr + later.to(tl.int64)[:, None] * N + column[None, :], mask=inside, other=0.0)
            first += ROWS
            following = tl.load(sorted_ptr + first * CHUNK, mask=first < chunks, other=-1).to(tl.int64)
        whole = (first_sum + tl.sum(sums, 0)) * (1.0 / (1.0 - p))
        tl.store(dtable_ptr + token * N + column, whole.to(dtable_ptr.dtype.element_ty), mask=column < N)


@triton.jit
def _position_sums_kernel(
    dy_ptr,  # (B, T, N)
    seed_ptr,  # (1,) int64, or None: no dropout
    dtable_ptr,  # (rows, N), rows at least T
    B,
    T,
    rows,
    N,
    p,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    column_blocks = tl.cdiv(N, COLUMNS)
    column_block = tl.program_id(0) % column_blocks
    column = column_block * COLUMNS + tl.arange(0, COLUMNS)
    first_position = tl.program_id(0) // column_blocks * ROWS
    position = (first_position + tl.arange(0, ROWS)).to(tl.int64)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, tl.where(first_position < T, B, 0), GROUP):
        group = ()
        for i in tl.static_range(GROUP):
            row = tl.cast(first + i, tl.int64) * T + position
            inside = (position < tl.where(first + i < B, T, 0))[:, None] & (column < N)[None, :]
            dy = tl.load(dy_ptr + row[:, None] * N + column[None, :], mask=inside, other=0.0).to(tl.float32)
            if seed_ptr is not None:
                dy = tl.where(_keep(tl.load(seed_ptr), row, column_block, p, N, ROWS, COLUMNS), dy, 0.0)
            group += (dy,)
        for i in tl.static_range(GROUP):
            total += group[i]
    total *= 1.0 / (1.0 - p)
    written = (position < rows)[:, None] & (column < N)[None, :]
    tl.store(dtable_ptr + position[:, None] * N + column[None, :], total.to(dtable_ptr.dtype.element_ty), mask=written)


@triton.jit
def _keep(seed, row, column_block, p, N, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """What dropout keeps of a block of columns of some rows, (ROWS, COLUMNS)."""
    # `keep` wants to know the first column when it is compiled: to it, the block's first call of Philox starts a row
    return keep(seed, row * tl.cdiv(N, 4) + column_block * (COLUMNS // 4), p, 4, 0, ROWS, COLUMNS)


def launch_forward(
    tokens: Tensor, token_table: Tensor, position_table: Tensor, p: float = 0.0, seed: Tensor | None = None
) -> Tensor:
    """(B, T, N) from tokens (B, T) of any strides and contiguous tables."""
    B, T = tokens.shape
    V, N = token_table.shape
    y = token_table.new_empty((B, T, N))
    with launch.on_device_of(y):
        _forward_kernel[(triton.cdiv(B * T, ROW_BLOCK) * triton.cdiv(N, COLUMN_BLOCK),)](
            tokens,
            token_table,
            position_table,
            seed,
            y,
            *tokens.stride(),
            B * T,
            T,
            V,
            N,
            p,
            ROW_BLOCK,
            COLUMN_BLOCK,
            **launch.OPTIONS,
        )
    return y


def launch_token_gradient(tokens: Tensor, dy: Tensor, V: int, p: float = 0.0, seed: Tensor | None = None) -> Tensor:
    """The gradient (V, N) of the table of tokens from that of the output, a contiguous dy (B, T, N)."""
    n, N = tokens.numel(), dy.shape[-1]
    ordered, order = tokens.reshape(-1).sort(stable=True)
    dtable = dy.new_zeros((V, N))
    chunks, column_blocks = triton.cdiv(n, CHUNK), triton.cdiv(N, SUM_COLUMN_BLOCK)
    partial = dy.new_empty((2, chunks, N), dtype=torch.float32)
    with launch.on_device_of(dy):
        _run_sums_kernel[(chunks * column_blocks,)](
            ordered,
            order,
            dy,
            seed,
            dtable,
            partial,
            n,
            V,
            N,
            p,
            CHUNK,
            GROUP,
            SUM_COLUMN_BLOCK,
            num_warps=1,
            **launch.OPTIONS,
        )
        _join_runs_kernel[(chunks * triton.cdiv(N, COLUMN_BLOCK),)](
            ordered, partial, dtable, n, V, N, p, CHUNK, PARTIAL_ROWS, COLUMN_BLOCK, num_warps=2, **launch.OPTIONS
        )
    return dtable


def launch_position_gradient(dy: Tensor, rows: int, p: float = 0.0, seed: Tensor | None = None) -> Tensor:
    """The gradient (rows, N) of the table of positions from that of the output, a contiguous dy (B, T, N)."""
    B, T, N = dy.shape
    dtable = dy.new_empty((rows, N))
    with launch.on_device_of(dy):
        _position_sums_kernel[(triton.cdiv(rows, POSITION_BLOCK) * triton.cdiv(N, COLUMN_BLOCK),)](
            dy, seed, dtable, B, T, rows, N, p, GROUP, POSITION_BLOCK, COLUMN_BLOCK, num_warps=2, **launch.OPTIONS
        )
    return dtable


@torch.library.custom_op("fastgpt::embedding", mutates_args=())
def _embedding(tokens: Tensor, token_table: Tensor, position_table: Tensor, p: float, seed: Tensor | None) -> Tensor:
    return launch_forward(tokens, token_table.contiguous(), position_table.contiguous(), p, seed)


@_embedding.register_fake
def _(tokens: Tensor, token_table: Tensor, position_table: Tensor, p: float, seed: Tensor | None) -> Tensor:
    return token_table.new_empty((*tokens.shape, token_table.shape[1]))


@torch.library.custom_op("fastgpt::embedding_token_gradient", mutates_args=())
def _token_gradient(tokens: Tensor, dy: Tensor, V: int, p: float, seed: Tensor | None) -> Tensor:
    return launch_token_gradient(tokens, dy.contiguous(), V, p, seed)


@_token_gradient.register_fake
def _(tokens: Tensor, dy: Tensor, V: int, p: float, seed: Tensor | None) -> Tensor:
    return dy.new_empty((V, dy.shape[-1]))


@torch.library.custom_op("fastgpt::embedding_position_gradient", mutates_args=())
def _position_gradient(dy: Tensor, rows: int, p: float, seed: Tensor | None) -> Tensor:
    return launch_position_gradient(dy.contiguous(), rows, p, seed)


@_position_gradient.register_fake
def _(dy: Tensor, rows: int, p: float, seed: Tensor | None) -> Tensor:
    return dy.new_empty((rows, dy.shape[-1]))


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, float, Tensor | None], output: Tensor) -> None:
    tokens, token_table, position_table, ctx.p, seed = inputs
    ctx.rows = token_table.shape[0], position_table.shape[0]
    ctx.save_for_backward(tokens, seed)


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    tokens, seed = ctx.saved_tensors
    V, rows = ctx.rows
    _, of_tokens, of_positions, *_ = ctx.needs_input_grad
    dtokens = _token_gradient(tokens, dy, V, ctx.p, seed) if of_tokens else None
    dpositions = _position_gradient(dy, rows, ctx.p, seed) if of_positions else None
    return None, dtokens, dpositions, None, None


_embedding.register_autograd(_differentiate, setup_context=_setup_context)


def embedding(
    tokens: Tensor,
    token_table: Tensor,
    position_table: Tensor,
    *,
    dropout_p: float = 0.0,
    seed: Seed | None = None,
) -> Tensor:
    """Row tokens[b, t] of a table plus row t of another, and dropout, in one pass, in Triton.

    Args:
        tokens: (B, T) int64 or int32, any strides. For one that is not in [0, V), what is kept of its row is NaN, and
            nothing is added to the gradient of token_table.
        token_table: (V, N), float32, float16 or bfloat16; made contiguous where it is not.
        position_table: (at least T, N), in the dtype of token_table; made contiguous where it is not.
        dropout_p: probability, in [0, 1), of dropping an element of the sum.
        seed: int in [0, 2^63) or int64 tensor of one element; needed where dropout_p > 0.

    Returns:
        (B, T, N), contiguous, in the dtype of the tables. The mask is that of `dropout`.

    Raises:
        UnsupportedInput: for arguments outside these.
    """
    wrong = checks.against_embedding(tokens, token_table, position_table, dropout_p, seed)
    launch.refuse(
        "embedding", wrong, launch.against(token_table=token_table, position_table=position_table, tokens=tokens)
    )
    drawn = None if dropout_p == 0.0 or seed is None else seed_tensor(seed, tokens.device)
    y: Tensor = _embedding(tokens, token_table, position_table, dropout_p, drawn)
    return y
