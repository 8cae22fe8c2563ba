"""Causal self-attention over a packed projection, forward and backward, without the (T, T) weights in memory.

For each batch entry and head, with q_i, k_j, v_j in R^D read in place from qkv (B, T, 3, H, D):

    s_ij = scale q_i . k_j    for j <= i
    p_ij = exp(s_ij) / sum_j' exp(s_ij')
    o_i  = sum_j z_ij p_ij v_j        z_ij = 1 / (1 - dropout_p) where kept, else 0; 1 without dropout

The forward visits the keys in tiles with a running maximum m_i and sum l_i, and keeps m_i + log2(l_i) for the backward:

    dv_j  = sum_i z_ij p_ij do_i
    dp_ij = z_ij do_i . v_j
    ds_ij = p_ij (dp_ij - delta_i)    delta_i = sum_j p_ij dp_ij = do_i . o_i
    dq_i  = scale sum_j ds_ij k_j
    dk_j  = scale sum_i ds_ij q_i

One kernel computes dq (and delta) for a tile of queries, another dk and dv for a tile of keys: each output has one
writer, so that nothing is added atomically and a repeat gives the same bits. Tiles wholly in the future are never
visited, and only those that the diagonal cuts are masked.

The dropout mask comes from Philox 4x32-10 with the seed as key and (head, i, j) as counter: it is the same in the
forward and the backward and does not depend on the tile sizes, and no mask is stored.

Limits: head sizes 16 to 128, float32, float16, bfloat16; any T >= 1, any strides. A head size between powers of two is
split into two pieces (80 = 64 + 16, 96 = 64 + 32) rather than padded.

Numerics: products in the input's dtype with float32 sums (float32 input: full precision, no tf32); softmax in float32
in base 2; the weights and ds are rounded to the input's dtype before their products.

Source: Dao, "FlashAttention-2" (2023), sections 3.1 and 3.2, algorithms 1 and 2. Salmon et al., "Parallel random
numbers: as easy as 1, 2, 3" (2011), section 3.3 (Philox).
"""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt_kernels import checks, launch
from fastgpt_kernels.checks import Seed
from fastgpt_kernels.errors import raise_if_any
from fastgpt_kernels.launch import dot
from fastgpt_kernels.seeds import seed_tensor

MIN_HEAD_SIZE, MAX_HEAD_SIZE = 16, 128

_INTERPRETED = tl.constexpr(launch.INTERPRETED)
_LOG2_E = tl.constexpr(math.log2(math.e))


