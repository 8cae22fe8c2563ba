"""Cross-entropy of a linear map, a chunk of rows at a time: the logits never exist in full.

    z = x W^T    loss = -log_softmax(z)_t    dz = (softmax(z) - onehot(t)) dloss    dx = dz W    dW = dz^T x

The products are cuBLAS's and go through the chunks as in `torch_ops/linear_cross_entropy.py`, which says why the
backward computes the logits a second time, how dW is summed, and what memory that takes. Between the products run the
kernels of `cross_entropy.py`: on the logits of a chunk, whose memory the gradient takes. The forward keeps their m and
s, 8 bytes a row.

Limits: float32, float16, bfloat16, one dtype for x and W; any rows, N and V.

Numerics: products as in a plain linear map, z and dz rounded to the dtype of x; all between in float32, and dW summed
over the chunks in float32 and rounded once.

Source: row chunks as in Hsu et al., "Liger Kernel" (2024), section 3.2, which takes the gradients in the forward.
"""

from typing import Any

import torch
from torch import Tensor

from fastgpt_kernels import checks, cross_entropy, launch
from fastgpt_kernels.checks import Reduction
from fastgpt_kernels.torch_ops.cross_entropy import reduced
from fastgpt_kernels.torch_ops.gelu import in_autocast_dtype
from fastgpt_kernels.torch_ops.linear_cross_entropy import chunks_of_logits, gradients


def losses_by_chunks(x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """The losses (rows,) and the statistics (rows, 2); weight and targets are contiguous."""
    losses = x.new_empty(x.shape[0], dtype=torch.float32)
    statistics = x.new_empty((x.shape[0], 2), dtype=torch.float32)
    for rows, logits in chunks_of_logits(x, weight):
        losses[rows], statistics[rows] = cross_entropy.launch_forward(logits, targets[rows], ignore_index)
    return losses, statistics


def gradients_by_chunks(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    statistics: Tensor,
    dlosses: Tensor,
    ignore_index: int,
    need_x: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    """dx and dW, each empty where it is not needed; all but x are contiguous."""

    def overwrite(rows: slice, logits: Tensor) -> None:
        cross_entropy.launch_backward(logits, targets[rows], statistics[rows], dlosses[rows], ignore_index, logits)

    return gradients(x, weight, overwrite, need_x, need_weight)


@torch.library.custom_op("fastgpt::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    # a product in a custom op is seen by autocast a second time
    with torch.autocast(x.device.type, enabled=False):
        return losses_by_chunks(x, weight.contiguous(), targets.contiguous(), ignore_index)


@_linear_cross_entropy.register_fake
def _(x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], dtype=torch.float32), x.new_empty((x.shape[0], 2), dtype=torch.float32)


@torch.library.custom_op("fastgpt::linear_cross_entropy_backward", mutates_args=())
def _gradients(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    statistics: Tensor,
    dlosses: Tensor,
    ignore_index: int,
    need_x: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    inputs = (x, weight.contiguous(), targets.contiguous(), statistics, dlosses.contiguous())
    with torch.autocast(x.device.type, enabled=False):
        return gradients_by_chunks(*inputs, ignore_index, need_x, need_weight)


@_gradients.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    statistics: Tensor,
    dlosses: Tensor,
    ignore_index: int,
    need_x: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape if need_x else 0), weight.new_empty(weight.shape if need_weight else 0)


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, int], output: tuple[Tensor, Tensor]) -> None:
    x, weight, targets, ctx.ignore_index = inputs
    ctx.save_for_backward(x, weight, targets, output[1])


def _differentiate(ctx: Any, dlosses: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    need_x, need_weight = ctx.needs_input_grad[:2]
    dx, dweight = _gradients(*ctx.saved_tensors, dlosses, ctx.ignore_index, need_x, need_weight)
    return dx if need_x else None, dweight if need_weight else None, None, None


_linear_cross_entropy.register_autograd(_differentiate, setup_context=_setup)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
) -> Tensor:
    """The cross-entropy of the logits x weight^T, which never exist in full, in nats; in cuBLAS and Triton.

    Args:
        x: (rows, N), float32, float16 or bfloat16, at least one row.
        weight: (V, N), as in nn.Linear, in the dtype of x; made contiguous where it is not. Under autocast, both are
            cast to its dtype.
        targets: (rows,) int64; those equal to `ignore_index` do not count. One outside [0, V) makes its loss NaN, and
            with it the gradients.
        ignore_index: see there.
        reduction: "mean" over the targets that count (NaN if there are none), "sum", or "none".

    Returns:
        A scalar, or (rows,) with 0 at ignored targets for "none"; float32.

    Raises:
        UnsupportedInput: for arguments outside these.
    """
    wrong = checks.against_linear_cross_entropy(x, weight, targets, reduction)
    launch.refuse("linear_cross_entropy", wrong, launch.against(x=x, weight=weight))
    x, weight = in_autocast_dtype(x, weight)
    losses, _ = _linear_cross_entropy(x, weight, targets, ignore_index)
    return reduced(losses, targets, ignore_index, reduction)
