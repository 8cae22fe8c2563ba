"""The L2 norm of many tensors in one launch for each dtype, and one for the sum.

    norm = sqrt(sum over chunks of s_c),  s_c = sum over the elements of chunk c of x^2

Each program sums one chunk of a tensor; one program sums the chunks, in the order of a table. Nothing is added
atomically, so that a repeat gives the same bits.

Limits: float32, float16, bfloat16, mixed; any number of tensors of any size.

Numerics: squares and sums in float64, which holds the square of every float32 number: the norm overflows only where it
exceeds float32 itself. One conversion and one product an element stay below the time of loading it, also where float64
is slow. One rounding to float32.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt_kernels import launch
from fastgpt_kernels.multi_tensor import CHUNK, TableCache, aligned, chunk_table, to_device

BLOCK, WARPS = 2_048, 8  # a turn of a program: eight elements a thread
SUM_BLOCK = 1_024  # partial sums of one turn of the last program


class Tables(NamedTuple):
    """Where the tensors of one dtype lie."""

    tensors: Tensor  # (2, tensors) int64: elements, and addresses
    chunks: Tensor  # (chunks, 2) int32: a tensor, and a chunk of it
    dtype: torch.dtype
    aligned: bool


@triton.jit
def _chunk_sums_kernel(
    tensors_ptr,  # (2, tensors) int64
    chunks_ptr,  # (chunks, 2) int32
    sums_ptr,  # (chunks,) float64
    tensors,
    ELEMENT: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    chunk = tl.program_id(0).to(tl.int64)
    tensor = tl.load(chunks_ptr + 2 * chunk)
    start = tl.load(chunks_ptr + 2 * chunk + 1).to(tl.int64) * CHUNK
    size = tl.load(tensors_ptr + tensor)
    x_ptr = tl.cast(tl.load(tensors_ptr + tensors + tensor), tl.pointer_type(ELEMENT))
    if ALIGNED:
        x_ptr = tl.multiple_of(x_ptr, 16)
    total = tl.zeros((BLOCK,), tl.float64)
    for block in range(start, tl.minimum(start + CHUNK, size), BLOCK):
        offset = block + tl.arange(0, BLOCK)
        # without a mask, the compiler may load sixteen bytes at once
        if block + BLOCK <= size:
            x = tl.load(x_ptr + offset).to(tl.float32).to(tl.float64)
        else:
            x = tl.load(x_ptr + offset, mask=offset < size, other=0.0).to(tl.float32).to(tl.float64)
        total += x * x
    tl.store(sums_ptr + chunk, tl.sum(total, 0))


@triton.jit
def _norm_kernel(
    sums_ptr,  # (chunks,) float64
    norm_ptr,  # (1,) float32
    chunks,
    BLOCK: tl.constexpr,
):
    total = tl.zeros((BLOCK,), tl.float64)
    for block in range(0, chunks, BLOCK):
        chunk = block + tl.arange(0, BLOCK)
        total += tl.load(sums_ptr + chunk, mask=chunk < chunks, other=0.0)
    tl.store(norm_ptr, tl.sqrt(tl.sum(total, 0)).to(tl.float32))


def launch_norm(tables: Sequence[Tables]) -> Tensor:
    """The norm of the tensors in the tables, each of which has at least one chunk."""
    chunks = sum(len(table.chunks) for table in tables)
    device = tables[0].tensors.device
    sums = torch.empty(chunks, dtype=torch.float64, device=device)
    norm = torch.empty((), dtype=torch.float32, device=device)
    first = 0
    with launch.on_device_of(sums):
        for table in tables:
            last = first + len(table.chunks)
            _chunk_sums_kernel[(len(table.chunks),)](
                table.tensors,
                table.chunks,
                sums[first:last],
                table.tensors.shape[1],
                _ELEMENTS[table.dtype],
                table.aligned,
                CHUNK,
                BLOCK,
                num_warps=WARPS,
                **launch.OPTIONS,
            )
            first = last
        _norm_kernel[(1,)](sums, norm, chunks, SUM_BLOCK, **launch.OPTIONS)
    return norm


def norm(tensors: Sequence[Tensor]) -> Tensor:
    """The norm of all elements, on the tensors' device."""
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for x in tensors:
        if x.numel():
            by_dtype.setdefault(x.dtype, []).append(x.contiguous())
    if not by_dtype:
        return torch.zeros((), device=tensors[0].device)
    return launch_norm([_tables(alike) for alike in by_dtype.values()])


_ELEMENTS = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
_cache: TableCache[Tables] = TableCache()


def _tables(tensors: Sequence[Tensor]) -> Tables:
    addresses = tuple(x.data_ptr() for x in tensors)
    sizes = tuple(x.numel() for x in tensors)
    dtype, device = tensors[0].dtype, tensors[0].device

    def build() -> Tables:
        table = torch.tensor([sizes, addresses], dtype=torch.int64, device="cpu")
        return Tables(to_device(table, device), chunk_table(sizes, device), dtype, aligned(addresses))

    return _cache.get((addresses, sizes, dtype, device), build)
