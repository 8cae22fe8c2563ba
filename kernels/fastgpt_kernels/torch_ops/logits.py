"""The output matrix of a language model, whose logits a GPU computes in rows of a multiple of 128 columns.

    z = x W^T    dx = dz W    dW = dz^T x        x (rows, N), W (V, N)

V is what a tokenizer made it: GPT-2's 50,257 is odd. Rows of an odd length in 16 bits begin where no wide load may, and
cuBLAS has slow kernels alone for them, in each of the three products. Here W is copied into rows that end with zeros,
which makes columns of logits that are zero; the result is a view of the others, V wide. No one reads the rest but the
products for dx and dW, to which zeros add nothing: the numbers are those of the products as written above.

A gradient that was written over the logits (`cross_entropy` with `consume`) still has the zeros beside it. Any other is
taken as it is.

The copy of W costs 4 V N bytes of traffic, and pays from some hundred rows on. A CPU gains nothing by it.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt_kernels import checks
from fastgpt_kernels.checks import REMEDY
from fastgpt_kernels.errors import raise_if_any
from fastgpt_kernels.torch_ops.gelu import in_autocast_dtype

MULTIPLE = 128  # columns: what the widest tiles of a product take at once
ENOUGH_ROWS = 512  # for the copy of W to pay


def padded_columns(V: int) -> int:
    """The columns of logits in memory, for V that count."""
    return -(-V // MULTIPLE) * MULTIPLE


def is_padded(x: Tensor, weight: Tensor) -> bool:
    """Whether logits of x (..., N) and weight (V, N) are computed with columns that do not count."""
    few = x.numel() < ENOUGH_ROWS * weight.shape[1]
    return x.device.type == "cuda" and x.dtype.itemsize == 2 and bool(weight.shape[0] % MULTIPLE) and not few


@torch.library.custom_op("fastgpt::padded_logits", mutates_args=())
def _padded_logits(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The logits (rows, V), in rows of `padded_columns`; and W with rows of zeros, for the backward."""
    V = weight.shape[0]
    padded = F.pad(weight, (0, 0, 0, padded_columns(V) - V))
    return _first_columns(x @ padded.t(), V), padded


@_padded_logits.register_fake
def _(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    V, N = weight.shape
    columns = padded_columns(V)
    return x.new_empty_strided((x.shape[0], V), (columns, 1)), weight.new_empty((columns, N))


def _first_columns(z: Tensor, V: int) -> Tensor:
    """The first V columns of z, as a tensor that autograd does not know for a view: the loss may write over it."""
    with torch.no_grad():
        return z.new_empty(0).set_(z.untyped_storage(), 0, (z.shape[0], V), z.stride())


@torch.library.custom_op("fastgpt::padded_logits_backward", mutates_args=())
def _gradients(dz: Tensor, x: Tensor, padded: Tensor, zeros_follow: bool) -> tuple[Tensor, Tensor]:
    """dx (rows, N) and dW (V, N); with `zeros_follow` each row of dz (rows, V) goes on with zeros in memory."""
    V, columns = dz.shape[1], padded.shape[0]
    if zeros_follow:
        dz = dz.as_strided((dz.shape[0], columns), (columns, 1))
    else:
        padded = padded[:V]
    return dz @ padded, (dz.t() @ x)[:V]


@_gradients.register_fake
def _(dz: Tensor, x: Tensor, padded: Tensor, zeros_follow: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), padded.new_empty((dz.shape[1], padded.shape[1]))


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
    logits, padded = output
    ctx.save_for_backward(inputs[0], padded)
    # to know it again: it goes on to the loss, and comes back with the gradient. A compiler lays memory out by itself.
    ctx.memory = logits.untyped_storage() if type(logits) is Tensor else None


def _differentiate(ctx: Any, dz: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
    x, padded = ctx.saved_tensors
    memory, ctx.memory = ctx.memory, None
    zeros_follow = memory is not None and dz.untyped_storage()._cdata == memory._cdata and dz.stride(1) == 1
    del memory
    dx, dweight = _gradients(dz, x, padded, zeros_follow)
    return dx, dweight


_padded_logits.register_autograd(_differentiate, setup_context=_setup)


def logits(x: Tensor, weight: Tensor) -> Tensor:
    """The logits x weight^T, (..., V).

    Args:
        x: (..., N), any floating-point dtype.
        weight: (V, N), as in nn.Linear, in the dtype of x. Under autocast, both are cast to its dtype.

    Returns:
        (..., V). On a GPU in 16 bits, rows may lie further apart than V elements.

    Raises:
        UnsupportedInput: for arguments outside these.
    """
    raise_if_any(checks.against_logits(x, weight), "logits", "torch", REMEDY)
    x, weight = in_autocast_dtype(x, weight)
    return padded_logits(x, weight) if is_padded(x, weight) else F.linear(x, weight)


def padded_logits(x: Tensor, weight: Tensor) -> Tensor:
    """The logits x (..., N) weight (V, N)^T, with columns beyond V in memory."""
    x, weight = in_autocast_dtype(x, weight)
    z: Tensor = _padded_logits(x.reshape(-1, x.shape[-1]), weight)[0]
    return z.view(*x.shape[:-1], weight.shape[0])
