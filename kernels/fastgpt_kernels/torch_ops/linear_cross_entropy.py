"""Cross-entropy of a linear map, a chunk of rows at a time: the logits never exist in full.

    z = x W^T    loss = -log_softmax(z)_t    dz = (softmax(z) - onehot(t)) dloss    dx = dz W    dW = dz^T x

The forward takes the logits of some rows into a buffer, their losses from it, and goes on to the next rows. The
backward does the same once more, writes dz over the logits, and takes dx of these rows and their part of dW from it.

That is four matrix products, where a whole z would need three. Taking dz in the forward would spare the fourth, but
there dloss is unknown: in float16, dz rounded without the loss scale underflows, and a reduction of "none" has a dloss
for each row. The alternative would be right in bfloat16 and float32 for a scalar loss alone, and keep a float32 dx.

dW is summed over the chunks in float32: by the product itself where PyTorch has products of 16 bits that add to
float32 (CUDA, from PyTorch 2.10), else by products of numbers widened to float32. With one chunk there is nothing to
sum, and dW is one product in the dtype of x.

Memory, beside inputs and outputs, in bytes: with R the rows of a chunk, s those of an element of x,

    R V s  logits    + 4 V N  dW, in 16 bits with several chunks    + R (N + piece) 4  widened numbers, where needed

R V s is at most LOGITS_BYTES. For 65,536 x 50,257 in 16 bits R is 5,120, which makes 0.52 GB of logits and, with
N = 1600, 0.32 GB of dW.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastgpt_kernels import checks
from fastgpt_kernels.checks import REMEDY, Reduction
from fastgpt_kernels.errors import raise_if_any
from fastgpt_kernels.torch_ops.cross_entropy import against_columns, reduced, row_losses, write_gradient
from fastgpt_kernels.torch_ops.gelu import in_autocast_dtype

LOGITS_BYTES = 2**29  # of the logits of a chunk
ROW_MULTIPLE = 256  # the rows of a chunk fill the tiles of a matrix product
WIDENED_BYTES = 2**26  # of dz in float32, a piece of its columns at a time


def chunk_rows(V: int, itemsize: int) -> int:
    """How many rows of V logits, of so many bytes each, are taken at a time."""
    rows = LOGITS_BYTES // (V * itemsize)
    return rows // ROW_MULTIPLE * ROW_MULTIPLE if rows >= ROW_MULTIPLE else max(1, rows)


def chunks_of_logits(x: Tensor, weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Some rows at a time and their logits, each in the same memory."""
    size = chunk_rows(weight.shape[0], x.element_size())
    buffer = x.new_empty((min(size, x.shape[0]), weight.shape[0]))
    for start in range(0, x.shape[0], size):
        rows = slice(start, min(start + size, x.shape[0]))
        logits = buffer[: rows.stop - start]
        torch.mm(x[rows], weight.t(), out=logits)
        yield rows, logits


def gradients(
    x: Tensor, weight: Tensor, overwrite: Callable[[slice, Tensor], None], need_x: bool, need_weight: bool
) -> tuple[Tensor, Tensor]:
    """dx and dW, each empty where it is not needed.

    Args:
        x: (rows, N).
        weight: (V, N).
        overwrite: writes dz of some rows over their logits.
        need_x: whether to compute dx.
        need_weight: whether to compute dW.
    """
    dx = x.new_empty(x.shape if need_x else 0)
    one_chunk = x.shape[0] <= chunk_rows(weight.shape[0], x.element_size())
    total_dtype = torch.promote_types(x.dtype, torch.float32)
    shape, dtype = weight.shape if need_weight else (0,), x.dtype if one_chunk else total_dtype
    # a single product overwrites it
    dweight = weight.new_empty(shape, dtype=dtype) if one_chunk and x.shape[0] else weight.new_zeros(shape, dtype=dtype)
    for rows, dz in chunks_of_logits(x, weight):
        overwrite(rows, dz)
        if need_x:
            torch.mm(dz, weight, out=dx[rows])
        if need_weight and one_chunk:
            torch.mm(dz.t(), x, out=dweight)
        elif need_weight:
            add_product(dweight, dz, x[rows])
    return dx, dweight.to(weight.dtype)