class Tiles(NamedTuple):
    """How one kernel is cut: queries and keys in a tile, and Triton's warps and pipeline stages."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int


# Head sizes that are no multiple of 16 are loaded in small parts, which takes registers: one entry for all of them.
UNALIGNED = 0

# By kernel, then by bits of the dtype and largest head size, for every GPU; then the 16-bit tiles by least compute
# capability. No tile spills registers or exceeds the shared memory of its architecture, with and without dropout:
# compile_report.py shows it. Full-precision float32 products take no tensor cores, hence small tiles.
TILES: dict[str, dict[tuple[int, int], Tiles]] = {
    "forward": {
        (16, UNALIGNED): Tiles(128, 16, 8, 2),
        (32, UNALIGNED): Tiles(16, 16, 8, 1),
        (32, 64): Tiles(32, 32, 8, 1),
        (32, 128): Tiles(16, 16, 8, 1),
    },
    "backward_queries": {
        (16, UNALIGNED): Tiles(128, 16, 8, 2),
        (32, UNALIGNED): Tiles(16, 16, 8, 1),
        (32, 128): Tiles(16, 16, 8, 1),
    },
    "backward_keys": {
        (16, UNALIGNED): Tiles(16, 128, 8, 2),
        (32, UNALIGNED): Tiles(16, 16, 8, 1),
        (32, 48): Tiles(16, 16, 8, 1),
        (32, 128): Tiles(16, 32, 8, 1),
    },
}
TILES_BY_CAPABILITY: dict[int, dict[str, dict[tuple[int, int], Tiles]]] = {
    90: {
        "forward": {(16, 96): Tiles(128, 64, 8, 3), (16, 128): Tiles(128, 32, 8, 3)},
        "backward_queries": {(16, 96): Tiles(128, 64, 8, 3), (16, 128): Tiles(128, 32, 8, 3)},
        "backward_keys": {(16, 64): Tiles(64, 128, 8, 3), (16, 128): Tiles(32, 128, 8, 3)},
    },
    0: {
        "forward": {(16, 64): Tiles(128, 64, 8, 2), (16, 128): Tiles(128, 32, 8, 2)},
        "backward_queries": {(16, 128): Tiles(128, 32, 8, 2)},
        "backward_keys": {
            (16, 32): Tiles(64, 64, 8, 2),
            (16, 64): Tiles(64, 128, 8, 2),
            (16, 80): Tiles(16, 128, 8, 1),
            (16, 128): Tiles(16, 128, 8, 2),
        },
    },
}


@triton.jit
def _forward_kernel(
    qkv_ptr,  # (B, T, 3, H, D)
    out_ptr,  # (B, T, H, D), contiguous
    lse_ptr,  # (B, H, T) float32: log2 of the sum over j of exp(s_ij), for the backward
    seed_ptr,  # (1,) int64, or None without dropout
    stride_b,
    stride_t,
    stride_s,  # between q, k and v
    stride_h,
    stride_d,
    T,
    H,
    scale,
    dropout_p,
    D: tl.constexpr,
    MAIN: tl.constexpr,  # D = MAIN columns and a TAIL, both padded to a power of two
    TAIL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    tile, head, batch_head = _tile_of_program(tl.cdiv(T, BLOCK_M), H)
    # the last queries see the most keys: start with them, so that the short tiles fill the end
    first_query = (tl.cdiv(T, BLOCK_M) - 1 - tile) * BLOCK_M
    q_ptr = qkv_ptr + (batch_head // H).to(tl.int64) * stride_b + head * stride_h
    q, q_tail = _load(q_ptr, first_query, T, stride_t, stride_d, BLOCK_M, D, MAIN, TAIL, True)

    row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, MAIN), tl.float32)
    acc_tail = tl.zeros((BLOCK_M, TAIL if TAIL else 16), tl.float32)
    seed = tl.load(seed_ptr) if seed_ptr is not None else None
    scale_log2 = scale * _LOG2_E

    for DIAGONAL in tl.static_range(2):
        # keys before the tile's first query need no mask; then those that the diagonal cuts
        first = first_query // BLOCK_N * BLOCK_N if DIAGONAL else 0
        last = tl.minimum(first_query + BLOCK_M, T) if DIAGONAL else first_query // BLOCK_N * BLOCK_N
        for first_key in range(first, last, BLOCK_N):
            k, k_tail = _load(q_ptr + stride_s, first_key, T, stride_t, stride_d, BLOCK_N, D, MAIN, TAIL, DIAGONAL)
            products = _products(q, q_tail, k, k_tail, TAIL)
            if DIAGONAL:
                products = tl.where(_visible(first_query, first_key, BLOCK_M, BLOCK_N), products, float("-inf"))
            # the first tile holds key 0, which every query sees: from then on the maximum is finite
            new_max = tl.maximum(row_max, tl.max(products, 1) * scale_log2)
            weights = _exp2_of(products, scale_log2, new_max[:, None])
            shrink = tl.exp2(row_max - new_max)
            row_sum = row_sum * shrink + tl.sum(weights, 1)
            row_max = new_max
            if seed_ptr is not None:
                keep = _keep(seed, batch_head, first_query, first_key, dropout_p, BLOCK_M, BLOCK_N)
                weights = tl.where(keep, weights, 0.0)
            v, v_tail = _load(q_ptr + 2 * stride_s, first_key, T, stride_t, stride_d, BLOCK_N, D, MAIN, TAIL, DIAGONAL)
            weights = weights.to(v.dtype)
            acc = dot(weights, v, acc * shrink[:, None], _INTERPRETED)
            if TAIL:
                acc_tail = dot(weights, v_tail, acc_tail * shrink[:, None], _INTERPRETED)

    queries = first_query + tl.arange(0, BLOCK_M)
    tl.store(lse_ptr + batch_head.to(tl.int64) * T + queries, row_max + tl.log2(row_sum), mask=queries < T)
    if seed_ptr is not None:
        row_sum *= 1.0 - dropout_p
    out_ptr += ((batch_head // H).to(tl.int64) * T * H + head) * D
    acc /= row_sum[:, None]
    acc_tail /= row_sum[:, None]
    _store(out_ptr, acc, acc_tail, first_query, T, H * D, BLOCK_M, D, MAIN, TAIL)


@triton.jit
def _backward_queries_kernel(
    qkv_ptr,  # (B, T, 3, H, D)
    out_ptr,  # (B, T, H, D), contiguous
    dout_ptr,  # (B, T, H, D), contiguous
    lse_ptr,  # (B, H, T) float32, from the forward
    delta_ptr,  # (B, H, T) float32: written here, read by the kernel for keys
    dqkv_ptr,  # (B, T, 3, H, D), contiguous; this kernel writes dq
    seed_ptr,  # (1,) int64, or None without dropout
    stride_b,
    stride_t,
    stride_s,
    stride_h,
    stride_d,
    T,
    H,
    scale,
    dropout_p,
    D: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    tile, head, batch_head = _tile_of_program(tl.cdiv(T, BLOCK_M), H)
    first_query = (tl.cdiv(T, BLOCK_M) - 1 - tile) * BLOCK_M
    batch = (batch_head // H).to(tl.int64)
    q_ptr = qkv_ptr + batch * stride_b + head * stride_h
    out_offset = (batch * T * H + head) * D
    q, q_tail = _load(q_ptr, first_query, T, stride_t, stride_d, BLOCK_M, D, MAIN, TAIL, True)
    out, out_tail = _load(out_ptr + out_offset, first_query, T, H * D, 1, BLOCK_M, D, MAIN, TAIL, True)
    dout, dout_tail = _load(dout_ptr + out_offset, first_query, T, H * D, 1, BLOCK_M, D, MAIN, TAIL, True)

    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    if TAIL:
        delta += tl.sum(out_tail.to(tl.float32) * dout_tail.to(tl.float32), 1)
    queries = first_query + tl.arange(0, BLOCK_M)
    row_offset = batch_head.to(tl.int64) * T + queries
    tl.store(delta_ptr + row_offset, delta, mask=queries < T)
    lse = tl.load(lse_ptr + row_offset, mask=queries < T, other=float("inf"))

    dq = tl.zeros((BLOCK_M, MAIN), tl.float32)
    dq_tail = tl.zeros((BLOCK_M, TAIL if TAIL else 16), tl.float32)
    seed = tl.load(seed_ptr) if seed_ptr is not None else None
    scale_log2 = scale * _LOG2_E
    for DIAGONAL in tl.static_range(2):
        first = first_query // BLOCK_N * BLOCK_N if DIAGONAL else 0
        last = tl.minimum(first_query + BLOCK_M, T) if DIAGONAL else first_query // BLOCK_N * BLOCK_N
        for first_key in range(first, last, BLOCK_N):
            k, k_tail = _load(q_ptr + stride_s, first_key, T, stride_t, stride_d, BLOCK_N, D, MAIN, TAIL, DIAGONAL)
            v, v_tail = _load(q_ptr + 2 * stride_s, first_key, T, stride_t, stride_d, BLOCK_N, D, MAIN, TAIL, DIAGONAL)
            products = _products(q, q_tail, k, k_tail, TAIL)
            if DIAGONAL:
                products = tl.where(_visible(first_query, first_key, BLOCK_M, BLOCK_N), products, float("-inf"))
            weights = _exp2_of(products, scale_log2, lse[:, None])
            dweights = _products(dout, dout_tail, v, v_tail, TAIL)
            if seed_ptr is not None:
                keep = _keep(seed, batch_head, first_query, first_key, dropout_p, BLOCK_M, BLOCK_N)
                dweights = tl.where(keep, dweights * (1.0 / (1.0 - dropout_p)), 0.0)
            dscores = (weights * (dweights - delta[:, None])).to(k.dtype)
            dq = dot(dscores, k, dq, _INTERPRETED)
            if TAIL:
                dq_tail = dot(dscores, k_tail, dq_tail, _INTERPRETED)

    dq_ptr = dqkv_ptr + (batch * T * 3 * H + head) * D
    _store(dq_ptr, dq * scale, dq_tail * scale, first_query, T, 3 * H * D, BLOCK_M, D, MAIN, TAIL)


@triton.jit
def _backward_keys_kernel(
    qkv_ptr,  # (B, T, 3, H, D)
    dout_ptr,  # (B, T, H, D), contiguous
    lse_ptr,  # (B, H, T) float32, from the forward
    delta_ptr,  # (B, H, T) float32, from the kernel for queries
    dqkv_ptr,  # (B, T, 3, H, D), contiguous; this kernel writes dk and dv
    seed_ptr,  # (1,) int64, or None without dropout
    stride_b,
    stride_t,
    stride_s,
    stride_h,
    stride_d,
    T,
    H,
    scale,
    dropout_p,
    D: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # the first keys are seen by the most queries, and come first
    tile, head, batch_head = _tile_of_program(tl.cdiv(T, BLOCK_N), H)
    first_key = tile * BLOCK_N
    batch = (batch_head // H).to(tl.int64)
    q_ptr = qkv_ptr + batch * stride_b + head * stride_h
    dout_ptr += (batch * T * H + head) * D
    row_offset = batch_head.to(tl.int64) * T
    k, k_tail = _load(q_ptr + stride_s, first_key, T, stride_t, stride_d, BLOCK_N, D, MAIN, TAIL, True)
    v, v_tail = _load(q_ptr + 2 * stride_s, first_key, T, stride_t, stride_d, BLOCK_N, D, MAIN, TAIL, True)

    dk = tl.zeros((BLOCK_N, MAIN), tl.float32)
    dv = tl.zeros((BLOCK_N, MAIN), tl.float32)
    dk_tail = tl.zeros((BLOCK_N, TAIL if TAIL else 16), tl.float32)
    dv_tail = tl.zeros((BLOCK_N, TAIL if TAIL else 16), tl.float32)
    seed = tl.load(seed_ptr) if seed_ptr is not None else None
    scale_log2 = scale * _LOG2_E
    for DIAGONAL in tl.static_range(1, -1, -1):
        # queries that the diagonal cuts, then those after the tile's last key, which need no mask
        after = tl.cdiv(first_key + BLOCK_N, BLOCK_M) * BLOCK_M
        first = first_key // BLOCK_M * BLOCK_M if DIAGONAL else after
        last = tl.minimum(after, T) if DIAGONAL else T
        for first_query in range(first, last, BLOCK_M):
            # transposed tiles (keys, queries), so that the weights enter their products as they are
            q, q_tail = _load(q_ptr, first_query, T, stride_t, stride_d, BLOCK_M, D, MAIN, TAIL, True)
            dout, dout_tail = _load(dout_ptr, first_query, T, H * D, 1, BLOCK_M, D, MAIN, TAIL, True)
            queries = first_query + tl.arange(0, BLOCK_M)
            # beyond T the weights are exp2(-inf) = 0
            lse = tl.load(lse_ptr + row_offset + queries, mask=queries < T, other=float("inf"))
            delta = tl.load(delta_ptr + row_offset + queries, mask=queries < T, other=0.0)

            products = _products(k, k_tail, q, q_tail, TAIL)
            if DIAGONAL:
                products = tl.where(
                    tl.trans(_visible(first_query, first_key, BLOCK_M, BLOCK_N)), products, float("-inf")
                )
            weights = _exp2_of(products, scale_log2, lse[None, :])
            kept = weights
            if seed_ptr is not None:
                keep = tl.trans(_keep(seed, batch_head, first_query, first_key, dropout_p, BLOCK_M, BLOCK_N))
                # the sign carries the mask to its second use below, which takes fewer registers than keeping it
                weights = tl.where(keep, weights, -weights)
                kept = tl.maximum(weights, 0.0)
            kept = kept.to(dout.dtype)
            dv = dot(kept, dout, dv, _INTERPRETED)
            if TAIL:
                dv_tail = dot(kept, dout_tail, dv_tail, _INTERPRETED)
            dweights = _products(v, v_tail, dout, dout_tail, TAIL)
            if seed_ptr is not None:
                dweights = tl.where(weights > 0.0, dweights * (1.0 / (1.0 - dropout_p)), 0.0)
                weights = tl.abs(weights)
            dscores = (weights * (dweights - delta[None, :])).to(q.dtype)
            dk = dot(dscores, q, dk, _INTERPRETED)
            if TAIL:
                dk_tail = dot(dscores, q_tail, dk_tail, _INTERPRETED)

    if seed_ptr is not None:
        dv *= 1.0 / (1.0 - dropout_p)
        dv_tail *= 1.0 / (1.0 - dropout_p)
    dk_ptr = dqkv_ptr + (batch * T * 3 * H + H + head) * D
    _store(dk_ptr, dk * scale, dk_tail * scale, first_key, T, 3 * H * D, BLOCK_N, D, MAIN, TAIL)
    _store(dk_ptr + H * D, dv, dv_tail, first_key, T, 3 * H * D, BLOCK_N, D, MAIN, TAIL)


@triton.jit
def _tile_of_program(tiles, H):
    """The tile, the head, and the index over batch and head that this program works on: neighbours share a head."""
    batch_head = tl.program_id(0) // tiles
    return tl.program_id(0) % tiles, batch_head % H, batch_head


@triton.jit
def _load(
    ptr,  # (T, D)
    first_row,
    T,
    stride_t,
    stride_d,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    CHECK_ROWS: tl.constexpr,
):
    """ROWS rows of a matrix in its two pieces, with zeros outside it; without a TAIL the second piece is the first."""
    # the first row in 64 bits, because a sequence may span more than 2^31 elements
    main = _load_piece(ptr, first_row, T, stride_t, stride_d, ROWS, D, 0, MAIN, CHECK_ROWS)
    tail = main
    if TAIL:
        tail = _load_piece(ptr, first_row, T, stride_t, stride_d, ROWS, D, MAIN, TAIL, CHECK_ROWS)
    return main, tail


@triton.jit
def _load_piece(
    ptr,
    first_row,
    T,
    stride_t,
    stride_d,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    FIRST: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHECK_ROWS: tl.constexpr,
):
    rows = tl.arange(0, ROWS)
    columns = FIRST + tl.arange(0, COLUMNS)
    ptr += tl.cast(first_row, tl.int64) * stride_t
    ptrs = ptr + rows[:, None] * stride_t + columns[None, :] * stride_d
    if CHECK_ROWS:
        inside = (first_row + rows < T)[:, None]
        if FIRST + COLUMNS > D:
            inside = inside & (columns < D)[None, :]
        return tl.load(ptrs, mask=inside, other=0.0)
    if FIRST + COLUMNS > D:
        return tl.load(ptrs, mask=(columns < D)[None, :], other=0.0)
    return tl.load(ptrs)


@triton.jit
def _store(
    ptr,  # (T, D)
    main,  # (ROWS, MAIN)
    tail,  # (ROWS, TAIL)
    first_row,
    T,
    stride_t,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
):
    rows = tl.arange(0, ROWS)
    ptr += tl.cast(first_row, tl.int64) * stride_t
    inside = (first_row + rows < T)[:, None]
    columns = tl.arange(0, MAIN)
    ptrs = ptr + rows[:, None] * stride_t + columns[None, :]
    tl.store(ptrs, main.to(ptr.dtype.element_ty), mask=inside & (columns < D)[None, :])
    if TAIL:
        columns = MAIN + tl.arange(0, TAIL)
        ptrs = ptr + rows[:, None] * stride_t + columns[None, :]
        tl.store(ptrs, tail.to(ptr.dtype.element_ty), mask=inside & (columns < D)[None, :])


@triton.jit
def _products(
    a,  # (M, MAIN)
    a_tail,  # (M, TAIL)
    b,  # (N, MAIN)
    b_tail,  # (N, TAIL)
    TAIL: tl.constexpr,
):
    """(M, N) float32: the inner products of the rows of a with those of b."""
    out = tl.zeros((a.shape[0], b.shape[0]), tl.float32)
    out = dot(a, tl.trans(b), out, _INTERPRETED)
    if TAIL:
        out = dot(a_tail, tl.trans(b_tail), out, _INTERPRETED)
    return out


@triton.jit
def _exp2_of(products, scale_log2, subtrahend):
    """exp2(products * scale_log2 - subtrahend), rounding only the difference: large scores lose no digits."""
    products, subtrahend = tl.broadcast(products, subtrahend)
    return tl.exp2(tl.fma(products, tl.full(products.shape, scale_log2, tl.float32), -subtrahend))


@triton.jit
def _visible(first_query, first_key, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(BLOCK_M, BLOCK_N) booleans: which queries see which keys."""
    queries = first_query + tl.arange(0, BLOCK_M)
    keys = first_key + tl.arange(0, BLOCK_N)
    return queries[:, None] >= keys[None, :]


