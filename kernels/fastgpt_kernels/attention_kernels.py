"""The Triton kernels of causal attention; `attention.py` holds their mathematics and launches them.

Each program owns a tile of queries (the forward, dq) or of keys (dk, dv) and walks over the tiles that matter to it:

    keys of a tile of queries                                   queries of a tile of keys
      first visible key ... edge | whole | diagonal               diagonal | whole | edge ... last query that sees one

"diagonal" holds the tiles that causality cuts and "edge" those that the far edge of the window cuts: only these are
masked. The others are seen whole, but for the ids of documents, which are compared in every tile.

On the diagonal, a tile of 2 n queries or more has n later queries that see n keys of which the n earlier ones see none
(and likewise n earlier keys, seen by n queries that see none of the later). These halves are computed by
themselves, first, while the registers are free, so that no product is wasted on a tile that is wholly masked.
"""

import math

import triton
import triton.language as tl

from fastgpt_kernels import launch
from fastgpt_kernels.launch import dot

_INTERPRETED = tl.constexpr(launch.INTERPRETED)
_LOG2_E = tl.constexpr(math.log2(math.e))
# A maximum over no visible key: finite, because the difference of two infinities is NaN.
_LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def forward_kernel(
    qkv_ptr,  # (B, T, 3, H, D)
    out_ptr,  # (B, T, H, D), contiguous
    lse_ptr,  # (B, H, T) float32: log2 of the sum over j of exp(s_ij), for the backward
    seed_ptr,  # (1,) int64, or None without dropout
    documents_ptr,  # (2, B, T) int32: the first and the last position of each position's document; or None
    stride_b,
    stride_t,
    stride_s,  # between q, k and v
    stride_h,
    stride_d,
    B,
    T,
    H,
    window,  # or None
    scale,
    dropout_p,
    UNIT: tl.constexpr,  # of the strides but stride_d: tells the compiler how much it may load at once
    D: tl.constexpr,
    MAIN: tl.constexpr,  # D = MAIN columns and a TAIL, both padded to a power of two
    TAIL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The output and the lse of a tile of queries."""
    tile, head, batch_head = _tile_of_program(tl.cdiv(T, BLOCK_M), H)
    # the last queries see the most keys: start with them, so that the short tiles fill the end
    first_query = (tl.cdiv(T, BLOCK_M) - 1 - tile) * BLOCK_M
    batch = (batch_head // H).to(tl.int64)
    q_ptr = qkv_ptr + (batch * stride_b + head * stride_h) * UNIT
    k_ptr = q_ptr + tl.cast(stride_s, tl.int64) * UNIT
    v_ptr = k_ptr + tl.cast(stride_s, tl.int64) * UNIT
    stride_t *= UNIT
    starts_ptr = documents_ptr
    if documents_ptr is not None:
        starts_ptr += batch * T
    seed = tl.load(seed_ptr) if seed_ptr is not None else None
    scale_log2 = scale * _LOG2_E

    row_max = tl.full((BLOCK_M,), _LOWEST, tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, MAIN), tl.float32)
    acc_tail = tl.zeros((BLOCK_M, TAIL if TAIL else 16), tl.float32)

    first, whole, edge, diagonal = _key_bounds(first_query, T, window, starts_ptr, BLOCK_M, BLOCK_N)
    diagonal_end = tl.minimum(first_query + BLOCK_M, T)
    if BLOCK_M >= 2 * BLOCK_N:
        HALF: tl.constexpr = BLOCK_M // 2
        middle = first_query + HALF
        q, q_tail = _load(q_ptr, middle, T, stride_t, stride_d, HALF, D, MAIN, TAIL, True)
        half_max = tl.full((HALF,), _LOWEST, tl.float32)
        half_sum = tl.zeros((HALF,), tl.float32)
        half = tl.zeros((HALF, MAIN), tl.float32)
        half_tail = tl.zeros((HALF, TAIL if TAIL else 16), tl.float32)
        half_max, half_sum, half, half_tail = _attend(
            half_max, half_sum, half, half_tail, q, q_tail, k_ptr, v_ptr, starts_ptr, seed, middle, middle,
            diagonal_end, stride_t, stride_d, T, window, scale_log2, dropout_p, batch_head, D, MAIN, TAIL,
            HALF, BLOCK_N, True, True,
        )  # fmt: skip
        diagonal_end = tl.minimum(middle, T)
        row_max = _stack(tl.full((HALF,), _LOWEST, tl.float32), half_max)
        row_sum = _stack(tl.zeros_like(half_sum), half_sum)
        acc = _stack(tl.zeros_like(half), half)
        if TAIL:
            acc_tail = _stack(tl.zeros_like(half_tail), half_tail)

    q, q_tail = _load(q_ptr, first_query, T, stride_t, stride_d, BLOCK_M, D, MAIN, TAIL, True)
    row_max, row_sum, acc, acc_tail = _attend(
        row_max, row_sum, acc, acc_tail, q, q_tail, k_ptr, v_ptr, starts_ptr, seed, first_query, diagonal, diagonal_end,
        stride_t, stride_d, T, window, scale_log2, dropout_p, batch_head, D, MAIN, TAIL, BLOCK_M, BLOCK_N, True, True,
    )  # fmt: skip
    row_max, row_sum, acc, acc_tail = _attend(
        row_max, row_sum, acc, acc_tail, q, q_tail, k_ptr, v_ptr, starts_ptr, seed, first_query, whole, diagonal,
        stride_t, stride_d, T, window, scale_log2, dropout_p, batch_head, D, MAIN, TAIL, BLOCK_M, BLOCK_N, False, False,
    )  # fmt: skip
    if window is not None:
        row_max, row_sum, acc, acc_tail = _attend(
            row_max, row_sum, acc, acc_tail, q, q_tail, k_ptr, v_ptr, starts_ptr, seed, first_query, first, edge,
            stride_t, stride_d, T, window, scale_log2, dropout_p, batch_head, D, MAIN, TAIL, BLOCK_M, BLOCK_N,
            False, True,
        )  # fmt: skip

    queries = first_query + tl.arange(0, BLOCK_M)
    tl.store(lse_ptr + batch_head.to(tl.int64) * T + queries, row_max + tl.log2(row_sum), mask=queries < T)
    if seed_ptr is not None:
        row_sum *= 1.0 - dropout_p
    out_ptr += (batch * T * H + head) * D
    acc /= row_sum[:, None]
    acc_tail /= row_sum[:, None]
    _store(out_ptr, acc, acc_tail, first_query, T, H * D, 1, BLOCK_M, D, MAIN, TAIL)


@triton.jit
def _attend(
    row_max,  # (BLOCK_M,)
    row_sum,  # (BLOCK_M,)
    acc,  # (BLOCK_M, MAIN)
    acc_tail,  # (BLOCK_M, TAIL)
    q,  # (BLOCK_M, MAIN)
    q_tail,  # (BLOCK_M, TAIL)
    k_ptr,  # (T, D)
    v_ptr,  # (T, D)
    starts_ptr,  # (T,), or None
    seed,
    first_query,
    first,
    last,
    stride_t,
    stride_d,
    T,
    window,
    scale_log2,
    dropout_p,
    batch_head,
    D: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DIAGONAL: tl.constexpr,
    EDGE: tl.constexpr,
):
    """The running softmax and its sums after the keys from first to last, exclusive."""
    queries = first_query + tl.arange(0, BLOCK_M)
    query_starts = _starts(starts_ptr, queries, T, T)
    for first_key in range(first, last, BLOCK_N):
        k, k_tail = _load(k_ptr, first_key, T, stride_t, stride_d, BLOCK_N, D, MAIN, TAIL, DIAGONAL)
        products = _products(q, q_tail, k, k_tail, TAIL)
        keys = first_key + tl.arange(0, BLOCK_N)
        key_starts = _starts(starts_ptr, keys, T, -1)
        products = _hide(products, queries, keys, query_starts, key_starts, window, DIAGONAL, EDGE, KEYS_FIRST=False)
        new_max = tl.maximum(row_max, tl.max(products, 1) * scale_log2)
        weights = _exp2_of(products, scale_log2, new_max[:, None])
        shrink = tl.exp2(row_max - new_max)
        row_sum = row_sum * shrink + tl.sum(weights, 1)
        row_max = new_max
        if seed is not None:
            keep = _keep(seed, batch_head, first_query, first_key, dropout_p, BLOCK_M, BLOCK_N)
            weights = tl.where(keep, weights, 0.0)
        v, v_tail = _load(v_ptr, first_key, T, stride_t, stride_d, BLOCK_N, D, MAIN, TAIL, DIAGONAL)
        weights = weights.to(v.dtype)
        acc = dot(weights, v, acc * shrink[:, None], _INTERPRETED)
        if TAIL:
            acc_tail = dot(weights, v_tail, acc_tail * shrink[:, None], _INTERPRETED)
    return row_max, row_sum, acc, acc_tail


@triton.jit
def backward_queries_kernel(
    qkv_ptr,  # (B, T, 3, H, D)
    out_ptr,  # (B, T, H, D), contiguous
    dout_ptr,  # (B, T, H, D), contiguous
    lse_ptr,  # (B, H, T) float32, from the forward
    delta_ptr,  # (B, H, T) float32: written here, read by the kernel for keys
    dqkv_ptr,  # (B, T, 3, H, D); this kernel writes dq
    seed_ptr,  # (1,) int64, or None without dropout
    documents_ptr,  # (2, B, T) int32, or None
    stride_b,
    stride_t,
    stride_s,
    stride_h,
    stride_d,
    dqkv_stride_b,
    dqkv_stride_t,
    dqkv_stride_s,
    dqkv_stride_h,
    dqkv_stride_d,
    B,
    T,
    H,
    window,
    scale,
    dropout_p,
    UNIT: tl.constexpr,
    D: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dq and delta of a tile of queries."""
    tile, head, batch_head = _tile_of_program(tl.cdiv(T, BLOCK_M), H)
    first_query = (tl.cdiv(T, BLOCK_M) - 1 - tile) * BLOCK_M
    batch = (batch_head // H).to(tl.int64)
    q_ptr = qkv_ptr + (batch * stride_b + head * stride_h) * UNIT
    k_ptr = q_ptr + tl.cast(stride_s, tl.int64) * UNIT
    v_ptr = k_ptr + tl.cast(stride_s, tl.int64) * UNIT
    stride_t *= UNIT
    out_ptr += (batch * T * H + head) * D
    dout_ptr += (batch * T * H + head) * D
    lse_ptr += batch_head.to(tl.int64) * T
    delta_ptr += batch_head.to(tl.int64) * T
    starts_ptr = documents_ptr
    if documents_ptr is not None:
        starts_ptr += batch * T
    seed = tl.load(seed_ptr) if seed_ptr is not None else None
    scale_log2 = scale * _LOG2_E

    dq = tl.zeros((BLOCK_M, MAIN), tl.float32)
    dq_tail = tl.zeros((BLOCK_M, TAIL if TAIL else 16), tl.float32)

    first, whole, edge, diagonal = _key_bounds(first_query, T, window, starts_ptr, BLOCK_M, BLOCK_N)
    diagonal_end = tl.minimum(first_query + BLOCK_M, T)
    if BLOCK_M >= 2 * BLOCK_N:
        HALF: tl.constexpr = BLOCK_M // 2
        middle = first_query + HALF
        q, q_tail = _load(q_ptr, middle, T, stride_t, stride_d, HALF, D, MAIN, TAIL, True)
        dout, dout_tail = _load(dout_ptr, middle, T, H * D, 1, HALF, D, MAIN, TAIL, True)
        lse, delta = _lse_and_delta(lse_ptr, out_ptr, dout, dout_tail, middle, T, H * D, D, MAIN, TAIL, HALF)
        half = tl.zeros((HALF, MAIN), tl.float32)
        half_tail = tl.zeros((HALF, TAIL if TAIL else 16), tl.float32)
        half, half_tail = _sum_over_keys(
            half, half_tail, q, q_tail, dout, dout_tail, lse, delta, k_ptr, v_ptr, starts_ptr, seed, middle, middle,
            diagonal_end, stride_t, stride_d, T, window, scale_log2, dropout_p, batch_head, D, MAIN, TAIL,
            HALF, BLOCK_N, True, True,
        )  # fmt: skip
        diagonal_end = tl.minimum(middle, T)
        dq = _stack(tl.zeros_like(half), half)
        if TAIL:
            dq_tail = _stack(tl.zeros_like(half_tail), half_tail)

    q, q_tail = _load(q_ptr, first_query, T, stride_t, stride_d, BLOCK_M, D, MAIN, TAIL, True)
    dout, dout_tail = _load(dout_ptr, first_query, T, H * D, 1, BLOCK_M, D, MAIN, TAIL, True)
    lse, delta = _lse_and_delta(lse_ptr, out_ptr, dout, dout_tail, first_query, T, H * D, D, MAIN, TAIL, BLOCK_M)
    queries = first_query + tl.arange(0, BLOCK_M)
    tl.store(delta_ptr + queries, delta, mask=queries < T)
    dq, dq_tail = _sum_over_keys(
        dq, dq_tail, q, q_tail, dout, dout_tail, lse, delta, k_ptr, v_ptr, starts_ptr, seed, first_query, diagonal,
        diagonal_end, stride_t, stride_d, T, window, scale_log2, dropout_p, batch_head, D, MAIN, TAIL,
        BLOCK_M, BLOCK_N, True, True,
    )  # fmt: skip
    dq, dq_tail = _sum_over_keys(
        dq, dq_tail, q, q_tail, dout, dout_tail, lse, delta, k_ptr, v_ptr, starts_ptr, seed, first_query, whole,
        diagonal, stride_t, stride_d, T, window, scale_log2, dropout_p, batch_head, D, MAIN, TAIL,
        BLOCK_M, BLOCK_N, False, False,
    )  # fmt: skip
    if window is not None:
        dq, dq_tail = _sum_over_keys(
            dq, dq_tail, q, q_tail, dout, dout_tail, lse, delta, k_ptr, v_ptr, starts_ptr, seed, first_query, first,
            edge, stride_t, stride_d, T, window, scale_log2, dropout_p, batch_head, D, MAIN, TAIL,
            BLOCK_M, BLOCK_N, False, True,
        )  # fmt: skip

    dq_ptr = dqkv_ptr + (batch * dqkv_stride_b + head * dqkv_stride_h) * UNIT
    dqkv_stride_t *= UNIT
    _store(dq_ptr, dq * scale, dq_tail * scale, first_query, T, dqkv_stride_t, dqkv_stride_d, BLOCK_M, D, MAIN, TAIL)


@triton.jit
def _lse_and_delta(
    lse_ptr,  # (T,)
    out_ptr,  # (T, D)
    dout,  # (ROWS, MAIN)
    dout_tail,  # (ROWS, TAIL)
    first_query,
    T,
    stride_t,
    D: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The lse of a tile's rows, inf beyond T, and their delta."""
    out, out_tail = _load(out_ptr, first_query, T, stride_t, 1, ROWS, D, MAIN, TAIL, True)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    if TAIL:
        delta += tl.sum(out_tail.to(tl.float32) * dout_tail.to(tl.float32), 1)
    queries = first_query + tl.arange(0, ROWS)
    return tl.load(lse_ptr + queries, mask=queries < T, other=float("inf")), delta


@triton.jit
def _sum_over_keys(
    dq,  # (BLOCK_M, MAIN)
    dq_tail,  # (BLOCK_M, TAIL)
    q,  # (BLOCK_M, MAIN)
    q_tail,
    dout,  # (BLOCK_M, MAIN)
    dout_tail,
    lse,  # (BLOCK_M,)
    delta,  # (BLOCK_M,)
    k_ptr,  # (T, D)
    v_ptr,  # (T, D)
    starts_ptr,  # (T,), or None
    seed,
    first_query,
    first,
    last,
    stride_t,
    stride_d,
    T,
    window,
    scale_log2,
    dropout_p,
    batch_head,
    D: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DIAGONAL: tl.constexpr,
    EDGE: tl.constexpr,
):
    """dq plus the sum of ds_ij k_j over the keys from first to last, exclusive."""
    queries = first_query + tl.arange(0, BLOCK_M)
    query_starts = _starts(starts_ptr, queries, T, T)
    for first_key in range(first, last, BLOCK_N):
        k, k_tail = _load(k_ptr, first_key, T, stride_t, stride_d, BLOCK_N, D, MAIN, TAIL, DIAGONAL)
        v, v_tail = _load(v_ptr, first_key, T, stride_t, stride_d, BLOCK_N, D, MAIN, TAIL, DIAGONAL)
        products = _products(q, q_tail, k, k_tail, TAIL)
        keys = first_key + tl.arange(0, BLOCK_N)
        key_starts = _starts(starts_ptr, keys, T, -1)
        products = _hide(products, queries, keys, query_starts, key_starts, window, DIAGONAL, EDGE, KEYS_FIRST=False)
        weights = _exp2_of(products, scale_log2, lse[:, None])
        dweights = _products(dout, dout_tail, v, v_tail, TAIL)
        if seed is not None:
            keep = _keep(seed, batch_head, first_query, first_key, dropout_p, BLOCK_M, BLOCK_N)
            dweights = tl.where(keep, dweights * (1.0 / (1.0 - dropout_p)), 0.0)
        dscores = (weights * (dweights - delta[:, None])).to(k.dtype)
        dq = dot(dscores, k, dq, _INTERPRETED)
        if TAIL:
            dq_tail = dot(dscores, k_tail, dq_tail, _INTERPRETED)
    return dq, dq_tail


@triton.jit
def backward_keys_kernel(
    qkv_ptr,  # (B, T, 3, H, D)
    dout_ptr,  # (B, T, H, D), contiguous
    lse_ptr,  # (B, H, T) float32, from the forward
    delta_ptr,  # (B, H, T) float32, from the kernel for queries
    dqkv_ptr,  # (B, T, 3, H, D); this kernel writes dk and dv
    seed_ptr,  # (1,) int64, or None without dropout
    documents_ptr,  # (2, B, T) int32, or None
    stride_b,
    stride_t,
    stride_s,
    stride_h,
    stride_d,
    dqkv_stride_b,
    dqkv_stride_t,
    dqkv_stride_s,
    dqkv_stride_h,
    dqkv_stride_d,
    B,
    T,
    H,
    window,
    scale,
    dropout_p,
    UNIT: tl.constexpr,
    D: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dk and dv of a tile of keys."""
    # the first keys are seen by the most queries, and come first
    tile, head, batch_head = _tile_of_program(tl.cdiv(T, BLOCK_N), H)
    first_key = tile * BLOCK_N
    batch = (batch_head // H).to(tl.int64)
    q_ptr = qkv_ptr + (batch * stride_b + head * stride_h) * UNIT
    k_ptr = q_ptr + tl.cast(stride_s, tl.int64) * UNIT
    v_ptr = k_ptr + tl.cast(stride_s, tl.int64) * UNIT
    stride_t *= UNIT
    dout_ptr += (batch * T * H + head) * D
    lse_ptr += batch_head.to(tl.int64) * T
    delta_ptr += batch_head.to(tl.int64) * T
    starts_ptr, ends_ptr = documents_ptr, documents_ptr
    if documents_ptr is not None:
        starts_ptr += batch * T
        ends_ptr += (B + batch) * T
    seed = tl.load(seed_ptr) if seed_ptr is not None else None
    scale_log2 = scale * _LOG2_E

    dk = tl.zeros((BLOCK_N, MAIN), tl.float32)
    dv = tl.zeros((BLOCK_N, MAIN), tl.float32)
    dk_tail = tl.zeros((BLOCK_N, TAIL if TAIL else 16), tl.float32)
    dv_tail = tl.zeros((BLOCK_N, TAIL if TAIL else 16), tl.float32)

    diagonal, whole, edge, last = _query_bounds(first_key, T, window, ends_ptr, BLOCK_M, BLOCK_N)
    diagonal_end = tl.minimum(whole, last)
    if BLOCK_N >= 2 * BLOCK_M:
        HALF: tl.constexpr = BLOCK_N // 2
        k, k_tail = _load(k_ptr, first_key, T, stride_t, stride_d, HALF, D, MAIN, TAIL, True)
        v, v_tail = _load(v_ptr, first_key, T, stride_t, stride_d, HALF, D, MAIN, TAIL, True)
        half_k = tl.zeros((HALF, MAIN), tl.float32)
        half_v = tl.zeros((HALF, MAIN), tl.float32)
        half_k_tail = tl.zeros((HALF, TAIL if TAIL else 16), tl.float32)
        half_v_tail = tl.zeros((HALF, TAIL if TAIL else 16), tl.float32)
        diagonal = first_key + HALF
        half_k, half_k_tail, half_v, half_v_tail = _sum_over_queries(
            half_k, half_k_tail, half_v, half_v_tail, k, k_tail, v, v_tail, q_ptr, dout_ptr, lse_ptr, delta_ptr,
            starts_ptr, seed, first_key, first_key, tl.minimum(diagonal, last), stride_t, stride_d,
            T, H, window, scale_log2, dropout_p, batch_head, D, MAIN, TAIL, BLOCK_M, HALF, True, True,
        )  # fmt: skip
        dk = _stack(half_k, tl.zeros_like(half_k))
        dv = _stack(half_v, tl.zeros_like(half_v))
        if TAIL:
            dk_tail = _stack(half_k_tail, tl.zeros_like(half_k_tail))
            dv_tail = _stack(half_v_tail, tl.zeros_like(half_v_tail))

    k, k_tail = _load(k_ptr, first_key, T, stride_t, stride_d, BLOCK_N, D, MAIN, TAIL, True)
    v, v_tail = _load(v_ptr, first_key, T, stride_t, stride_d, BLOCK_N, D, MAIN, TAIL, True)
    dk, dk_tail, dv, dv_tail = _sum_over_queries(
        dk, dk_tail, dv, dv_tail, k, k_tail, v, v_tail, q_ptr, dout_ptr, lse_ptr, delta_ptr, starts_ptr, seed,
        first_key, diagonal, diagonal_end, stride_t, stride_d, T, H, window, scale_log2,
        dropout_p, batch_head, D, MAIN, TAIL, BLOCK_M, BLOCK_N, True, True,
    )  # fmt: skip
    dk, dk_tail, dv, dv_tail = _sum_over_queries(
        dk, dk_tail, dv, dv_tail, k, k_tail, v, v_tail, q_ptr, dout_ptr, lse_ptr, delta_ptr, starts_ptr, seed,
        first_key, whole, edge, stride_t, stride_d, T, H, window, scale_log2,
        dropout_p, batch_head, D, MAIN, TAIL, BLOCK_M, BLOCK_N, False, False,
    )  # fmt: skip
    if window is not None:
        dk, dk_tail, dv, dv_tail = _sum_over_queries(
            dk, dk_tail, dv, dv_tail, k, k_tail, v, v_tail, q_ptr, dout_ptr, lse_ptr, delta_ptr, starts_ptr, seed,
            first_key, edge, last, stride_t, stride_d, T, H, window, scale_log2,
            dropout_p, batch_head, D, MAIN, TAIL, BLOCK_M, BLOCK_N, False, True,
        )  # fmt: skip

    if seed_ptr is not None:
        dv *= 1.0 / (1.0 - dropout_p)
        dv_tail *= 1.0 / (1.0 - dropout_p)
    dk_ptr = dqkv_ptr + (batch * dqkv_stride_b + head * dqkv_stride_h) * UNIT + tl.cast(dqkv_stride_s, tl.int64) * UNIT
    dv_ptr = dk_ptr + tl.cast(dqkv_stride_s, tl.int64) * UNIT
    dqkv_stride_t *= UNIT
    _store(dk_ptr, dk * scale, dk_tail * scale, first_key, T, dqkv_stride_t, dqkv_stride_d, BLOCK_N, D, MAIN, TAIL)
    _store(dv_ptr, dv, dv_tail, first_key, T, dqkv_stride_t, dqkv_stride_d, BLOCK_N, D, MAIN, TAIL)


@triton.jit
def _sum_over_queries(
    dk,  # (BLOCK_N, MAIN)
    dk_tail,  # (BLOCK_N, TAIL)
    dv,  # (BLOCK_N, MAIN)
    dv_tail,
    k,  # (BLOCK_N, MAIN)
    k_tail,
    v,  # (BLOCK_N, MAIN)
    v_tail,
    q_ptr,  # (T, D)
    dout_ptr,  # (T, D)
    lse_ptr,  # (T,)
    delta_ptr,  # (T,)
    starts_ptr,  # (T,), or None
    seed,
    first_key,
    first,
    last,
    stride_t,
    stride_d,
    T,
    H,
    window,
    scale_log2,
    dropout_p,
    batch_head,
    D: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DIAGONAL: tl.constexpr,
    EDGE: tl.constexpr,
):
    """dk plus the sum of ds_ij q_i, and dv plus that of p_ij do_i, over the queries from first to last, exclusive."""
    keys = first_key + tl.arange(0, BLOCK_N)
    key_starts = _starts(starts_ptr, keys, T, -1)
    for first_query in range(first, last, BLOCK_M):
        # transposed tiles (keys, queries), so that the weights enter their products as they are
        q, q_tail = _load(q_ptr, first_query, T, stride_t, stride_d, BLOCK_M, D, MAIN, TAIL, True)
        dout, dout_tail = _load(dout_ptr, first_query, T, H * D, 1, BLOCK_M, D, MAIN, TAIL, True)
        queries = first_query + tl.arange(0, BLOCK_M)
        # beyond T the weights are exp2(-inf) = 0
        lse = tl.load(lse_ptr + queries, mask=queries < T, other=float("inf"))
        delta = tl.load(delta_ptr + queries, mask=queries < T, other=0.0)

        products = _products(k, k_tail, q, q_tail, TAIL)
        query_starts = _starts(starts_ptr, queries, T, T)
        products = _hide(products, queries, keys, query_starts, key_starts, window, DIAGONAL, EDGE, KEYS_FIRST=True)
        weights = _exp2_of(products, scale_log2, lse[None, :])
        kept = weights
        if seed is not None:
            keep = tl.trans(_keep(seed, batch_head, first_query, first_key, dropout_p, BLOCK_M, BLOCK_N))
            # the sign carries the mask to its second use below, which takes fewer registers than keeping it
            weights = tl.where(keep, weights, -weights)
            kept = tl.maximum(weights, 0.0)
        kept = kept.to(dout.dtype)
        dv = dot(kept, dout, dv, _INTERPRETED)
        if TAIL:
            dv_tail = dot(kept, dout_tail, dv_tail, _INTERPRETED)
        dweights = _products(v, v_tail, dout, dout_tail, TAIL)
        if seed is not None:
            dweights = tl.where(weights > 0.0, dweights * (1.0 / (1.0 - dropout_p)), 0.0)
            weights = tl.abs(weights)
        dscores = (weights * (dweights - delta[None, :])).to(q.dtype)
        dk = dot(dscores, q, dk, _INTERPRETED)
        if TAIL:
            dk_tail = dot(dscores, q_tail, dk_tail, _INTERPRETED)
    return dk, dk_tail, dv, dv_tail


@triton.jit
def documents_kernel(
    ids_ptr,  # (B, T) integers
    documents_ptr,  # (2, B, T) int32
    stride_b,
    stride_t,
    B,
    T,
    BLOCK: tl.constexpr,
):
    """The first and the last position of the document of each position of a tile."""
    batch = (tl.program_id(0) // tl.cdiv(T, BLOCK)).to(tl.int64)
    first_position = tl.program_id(0) % tl.cdiv(T, BLOCK) * BLOCK
    ids_ptr += batch * stride_b
    positions = first_position + tl.arange(0, BLOCK)
    ids = tl.load(ids_ptr + positions.to(tl.int64) * stride_t, mask=positions < T, other=0)
    start = positions
    for first in range(0, first_position + BLOCK, BLOCK):
        others = first + tl.arange(0, BLOCK)
        other_ids = tl.load(ids_ptr + others.to(tl.int64) * stride_t, mask=others < T, other=0)
        same = (ids[:, None] == other_ids[None, :]) & (others < T)[None, :]
        start = tl.minimum(start, tl.min(tl.where(same, others[None, :], T), 1))
    end = positions
    for first in range(first_position, T, BLOCK):
        others = first + tl.arange(0, BLOCK)
        other_ids = tl.load(ids_ptr + others.to(tl.int64) * stride_t, mask=others < T, other=0)
        same = (ids[:, None] == other_ids[None, :]) & (others < T)[None, :]
        end = tl.maximum(end, tl.max(tl.where(same, others[None, :], 0), 1))
    tl.store(documents_ptr + batch * T + positions, start, mask=positions < T)
    tl.store(documents_ptr + (B + batch) * T + positions, end, mask=positions < T)


@triton.jit
def _tile_of_program(tiles, H):
    """The tile, the head, and the index over batch and head that this program works on: neighbours share a head."""
    batch_head = tl.program_id(0) // tiles
    # in 64 bits, because strides between heads and parts may be large
    return tl.program_id(0) % tiles, (batch_head % H).to(tl.int64), batch_head


@triton.jit
def _key_bounds(first_query, T, window, starts_ptr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The key tiles of a tile of queries: the first visible one, the first and the end of the whole, the diagonal's."""
    diagonal = first_query // BLOCK_N * BLOCK_N
    first = 0
    if starts_ptr is not None:
        first = tl.min(_starts(starts_ptr, first_query + tl.arange(0, BLOCK_M), T, T), 0) // BLOCK_N * BLOCK_N
    whole = first
    edge = first
    if window is not None:
        first = tl.maximum(first, tl.maximum(first_query + 1 - window, 0) // BLOCK_N * BLOCK_N)
        # the tile's last query sees the keys from here on
        whole = tl.cdiv(tl.maximum(first_query + BLOCK_M - window, 0), BLOCK_N) * BLOCK_N
        whole = tl.minimum(tl.maximum(first, whole), diagonal)
        edge = whole
    return first, whole, edge, diagonal


@triton.jit
def _query_bounds(first_key, T, window, ends_ptr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The queries of a tile of keys: the first on its diagonal, after it, at the edge; the end of all."""
    diagonal = first_key // BLOCK_M * BLOCK_M
    whole = tl.cdiv(first_key + BLOCK_N, BLOCK_M) * BLOCK_M
    last = T
    if ends_ptr is not None:
        last = 1 + tl.max(_starts(ends_ptr, first_key + tl.arange(0, BLOCK_N), T, -1), 0)
    edge = last
    if window is not None:
        last = tl.minimum(last, first_key + BLOCK_N - 1 + window)
        # the queries before this one see the tile's first key
        edge = tl.minimum(tl.maximum((first_key + window) // BLOCK_M * BLOCK_M, whole), last)
    return diagonal, whole, edge, last


@triton.jit
def _starts(starts_ptr, positions, T, beyond):
    """What is stored for these positions, `beyond` after the last; None without documents."""
    starts = starts_ptr
    if starts_ptr is not None:
        starts = tl.load(starts_ptr + positions, mask=positions < T, other=beyond)
    return starts


@triton.jit
def _hide(
    products,  # (queries, keys), or (keys, queries)
    queries,
    keys,
    query_starts,  # where each query's document starts, or None
    key_starts,
    window,
    DIAGONAL: tl.constexpr,
    EDGE: tl.constexpr,
    KEYS_FIRST: tl.constexpr,
):
    """The products with -inf where the query does not see the key."""
    if KEYS_FIRST:
        queries, keys = queries[None, :], keys[:, None]
    else:
        queries, keys = queries[:, None], keys[None, :]
    if DIAGONAL:
        products = tl.where(queries >= keys, products, float("-inf"))
    if EDGE and window is not None:
        products = tl.where(queries - keys < window, products, float("-inf"))
    if query_starts is not None:
        if KEYS_FIRST:
            products = tl.where(key_starts[:, None] == query_starts[None, :], products, float("-inf"))
        else:
            products = tl.where(query_starts[:, None] == key_starts[None, :], products, float("-inf"))
    return products


@triton.jit
def _stack(
    first,  # (N, ...)
    second,  # (N, ...)
):
    """(2 N, ...): the rows of the first, then those of the second."""
    both = tl.join(first, second)
    if len(first.shape) == 1:
        both = both.permute(1, 0).reshape(2 * first.shape[0])
    else:
        both = both.permute(2, 0, 1).reshape(2 * first.shape[0], first.shape[1])
    return both


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
    stride_d,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
):
    rows = tl.arange(0, ROWS)
    ptr += tl.cast(first_row, tl.int64) * stride_t
    inside = (first_row + rows < T)[:, None]
    columns = tl.arange(0, MAIN)
    ptrs = ptr + rows[:, None] * stride_t + columns[None, :] * stride_d
    tl.store(ptrs, main.to(ptr.dtype.element_ty), mask=inside & (columns < D)[None, :])
    if TAIL:
        columns = MAIN + tl.arange(0, TAIL)
        ptrs = ptr + rows[:, None] * stride_t + columns[None, :] * stride_d
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
