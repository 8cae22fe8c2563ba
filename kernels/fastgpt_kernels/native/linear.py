"""Linear maps of bfloat16 rows by the C++ of `src/product.cpp`: with a bias, before a GELU, and to logits.

y = x w^T + b    dx = dy w    dw = dy^T x    db = sum over rows of dy
"""

from typing import Any

import torch
from torch import Tensor

from fastgpt_kernels import checks, torch_ops
from fastgpt_kernels.checks import REMEDY
from fastgpt_kernels.errors import raise_if_any
from fastgpt_kernels.native.calls import call, takes
from fastgpt_kernels.native.library import has_matrix_units
from fastgpt_kernels.torch_ops.gelu import in_autocast_dtype

MATRIX_UNITS = has_matrix_units()  # asked now: a compiler would trace into the question
FEWEST_ROWS = 16  # below, PyTorch's products are faster, which do not pack the weight for so little


def multiplies(x: Tensor, weight: Tensor) -> bool:
    """Whether the product of x (..., K) with a weight (N, K) is better ours than PyTorch's."""
    rows = x.numel() // max(1, x.shape[-1])
    return takes(x, weight) and weight.numel() > 0 and rows >= FEWEST_ROWS and not MATRIX_UNITS


def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a (M, K) b (K, N) + bias (N,), each of a and b dense in rows or in columns."""
    (M, K), N = a.shape, b.shape[1]
    out = a.new_empty((M, N))
    call("fastgpt_product", *_operand(a), *_operand(b), out, N, bias, M, N, K)
    return out


def _operand(x: Tensor) -> tuple[Tensor, int, int]:
    """A matrix, how far apart its rows are, and 0; or its columns, and 1."""
    if x.stride(1) == 1 or x.shape[1] == 1:
        return x, x.stride(0), 0
    return x, x.stride(1), 1


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


@torch.library.custom_op("fastgpt::native_linear", mutates_args=())
def linear_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (rows, K) weight (N, K)^T + bias."""
    return product(_dense(x), _dense(weight).t(), None if bias is None else bias.contiguous())


@linear_rows.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


@torch.library.custom_op("fastgpt::native_linear_backward", mutates_args=())
def _gradients(dy: Tensor, x: Tensor, weight: Tensor, needed: list[bool]) -> list[Tensor]:
    """Of x, weight and bias, those that are needed."""
    dy, x, weight = dy.contiguous(), _dense(x), _dense(weight)
    gradients = []
    if needed[0]:
        gradients.append(product(dy, weight))
    if needed[1]:
        gradients.append(product(dy.t(), x))
    if needed[2]:
        dbias = dy.new_empty(dy.shape[1])
        call("fastgpt_column_sums", dy, dbias, *dy.shape)
        gradients.append(dbias)
    return gradients


@_gradients.register_fake
def _(dy: Tensor, x: Tensor, weight: Tensor, needed: list[bool]) -> list[Tensor]:
    shapes = (x.shape, weight.shape, dy.shape[1:])
    return [dy.new_empty(shape) for shape, need in zip(shapes, needed, strict=True) if need]


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    needed = list(ctx.needs_input_grad)
    gradients = iter(_gradients(dy, *ctx.saved_tensors, needed))
    return tuple(next(gradients) if need else None for need in needed)


linear_rows.register_autograd(_differentiate, setup_context=_setup_context)


def mapped(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (..., K) weight (N, K)^T + bias, of arguments that are checked and that this file `multiplies`."""
    y: Tensor = linear_rows(x.reshape(-1, x.shape[-1]), weight, bias)
    return y.view(*x.shape[:-1], len(weight))


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x (..., K) weight (N, K)^T + bias (N,), (..., N); under autocast in its dtype. Else as `torch_ops.linear`."""
    raise_if_any(checks.against_linear(x, weight, bias), "linear", "native", REMEDY)
    x, weight, bias = in_autocast_dtype(x, weight, bias)
    return mapped(x, weight, bias) if multiplies(x, weight) else torch_ops.linear(x, weight, bias)


def logits(x: Tensor, weight: Tensor) -> Tensor:
    """The logits x (..., N) weight (V, N)^T, (..., V); under autocast in its dtype. Else as `torch_ops.logits`."""
    raise_if_any(checks.against_logits(x, weight), "logits", "native", REMEDY)
    x, weight = in_autocast_dtype(x, weight)
    return mapped(x, weight, None) if multiplies(x, weight) else torch_ops.logits(x, weight)