def add_product(total: Tensor, dz: Tensor, x: Tensor) -> None:
    """total (V, N) += dz (rows, V)^T x (rows, N), with float32 products and sums at least."""
    if total.dtype == x.dtype:
        torch.addmm(total, dz.t(), x, out=total)
    elif adds_16_bit_products(x.device):
        torch.addmm(total, dz.t(), x, out_dtype=total.dtype, out=total)
    else:
        wide = x.to(total.dtype)
        piece = max(1, WIDENED_BYTES // (x.shape[0] * total.element_size()))
        for start in range(0, total.shape[0], piece):
            part = total[start : start + piece]
            torch.addmm(part, dz[:, start : start + piece].to(total.dtype).t(), wide, out=part)


def adds_16_bit_products(device: torch.device) -> bool:
    """Whether PyTorch can add the product of 16-bit matrices to a float32 one."""
    return device.type == "cuda" and torch.version.hip is None and torch.__version__ >= "2.10"


def losses_by_chunks(x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    """The loss of each row; weight is contiguous."""
    losses = x.new_empty(x.shape[0], dtype=torch.promote_types(x.dtype, torch.float32))
    for rows, logits in chunks_of_logits(x, weight):
        losses[rows] = row_losses(logits, targets[rows], ignore_index)
    return losses


def gradients_by_chunks(
    x: Tensor, weight: Tensor, targets: Tensor, dlosses: Tensor, ignore_index: int, need_x: bool, need_weight: bool
) -> tuple[Tensor, Tensor]:
    """dx and dW, each empty where it is not needed; weight is contiguous."""

    def overwrite(rows: slice, logits: Tensor) -> None:
        write_gradient(logits, targets[rows], dlosses[rows], ignore_index, logits)

    return gradients(x, weight, overwrite, need_x, need_weight)


@torch.library.custom_op("fastgpt::linear_cross_entropy_by_torch", mutates_args=())
def _losses(x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    raise_if_any(against_columns(targets, weight.shape[0], ignore_index), "linear_cross_entropy", "torch", REMEDY)
    # a product in a custom op is seen by autocast a second time
    with torch.autocast(x.device.type, enabled=False):
        return losses_by_chunks(x, weight.contiguous(), targets, ignore_index)


@_losses.register_fake
def _(x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    return x.new_empty(x.shape[0], dtype=torch.promote_types(x.dtype, torch.float32))


@torch.library.custom_op("fastgpt::linear_cross_entropy_by_torch_backward", mutates_args=())
def _gradients(
    x: Tensor, weight: Tensor, targets: Tensor, dlosses: Tensor, ignore_index: int, need_x: bool, need_weight: bool
) -> tuple[Tensor, Tensor]:
    with torch.autocast(x.device.type, enabled=False):
        return gradients_by_chunks(x, weight.contiguous(), targets, dlosses, ignore_index, need_x, need_weight)


@_gradients.register_fake
def _(
    x: Tensor, weight: Tensor, targets: Tensor, dlosses: Tensor, ignore_index: int, need_x: bool, need_weight: bool
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape if need_x else 0), weight.new_empty(weight.shape if need_weight else 0)


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, int], output: Tensor) -> None:
    x, weight, targets, ctx.ignore_index = inputs
    ctx.save_for_backward(x, weight, targets)


def _differentiate(ctx: Any, dlosses: Tensor) -> tuple[Tensor | None, ...]:
    need_x, need_weight = ctx.needs_input_grad[:2]
    dx, dweight = _gradients(*ctx.saved_tensors, dlosses, ctx.ignore_index, need_x, need_weight)
    return dx if need_x else None, dweight if need_weight else None, None, None


_losses.register_autograd(_differentiate, setup_context=_setup)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
) -> Tensor:
    """The cross-entropy of the logits x weight^T, which never exist in full, in nats.

    Args:
        x: (rows, N), any floating-point dtype.
        weight: (V, N), as in nn.Linear, in the dtype of x. Under autocast, both are cast to its dtype.
        targets: (rows,) int64, each below V; those equal to `ignore_index` do not count.
        ignore_index: see there.
        reduction: "mean" over the targets that count (NaN if there are none), "sum", or "none".

    Returns:
        A scalar, or (rows,) with 0 at ignored targets for "none"; float32, or float64 for float64.

    Raises:
        UnsupportedInput: for arguments outside these; on a GPU, a target outside [0, V) is a device-side assertion.
    """
    reasons = checks.against_linear_cross_entropy(x, weight, targets, reduction)
    raise_if_any(reasons, "linear_cross_entropy", "torch", REMEDY)
    x, weight = in_autocast_dtype(x, weight)
    return reduced(_losses(x, weight, targets, ignore_index), targets, ignore_index, reduction)
