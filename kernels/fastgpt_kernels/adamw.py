"""AdamW for many tensors in one launch, in its own form and in GPT-1's.

With the gradient g = scale * gradient, the step count t from 1, and c1 = 1 - beta1^t, c2 = 1 - beta2^t,

    m <- m + (1 - beta1) (g - m)        v <- v + (1 - beta2) (g^2 - v)
    adamw:  p <- p - lr wd p - (lr / c1) m / (sqrt(v) / sqrt(c2) + eps)
    gpt1:   p <- p - r wd p - r m / (sqrt(v) + eps),  r = lr sqrt(c2) / c1

In GPT-1's form the decay, too, is multiplied by the bias correction, and eps stands outside it. Both are

    p <- p - (decay p + size m / (inverse sqrt(v) + eps))

with three numbers that depend on lr, t and the form. A first kernel, one thread a tensor, counts the step and forms
them; a second one makes the update, a program for each chunk of a tensor. Where the scale is not finite, both do
nothing.

Limits: float32 masters and moments; gradients in float32, float16 or bfloat16; working copies in float16 or bfloat16.

Numerics: the bias corrections in float64, all else in float32. A mean with a weight below one half is taken as
old + weight (new - old): 1 - beta2 is then rounded relative to itself, where beta2 m would round relative to 1. Square
root and quotients round correctly.

Sources: Loshchilov and Hutter, "Decoupled Weight Decay Regularization" (2019), algorithm 2; Radford et al., "Improving
Language Understanding by Generative Pre-Training" (2018), section 4.1, as in the optimizer published with it.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt_kernels import launch
from fastgpt_kernels.multi_tensor import CHUNK, TableCache, aligned, chunk_table, to_device
from fastgpt_kernels.optim_arguments import Constants, Member

TENSORS = 128  # tensors of a program of the first kernel
# elements of a turn of the second: four a thread, which a thread loads at once in float32 and stores at once in 16 bits
BLOCK, WARPS = 1_024, 8

# rows of the table of tensors
_SIZE, _MASTER, _GRADIENT, _FIRST, _SECOND, _STEP, _WORKING = (tl.constexpr(row) for row in range(7))
# rows of the table of coefficients
_DECAY, _STEP_SIZE, _INVERSE = (tl.constexpr(row) for row in range(3))


class Tables(NamedTuple):
    """What the kernels look up: where the tensors of one launch lie."""

    tensors: (
        Tensor  # (7, tensors) int64: elements; addresses of master, gradient, exp_avg, exp_avg_sq, step, working copy
    )
    chunks: Tensor  # (chunks, 2) int32: a tensor, and a chunk of it
    coefficients: Tensor  # (3, tensors) float32, written by the first kernel and read by the second
    gradient: torch.dtype
    working: torch.dtype | None
    aligned: bool


@triton.jit
def _prepare_kernel(
    tensors_ptr,  # (7, tensors) int64
    coefficients_ptr,  # (3, tensors) float32
    lr_ptr,  # (1,) or None for lr
    lr,
    scale_ptr,  # (1,) or None for a finite scale
    log_beta1,
    log_beta2,
    weight_decay,
    tensors,
    GPT1: tl.constexpr,
    TENSORS: tl.constexpr,
):
    tensor = tl.program_id(0) * TENSORS + tl.arange(0, TENSORS)
    inside = tensor < tensors
    step_ptr = tl.cast(tl.load(tensors_ptr + _STEP * tensors + tensor, mask=inside), tl.pointer_type(tl.float32))
    step = tl.load(step_ptr, mask=inside, other=0.0)
    if scale_ptr is None:
        step += 1.0
    else:
        step += tl.where(_is_finite(tl.load(scale_ptr).to(tl.float32)), 1.0, 0.0)
    tl.store(step_ptr, step, mask=inside)

    # a first step whose scale is not finite leaves 0, which has no correction
    t = tl.maximum(step, 1.0).to(tl.float64)
    correction1 = 1.0 - tl.exp(t * log_beta1)
    correction2 = tl.sqrt(1.0 - tl.exp(t * log_beta2))
    rate = (tl.zeros_like(step) + lr if lr_ptr is None else tl.zeros_like(step) + tl.load(lr_ptr)).to(tl.float64)
    step_size = rate / correction1
    decay = rate * weight_decay
    inverse = 1.0 / correction2
    if GPT1:
        step_size *= correction2
        decay = step_size * weight_decay
        inverse = tl.zeros_like(correction2) + 1.0
    tl.store(coefficients_ptr + _DECAY * tensors + tensor, decay.to(tl.float32), mask=inside)
    tl.store(coefficients_ptr + _STEP_SIZE * tensors + tensor, step_size.to(tl.float32), mask=inside)
    tl.store(coefficients_ptr + _INVERSE * tensors + tensor, inverse.to(tl.float32), mask=inside)


@triton.jit
def _update_kernel(
    tensors_ptr,  # (7, tensors) int64
    chunks_ptr,  # (chunks, 2) int32
    coefficients_ptr,  # (3, tensors) float32
    scale_ptr,  # (1,) or None for scale
    scale,
    weight1,  # 1 - beta1
    weight2,  # 1 - beta2
    eps,
    tensors,
    GRADIENT: tl.constexpr,
    WORKING: tl.constexpr,  # None where there are no working copies
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    chunk = tl.program_id(0).to(tl.int64)
    tensor = tl.load(chunks_ptr + 2 * chunk)
    start = tl.load(chunks_ptr + 2 * chunk + 1).to(tl.int64) * CHUNK
    size = tl.load(tensors_ptr + _SIZE * tensors + tensor)
    master_ptr = _pointer(tensors_ptr + _MASTER * tensors + tensor, tl.float32, ALIGNED)
    gradient_ptr = _pointer(tensors_ptr + _GRADIENT * tensors + tensor, GRADIENT, ALIGNED)
    first_ptr = _pointer(tensors_ptr + _FIRST * tensors + tensor, tl.float32, ALIGNED)
    second_ptr = _pointer(tensors_ptr + _SECOND * tensors + tensor, tl.float32, ALIGNED)
    working_ptr = master_ptr
    if WORKING is not None:
        working_ptr = _pointer(tensors_ptr + _WORKING * tensors + tensor, WORKING, ALIGNED)
    decay = tl.load(coefficients_ptr + _DECAY * tensors + tensor)
    step_size = tl.load(coefficients_ptr + _STEP_SIZE * tensors + tensor)
    inverse = tl.load(coefficients_ptr + _INVERSE * tensors + tensor)
    factor = scale
    if scale_ptr is not None:
        factor = tl.load(scale_ptr).to(tl.float32)
    if _is_finite(factor):
        for block in range(start, tl.minimum(start + CHUNK, size), BLOCK):
            # without a mask, the compiler may load and store sixteen bytes at once
            if block + BLOCK <= size:
                _update(
                    master_ptr, gradient_ptr, first_ptr, second_ptr, working_ptr, block, size, factor, weight1, weight2,
                    eps, decay, step_size, inverse, WORKING, False, BLOCK,
                )  # fmt: skip
            else:
                _update(
                    master_ptr, gradient_ptr, first_ptr, second_ptr, working_ptr, block, size, factor, weight1, weight2,
                    eps, decay, step_size, inverse, WORKING, True, BLOCK,
                )  # fmt: skip


@triton.jit
def _update(
    master_ptr,  # (size,) float32
    gradient_ptr,  # (size,)
    first_ptr,  # (size,) float32
    second_ptr,  # (size,) float32
    working_ptr,  # (size,)
    block,
    size,
    factor,
    weight1,
    weight2,
    eps,
    decay,
    step_size,
    inverse,
    WORKING: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offset = block + tl.arange(0, BLOCK)
    inside = offset < size if MASKED else None
    p = tl.load(master_ptr + offset, mask=inside)
    g = tl.load(gradient_ptr + offset, mask=inside).to(tl.float32) * factor
    m = _average(tl.load(first_ptr + offset, mask=inside), g, weight1)
    v = _average(tl.load(second_ptr + offset, mask=inside), g * g, weight2)
    p -= decay * p + step_size * tl.div_rn(m, tl.sqrt_rn(v) * inverse + eps)
    tl.store(first_ptr + offset, m, mask=inside)
    tl.store(second_ptr + offset, v, mask=inside)
    tl.store(master_ptr + offset, p, mask=inside)
    if WORKING is not None:
        tl.store(working_ptr + offset, p.to(WORKING), mask=inside)


@triton.jit
def _average(old, new, weight):
    """old + weight (new - old), with the smaller of weight and 1 - weight multiplying."""
    difference = new - old
    return tl.where(weight < 0.5, old + weight * difference, new + (weight - 1.0) * difference)


@triton.jit
def _pointer(
    address_ptr,  # (1,) int64
    ELEMENT: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    pointer = tl.cast(tl.load(address_ptr), tl.pointer_type(ELEMENT))
    # said of the integer, the compiler would forget it in the cast
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


@triton.jit
def _is_finite(x):
    return tl.abs(x) < float("inf")


def launch_update(tables: Tables, constants: Constants, lr: float | Tensor, scale: float | Tensor) -> None:
    """One update of the tensors in the tables.

    Args:
        tables: where they lie.
        constants: of their parameter group.
        lr: the learning rate, or a tensor on their device that holds it.
        scale: factor of the gradients, finite; or a tensor on their device that holds it.
    """
    tensors, chunks = tables.tensors.shape[1], len(tables.chunks)
    beta1, beta2 = constants.betas
    lr_ptr, lr_value = (lr, 0.0) if isinstance(lr, Tensor) else (None, float(lr))
    scale_ptr, scale_value = (scale, 1.0) if isinstance(scale, Tensor) else (None, float(scale))
    with launch.on_device_of(tables.tensors):
        _prepare_kernel[(triton.cdiv(tensors, TENSORS),)](
            tables.tensors,
            tables.coefficients,
            lr_ptr,
            lr_value,
            scale_ptr,
            _logarithm(beta1),
            _logarithm(beta2),
            float(constants.weight_decay),
            tensors,
            constants.form == "gpt1",
            TENSORS,
            **launch.OPTIONS,
        )
        if not chunks:
            return
        _update_kernel[(chunks,)](
            tables.tensors,
            tables.chunks,
            tables.coefficients,
            scale_ptr,
            scale_value,
            1.0 - beta1,
            1.0 - beta2,
            float(constants.eps),
            tensors,
            _element(tables.gradient),
            tables.working and _element(tables.working),
            tables.aligned,
            CHUNK,
            BLOCK,
            num_warps=WARPS,
            **launch.OPTIONS,
        )


def update(
    members: Sequence[Member],
    constants: Constants,
    lr: float | Tensor,
    scale: float | Tensor,
    cache: TableCache[Tables],
) -> None:
    """One update of tensors whose gradients have one dtype, as have their working copies, or there are none."""
    addresses = tuple(0 if x is None else x.data_ptr() for member in members for x in member)
    sizes = tuple(member.master.numel() for member in members)
    first = members[0]
    dtypes = (first.gradient.dtype, None if first.working is None else first.working.dtype)
    device = first.master.device

    def build() -> Tables:
        columns = torch.tensor(addresses, dtype=torch.int64, device="cpu").view(len(members), len(first)).t()
        table = torch.cat([torch.tensor([sizes], dtype=torch.int64, device="cpu"), columns])
        coefficients = torch.empty((3, len(members)), dtype=torch.float32, device=device)
        rows = [row for number, row in enumerate(columns.tolist()) if first[number] is not first.step]
        whole = aligned([address for row in rows for address in row])
        return Tables(to_device(table, device), chunk_table(sizes, device), coefficients, *dtypes, whole)

    launch_update(cache.get((addresses, sizes, dtypes, device), build), constants, lr, scale)


def _logarithm(beta: float) -> float:
    return math.log(beta) if beta > 0.0 else -math.inf


def _element(dtype: torch.dtype) -> tl.dtype:
    return {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[dtype]