@triton.jit
def _keep(
    seed,
    batch_head,
    first_query,
    first_key,
    dropout_p,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """(BLOCK_M, BLOCK_N) booleans: which weights dropout keeps.

    A Philox call gives four words. They serve the weights (i, j), (i, j + 8), (i + 8, j) and (i + 8, j + 8): the tensor
    cores' accumulators hold all four in one thread, also where the tile is transposed, so that no data moves.
    """
    query_pairs = first_query // 2 + tl.arange(0, BLOCK_M // 2)
    key_pairs = first_key // 2 + tl.arange(0, BLOCK_N // 2)
    w00, w01, w10, w11 = tl.philox(seed, key_pairs[None, :], query_pairs[:, None], batch_head, 0)
    words = tl.join(tl.join(w00, w10), tl.join(w01, w11))  # (BLOCK_M / 2, BLOCK_N / 2, 2 of i, 2 of j)
    words = words.reshape(BLOCK_M // 16, 8, BLOCK_N // 16, 8, 2, 2).permute(0, 4, 1, 2, 5, 3)
    return tl.uint_to_uniform_float(words.reshape(BLOCK_M, BLOCK_N)) >= dropout_p


def launch_forward(qkv: Tensor, scale: float, dropout_p: float, seed: Tensor | None) -> tuple[Tensor, Tensor]:
    """The output (B, T, H, D) and, for the backward, the logarithms of its sums, (B, H, T) in float32."""
    B, T, _, H, D = qkv.shape
    out = torch.empty((B, T, H, D), dtype=qkv.dtype, device=qkv.device)
    lse = torch.empty((B, H, T), dtype=torch.float32, device=qkv.device)
    tiles = tiles_for("forward", qkv)
    shape = (*qkv.stride(), T, H, scale, dropout_p, D, *pieces(D))
    with launch.on_device_of(qkv):
        _forward_kernel[(triton.cdiv(T, tiles.BLOCK_M) * B * H,)](
            qkv, out, lse, seed, *shape, **tiles._asdict(), **_options(qkv)
        )
    return out, lse


def launch_backward(
    qkv: Tensor, out: Tensor, lse: Tensor, dout: Tensor, scale: float, dropout_p: float, seed: Tensor | None
) -> Tensor:
    """The gradient of qkv, (B, T, 3, H, D) contiguous, from that of the output, (B, T, H, D) contiguous."""
    B, T, _, H, D = qkv.shape
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    delta = torch.empty_like(lse)
    query_tiles, key_tiles = tiles_for("backward_queries", qkv), tiles_for("backward_keys", qkv)
    shape = (*qkv.stride(), T, H, scale, dropout_p, D, *pieces(D))
    with launch.on_device_of(qkv):
        # in this order: the kernel for queries leaves delta for the kernel for keys
        _backward_queries_kernel[(triton.cdiv(T, query_tiles.BLOCK_M) * B * H,)](
            qkv, out, dout, lse, delta, dqkv, seed, *shape, **query_tiles._asdict(), **_options(qkv)
        )
        _backward_keys_kernel[(triton.cdiv(T, key_tiles.BLOCK_N) * B * H,)](
            qkv, dout, lse, delta, dqkv, seed, *shape, **key_tiles._asdict(), **_options(qkv)
        )
    return dqkv


def tiles_for(kernel: str, qkv: Tensor) -> Tiles:
    """The tiles for a tensor's device, dtype and head size."""
    bits, D = qkv.element_size() * 8, qkv.shape[-1]
    head_size = UNALIGNED if D % 16 else D
    capability = launch.compute_capability(qkv.device)
    table = next(tables for least, tables in TILES_BY_CAPABILITY.items() if capability >= least)
    entries = TILES[kernel] | table[kernel]
    return next(tiles for (b, largest), tiles in entries.items() if b == bits and head_size <= largest)


def _options(qkv: Tensor) -> dict[str, Any]:
    # left alone, the assembler spills some float32 kernels a little for the sake of more programs at a time
    unspilled = {"maxnreg": 255} if qkv.dtype == torch.float32 and launch.compute_capability(qkv.device) else {}
    return launch.OPTIONS | unspilled


def pieces(head_size: int) -> tuple[int, int]:
    """The powers of two that hold a row: 64 and 0 for 64, 64 and 16 for 80, 64 and 32 for 96, 128 and 0 for 120."""
    whole = triton.next_power_of_2(head_size)
    main = whole // 2
    tail = max(16, triton.next_power_of_2(head_size - main))
    return (whole, 0) if main < 16 or main + tail >= whole else (main, tail)


@torch.library.custom_op("fastgpt::causal_attention", mutates_args=())
def _attention(qkv: Tensor, scale: float, dropout_p: float, seed: Tensor | None) -> tuple[Tensor, Tensor]:
    return launch_forward(qkv, scale, dropout_p, seed)


@_attention.register_fake
def _(qkv: Tensor, scale: float, dropout_p: float, seed: Tensor | None) -> tuple[Tensor, Tensor]:
    B, T, _, H, D = qkv.shape
    return qkv.new_empty((B, T, H, D)), qkv.new_empty((B, H, T), dtype=torch.float32)


@torch.library.custom_op("fastgpt::causal_attention_backward", mutates_args=())
def _attention_backward(
    qkv: Tensor, out: Tensor, lse: Tensor, dout: Tensor, scale: float, dropout_p: float, seed: Tensor | None
) -> Tensor:
    return launch_backward(qkv, out, lse, dout.contiguous(), scale, dropout_p, seed)


@_attention_backward.register_fake
def _(
    qkv: Tensor, out: Tensor, lse: Tensor, dout: Tensor, scale: float, dropout_p: float, seed: Tensor | None
) -> Tensor:
    return qkv.new_empty(qkv.shape)


def _setup_context(ctx: Any, inputs: tuple[Tensor, float, float, Tensor | None], output: tuple[Tensor, Tensor]) -> None:
    qkv, ctx.scale, ctx.dropout_p, seed = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(qkv, out, lse, seed)


def _differentiate(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Tensor, None, None, None]:
    qkv, out, lse, seed = ctx.saved_tensors
    return _attention_backward(qkv, out, lse, dout, ctx.scale, ctx.dropout_p, seed), None, None, None


_attention.register_autograd(_differentiate, setup_context=_setup_context)


def causal_attention(
    qkv: Tensor, *, scale: float | None = None, dropout_p: float = 0.0, seed: Seed | None = None
) -> Tensor:
    """Causal attention over a packed projection, in Triton.

    Args:
        qkv: (B, T, 3, H, D), float32, float16 or bfloat16, 16 <= D <= 128, any strides; read in place. The gradient
            comes back as one contiguous tensor of the same shape.
        scale: factor of the scores before the softmax, positive; 1 / sqrt(D) when None.
        dropout_p: probability, in [0, 1), of dropping an attention weight.
        seed: int in [0, 2^63) or int64 tensor of one element; needed where dropout_p > 0.

    Returns:
        (B, T, H, D), contiguous, in the dtype of qkv.

    Raises:
        UnsupportedInput: for arguments outside these.
    """
    wrong = checks.against_attention(qkv, scale, dropout_p, seed)
    raise_if_any(wrong, "causal_attention", "triton", checks.REMEDY)
    reasons = launch.against(qkv=qkv)
    D = qkv.shape[-1]
    if not MIN_HEAD_SIZE <= D <= MAX_HEAD_SIZE:
        reasons.append(f"the head size is {D}; it must be between {MIN_HEAD_SIZE} and {MAX_HEAD_SIZE}")
    raise_if_any(reasons, "causal_attention", "triton", launch.REMEDY)
    key = None if dropout_p == 0.0 or seed is None else seed_tensor(seed, qkv.device)
    out: Tensor = _attention(qkv, scale or 1.0 / math.sqrt(D), dropout_p, key)[0]
    return out
