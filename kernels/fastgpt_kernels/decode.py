"""Attention of one query over cached keys and values: the next token of a text that is being generated. No gradient.

For each sequence and head, with q, k_j and v_j in R^D and the length n of the sequence:

    s_j = scale q . k_j    for j < n        o = sum_j exp(s_j) v_j / sum_j exp(s_j)

One query gives no work for more than one program, and a batch of one gives few programs: the keys are therefore cut
into stretches, each with a program of its own, which leaves of its stretch i

    m_i = max_j s_j        l_i = sum_j exp(s_j - m_i)        a_i = sum_j exp(s_j - m_i) v_j

A second kernel joins them, in ascending order: with m = max_i m_i,

    o = sum_i exp(m_i - m) a_i / sum_i exp(m_i - m) l_i

The length of a stretch depends on D alone. What a sequence gets is therefore the same, bit for bit, whatever the batch
that it is in, the capacity of the cache and the GPU's number of multiprocessors. The host never reads the lengths:
programs beyond them end at once.

Limits: head sizes 16 to 256, float32, float16, bfloat16; any strides. A length counts as 0 below and as T_max above.

Numerics: reading the cache is all the cost, so that the products are float32 too, without tensor cores; softmax in
float32 in base 2; one rounding.

Source: Dao, Haziza, Massa and Sizov, "Flash-Decoding for long-context inference" (2023).
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt_kernels import checks, launch
from fastgpt_kernels.attention import against_head_size, pieces
from fastgpt_kernels.attention_kernels import _LOG2_E, _LOWEST

ELEMENTS_OF_THREAD = 64  # of its stretch's keys, and as many values: they are loaded before the first is needed
STRETCHES = 16  # joined together


@triton.jit
def _stretch_kernel(
    q_ptr,  # (B, H, D)
    k_ptr,  # (B, H, T_max, D)
    v_ptr,  # (B, H, T_max, D)
    lengths_ptr,  # (B,) integers
    sums_ptr,  # (B, H, stretches, D) float32: a_i
    statistics_ptr,  # (2, B, H, stretches) float32: m_i in base 2, and l_i
    q_stride_b,
    q_stride_h,
    q_stride_d,
    k_stride_b,
    k_stride_h,
    k_stride_t,
    k_stride_d,
    v_stride_b,
    v_stride_h,
    v_stride_t,
    v_stride_d,
    lengths_stride,
    B,
    H,
    T_max,
    scale,
    D: tl.constexpr,
    MAIN: tl.constexpr,  # D = MAIN columns and a TAIL, both padded to a power of two
    TAIL: tl.constexpr,
    KEYS: tl.constexpr,
):
    stretches = tl.cdiv(T_max, KEYS)
    stretch = tl.program_id(0) % stretches
    batch_head = (tl.program_id(0) // stretches).to(tl.int64)
    batch, head = batch_head // H, batch_head % H
    first = stretch * KEYS
    length = tl.minimum(tl.load(lengths_ptr + batch * lengths_stride).to(tl.int64), T_max)
    if first < length:
        q_ptr += batch * q_stride_b + head * q_stride_h
        k_ptr += batch * k_stride_b + head * k_stride_h + first.to(tl.int64) * k_stride_t
        v_ptr += batch * v_stride_b + head * v_stride_h + first.to(tl.int64) * v_stride_t
        left = length - first
        k = _load(k_ptr, left, k_stride_t, k_stride_d, KEYS, D, 0, MAIN)
        v = _load(v_ptr, left, v_stride_t, v_stride_d, KEYS, D, 0, MAIN)
        products = tl.sum(k * _load(q_ptr, 1, 0, q_stride_d, 1, D, 0, MAIN), 1)
        if TAIL:
            k_tail = _load(k_ptr, left, k_stride_t, k_stride_d, KEYS, D, MAIN, TAIL)
            v_tail = _load(v_ptr, left, v_stride_t, v_stride_d, KEYS, D, MAIN, TAIL)
            products += tl.sum(k_tail * _load(q_ptr, 1, 0, q_stride_d, 1, D, MAIN, TAIL), 1)
        products = tl.where(tl.arange(0, KEYS) < left, products, float("-inf"))
        scale_log2 = scale * _LOG2_E
        largest = tl.max(products, 0) * scale_log2
        # the products enter the difference unrounded: large scores lose no digits
        weights = tl.exp2(
            tl.fma(products, tl.full((KEYS,), scale_log2, tl.float32), tl.full((KEYS,), -largest, tl.float32))
        )

        row = batch_head * stretches + stretch
        tl.store(statistics_ptr + row, largest)
        tl.store(statistics_ptr + tl.cast(B, tl.int64) * H * stretches + row, tl.sum(weights, 0))
        column = tl.arange(0, MAIN)
        tl.store(sums_ptr + row * D + column, tl.sum(weights[:, None] * v, 0), mask=column < D)
        if TAIL:
            column = MAIN + tl.arange(0, TAIL)
            tl.store(sums_ptr + row * D + column, tl.sum(weights[:, None] * v_tail, 0), mask=column < D)


@triton.jit
def _join_stretches_kernel(
    sums_ptr,  # (B, H, stretches, D) float32
    statistics_ptr,  # (2, B, H, stretches) float32
    lengths_ptr,  # (B,) integers
    out_ptr,  # (B, H, D)
    lengths_stride,
    B,
    H,
    T_max,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,  # D padded to a power of two
    KEYS: tl.constexpr,
    STRETCHES: tl.constexpr,
):
    batch_head = tl.program_id(0).to(tl.int64)
    length = tl.minimum(tl.load(lengths_ptr + batch_head // H * lengths_stride).to(tl.int64), T_max)
    used = tl.cdiv(tl.maximum(length, 0), KEYS).to(tl.int32)
    stretches = tl.cdiv(T_max, KEYS)
    column = tl.arange(0, COLUMNS)
    largest = tl.full((1,), _LOWEST, tl.float32)
    total = tl.zeros((1,), tl.float32)
    sums = tl.zeros((COLUMNS,), tl.float32)
    for first in range(0, used, STRETCHES):
        stretch = first + tl.arange(0, STRETCHES)
        row = batch_head * stretches + stretch
        maxima = tl.load(statistics_ptr + row, mask=stretch < used, other=float("-inf"))
        row_sums = tl.load(statistics_ptr + tl.cast(B, tl.int64) * H * stretches + row, mask=stretch < used, other=0.0)
        inside = (stretch < used)[:, None] & (column < D)[None, :]
        row_of_sums = tl.load(sums_ptr + row[:, None] * D + column[None, :], mask=inside, other=0.0)
        new_largest = tl.maximum(largest, tl.max(maxima, 0))
        shrink = tl.exp2(largest - new_largest)
        weights = tl.exp2(maxima - new_largest)
        total = total * shrink + tl.sum(weights * row_sums, 0)
        sums = sums * shrink + tl.sum(weights[:, None] * row_of_sums, 0)
        largest = new_largest
    out = tl.where(used > 0, sums / tl.where(used > 0, total, 1.0), 0.0)
    tl.store(out_ptr + batch_head * D + column, out.to(out_ptr.dtype.element_ty), mask=column < D)


@triton.jit
def _load(
    ptr,  # (T, D)
    rows,  # that may be read
    stride_t,
    stride_d,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    FIRST: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A piece of some rows in float32, with zeros outside it."""
    row = tl.arange(0, ROWS)
    column = FIRST + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None]
    if FIRST + COLUMNS > D:
        inside = inside & (column < D)[None, :]
    return tl.load(ptr + row[:, None] * stride_t + column[None, :] * stride_d, mask=inside, other=0.0).to(tl.float32)


