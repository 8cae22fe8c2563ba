"""Dropout from a seed, alone and added to a residual, by PyTorch.

    y = kept x / (1 - p)    y = residual + kept x / (1 - p)    dx = kept dy / (1 - p)    dresidual = dy

On a CPU in chunks that stay in the cache: the mask (`fastgpt_kernels.seeds`) clears the bits of what is dropped, and
one more pass scales, adds and rounds once. The backward draws the mask again, which takes less time than the two passes
over memory that keep it, so that autograd holds the seed alone. Elsewhere the mask is a tensor of its own, one byte an
element, and autograd keeps it.
"""

from typing import Any

import torch
from torch import Tensor

from fastgpt_kernels import checks
from fastgpt_kernels.checks import REMEDY, Seed
from fastgpt_kernels.errors import raise_if_any
from fastgpt_kernels.seeds import mask_parts, rate, rows_of, seed_tensor, seeded_dropout

# the integers that hold the bits of a number, by its bytes
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.library.custom_op("fastgpt::dropout_in_chunks", mutates_args=())
def _dropout(x: Tensor, residual: Tensor | None, seed: Tensor, p: float, dtype: torch.dtype) -> Tensor:
    """Dropout of x on a CPU, added to a residual where there is one, in `dtype`."""
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    rows = rows_of(x.shape)
    x_bits, y_rows = x.contiguous().view(rows).view(BITS[x.element_size()]), y.view(rows)
    residual_rows = None if residual is None else residual.contiguous().view(rows)
    scale, buffer = 1.0 / (1.0 - rate(p)), None
    for part, kept in mask_parts(x.shape, seed, p):
        if buffer is None:
            buffer = torch.empty_like(x_bits[part])
        bits = buffer[: len(kept)]
        if kept.dtype == bits.dtype:
            torch.bitwise_and(x_bits[part], kept, out=bits)
        else:
            bits.copy_(kept).bitwise_and_(x_bits[part])
        if residual_rows is None:
            torch.mul(bits.view(x.dtype), scale, out=y_rows[part])
        else:
            torch.add(residual_rows[part], bits.view(x.dtype), alpha=scale, out=y_rows[part])
    return y


@_dropout.register_fake
def _(x: Tensor, residual: Tensor | None, seed: Tensor, p: float, dtype: torch.dtype) -> Tensor:
    return torch.empty(x.shape, dtype=dtype, device=x.device)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor | None, Tensor, float, torch.dtype], output: Tensor) -> None:
    x, residual, seed, ctx.p, _ = inputs
    ctx.dtype, ctx.added = x.dtype, residual is not None
    ctx.save_for_backward(seed)


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    (seed,) = ctx.saved_tensors
    dx = _dropout(dy, None, seed, ctx.p, ctx.dtype) if ctx.needs_input_grad[0] else None
    return dx, dy if ctx.added else None, None, None, None


_dropout.register_autograd(_differentiate, setup_context=_setup_context)


def dropout(x: Tensor, p: float, seed: Seed | None) -> Tensor:
    """x / (1 - p) for the elements that the seed keeps, each with probability 1 - p, and 0 for the others.

    The mask depends on the seed and the shape alone, and leaves PyTorch's global generators untouched. The probability
    is p to within 2^-17, and the scale that of the rate really used (`fastgpt_kernels.seeds.rate`).
    """
    raise_if_any(checks.against_dropout_of(x, p, seed), "dropout", "torch", REMEDY)
    return _dropped(x, p, seed)


def dropout_add(x: Tensor, residual: Tensor, p: float, seed: Seed | None) -> Tensor:
    """residual + dropout(x), in the dtype of residual."""
    reasons = checks.against_dropout_add(x, residual, p, seed)
    raise_if_any(reasons, "dropout_add", "torch", REMEDY)
    return residual_sum(x, residual, p, seed)


def residual_sum(x: Tensor, residual: Tensor, p: float, seed: Seed | None) -> Tensor:
    """`dropout_add` of arguments that are checked."""
    if p == 0.0 or seed is None or not _in_chunks(x):
        return (residual + _dropped(x, p, seed)).to(residual.dtype)
    y: Tensor = _dropout(x, residual, seed_tensor(seed, x.device), p, residual.dtype)
    return y


def _dropped(x: Tensor, p: float, seed: Seed | None) -> Tensor:
    if p == 0.0 or seed is None:
        return x
    key = seed_tensor(seed, x.device)
    if not _in_chunks(x):
        return seeded_dropout(x, p, key)
    y: Tensor = _dropout(x, None, key, p, x.dtype)
    return y


def _in_chunks(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.is_floating_point() and x.element_size() in BITS
