"""Dropout of bfloat16 from a seed, alone and added to a residual, by the C++ of `src/norms.cpp`.

The mask is that of `fastgpt_kernels.torch_ops.dropout`. Autograd keeps the seed alone: the backward draws it again.
"""

from typing import Any

import torch
from torch import Tensor

from fastgpt_kernels import checks, torch_ops
from fastgpt_kernels.checks import REMEDY, Seed
from fastgpt_kernels.errors import raise_if_any
from fastgpt_kernels.native.calls import call, mask_of, takes
from fastgpt_kernels.seeds import rows_of, seed_tensor


@torch.library.custom_op("fastgpt::native_dropout", mutates_args=())
def dropped(x: Tensor, residual: Tensor | None, p: float, seed: Tensor) -> Tensor:
    """Dropout of x, added to a residual where there is one."""
    x = x.contiguous()
    residual = None if residual is None else residual.contiguous()
    y = torch.empty_like(x)
    rows, columns = rows_of(x.shape)
    call("fastgpt_dropout", x, residual, y, rows, columns, mask_of(seed, p))
    return y


@dropped.register_fake
def _(x: Tensor, residual: Tensor | None, p: float, seed: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor | None, float, Tensor], output: Tensor) -> None:
    _, residual, ctx.p, seed = inputs
    ctx.added = residual is not None
    ctx.save_for_backward(seed)


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    (seed,) = ctx.saved_tensors
    dx = dropped(dy, None, ctx.p, seed) if ctx.needs_input_grad[0] else None
    return dx, dy if ctx.added else None, None, None


dropped.register_autograd(_differentiate, setup_context=_setup_context)


def dropout(x: Tensor, p: float, seed: Seed | None) -> Tensor:
    """x / (1 - p) for the elements that the seed keeps, and 0 for the others; as `torch_ops.dropout`."""
    raise_if_any(checks.against_dropout_of(x, p, seed), "dropout", "native", REMEDY)
    if p == 0.0 or seed is None or not takes(x):
        return torch_ops.dropout(x, p, seed)
    y: Tensor = dropped(x, None, p, seed_tensor(seed, x.device))
    return y


def dropout_add(x: Tensor, residual: Tensor, p: float, seed: Seed | None) -> Tensor:
    """residual + dropout(x), in the dtype of residual; as `torch_ops.dropout_add`."""
    raise_if_any(checks.against_dropout_add(x, residual, p, seed), "dropout_add", "native", REMEDY)
    if p == 0.0 or seed is None or not takes(x, residual):
        return torch_ops.dropout_add(x, residual, p, seed)
    y: Tensor = dropped(x, residual, p, seed_tensor(seed, x.device))
    return y