def keys_of_program(head_size: int) -> int:
    """The length of a stretch: so long that its sums are little to write beside its keys and values to read."""
    return 128 if head_size <= 128 else 64


def launch_decode(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, scale: float) -> Tensor:
    """(B, H, D), contiguous, from q (B, H, D), caches (B, H, T_max, D) and lengths (B,) of any strides."""
    B, H, T_max, D = k_cache.shape
    keys = keys_of_program(D)
    stretches = triton.cdiv(T_max, keys)
    main, tail = pieces(D)
    out = q.new_empty((B, H, D))
    sums = q.new_empty((B, H, stretches, D), dtype=torch.float32)
    statistics = q.new_empty((2, B, H, stretches), dtype=torch.float32)
    warps = max(1, triton.next_power_of_2(keys * (main + tail)) // (32 * ELEMENTS_OF_THREAD))
    options = launch.with_all_registers(q.device, warps) if q.dtype == torch.float32 else launch.OPTIONS
    with launch.on_device_of(q):
        _stretch_kernel[(B * H * stretches,)](
            q,
            k_cache,
            v_cache,
            lengths,
            sums,
            statistics,
            *q.stride(),
            *k_cache.stride(),
            *v_cache.stride(),
            *lengths.stride(),
            B,
            H,
            T_max,
            scale,
            D,
            main,
            tail,
            keys,
            num_warps=warps,
            **options,
        )
        _join_stretches_kernel[(B * H,)](
            sums,
            statistics,
            lengths,
            out,
            *lengths.stride(),
            B,
            H,
            T_max,
            D,
            triton.next_power_of_2(D),
            keys,
            STRETCHES,
            **launch.OPTIONS,
        )
    return out


@torch.library.custom_op("fastgpt::decode_attention", mutates_args=())
def _decode(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, scale: float) -> Tensor:
    return launch_decode(q, k_cache, v_cache, lengths, scale)


@_decode.register_fake
def _(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, scale: float) -> Tensor:
    return q.new_empty(q.shape)


def decode_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, *, scale: float | None = None
) -> Tensor:
    """One query over the keys and values kept of the tokens before it, in Triton.

    Args:
        q: (B, H, D), float32, float16 or bfloat16, 16 <= D <= 256, any strides.
        k_cache: (B, H, T_max, D), in the dtype of q, any strides; read in place, unless a stretch spans 2^31
            elements: then it is copied.
        v_cache: the same.
        lengths: (B,) integers: the positions in use of the caches, at most T_max. The others may hold anything.
        scale: factor of the scores before the softmax, positive; 1 / sqrt(D) when None.

    Returns:
        (B, H, D), contiguous, in the dtype of q; zeros where the length is 0. It requires no gradient.

    Raises:
        UnsupportedInput: for arguments outside these.
    """
    wrong = checks.against_decode_attention(q, k_cache, v_cache, lengths, scale)
    unfit = launch.against(q=q, k_cache=k_cache, v_cache=v_cache) + against_head_size(q, 3)
    launch.refuse("decode_attention", wrong, unfit)
    with torch.no_grad():
        rows = keys_of_program(q.shape[-1])
        q = launch.within_reach(q, 0, 1)
        k_cache, v_cache = (launch.within_reach(cache, cache.stride(2), rows) for cache in (k_cache, v_cache))
        out: Tensor = _decode(q, k_cache, v_cache, lengths, scale or 1.0 / math.sqrt(q.shape[-1]))
    return out
