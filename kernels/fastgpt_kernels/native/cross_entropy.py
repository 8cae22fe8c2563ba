"""Cross-entropy over rows of bfloat16 logits, in place where it may be, by the C++ of `src/cross_entropy.cpp`."""

from typing import Any

import torch
from torch import Tensor

from fastgpt_kernels import checks, torch_ops
from fastgpt_kernels.checks import REMEDY, Reduction
from fastgpt_kernels.errors import raise_if_any
from fastgpt_kernels.native.calls import call, takes
from fastgpt_kernels.torch_ops.cross_entropy import (
    against_columns,
    expected_tensor,
    lie_in_rows,
    may_be_written,
    one_pass,
    reduced,
    refuse_a_second_backward,
    rescale,
)


def _write(
    logits: Tensor, targets: Tensor, dlosses: Tensor, ignore_index: int, gradient: Tensor, losses: Tensor | None = None
) -> None:
    """The gradient of logits (rows, V), and the losses if they are asked for; dlosses is one number or (rows,)."""
    rows, V = logits.shape
    targets, dlosses = targets.contiguous(), dlosses.contiguous()
    step = 1 if dlosses.dim() else 0
    call(
        "fastgpt_loss_gradient",
        *(
            logits,
            logits.stride(0),
            targets,
            dlosses,
            step,
            losses,
            gradient,
            gradient.stride(0),
            rows,
            V,
            ignore_index,
        ),
    )


@torch.library.custom_op("fastgpt::native_cross_entropy", mutates_args=())
def _losses(logits: Tensor, targets: Tensor, ignore_index: int, consume: bool) -> Tensor:
    """The loss of each row of logits that lie in rows; `consume` is for the backward."""
    raise_if_any(against_columns(targets, logits.shape[1], ignore_index), "cross_entropy", "native", REMEDY)
    rows, V = logits.shape
    losses = logits.new_empty(rows, dtype=torch.float32)
    call("fastgpt_losses", logits, logits.stride(0), targets.contiguous(), losses, rows, V, ignore_index)
    return losses


@_losses.register_fake
def _(logits: Tensor, targets: Tensor, ignore_index: int, consume: bool) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.float32)


@torch.library.custom_op("fastgpt::native_cross_entropy_backward", mutates_args=())
def _gradient(logits: Tensor, targets: Tensor, dlosses: Tensor, ignore_index: int) -> Tensor:
    gradient = logits.new_empty(logits.shape)
    _write(logits, targets, dlosses, ignore_index, gradient)
    return gradient


@_gradient.register_fake
def _(logits: Tensor, targets: Tensor, dlosses: Tensor, ignore_index: int) -> Tensor:
    return logits.new_empty(logits.shape)


@torch.library.custom_op("fastgpt::native_cross_entropy_backward_", mutates_args=("logits",))
def _overwrite(logits: Tensor, targets: Tensor, dlosses: Tensor, ignore_index: int) -> None:
    _write(logits, targets, dlosses, ignore_index, logits)


@_overwrite.register_fake
def _(logits: Tensor, targets: Tensor, dlosses: Tensor, ignore_index: int) -> None:
    return None


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor, int, bool], output: Tensor) -> None:
    logits, targets, ctx.ignore_index, ctx.consume = inputs
    ctx.save_for_backward(logits, targets)


def _differentiate(ctx: Any, dlosses: Tensor) -> tuple[Tensor | None, ...]:
    refuse_a_second_backward(ctx)
    logits, targets = ctx.saved_tensors
    if not ctx.consume:
        return _gradient(logits, targets, dlosses, ctx.ignore_index), None, None, None
    logits = logits.detach()
    _overwrite(logits, targets, dlosses, ctx.ignore_index)
    return logits, None, None, None


_losses.register_autograd(_differentiate, setup_context=_setup)


@torch.library.custom_op("fastgpt::native_cross_entropy_one_pass_", mutates_args=("logits",))
def _losses_and_gradient(logits: Tensor, targets: Tensor, dloss: Tensor, ignore_index: int) -> Tensor:
    raise_if_any(against_columns(targets, logits.shape[1], ignore_index), "cross_entropy", "native", REMEDY)
    losses = logits.new_empty(logits.shape[0], dtype=torch.float32)
    _write(logits, targets, dloss, ignore_index, logits, losses)
    return losses


@_losses_and_gradient.register_fake
def _(logits: Tensor, targets: Tensor, dloss: Tensor, ignore_index: int) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.float32)


_one_pass = one_pass(_losses_and_gradient, rescale)


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    consume: bool = False,
    expected_gradient: float | Tensor | None = None,
) -> Tensor:
    """The negative log-softmax of each row of logits at its target, in nats.

    Args:
        logits: (rows, V); in bfloat16 on a CPU and with rows of adjacent elements, else it is
            `torch_ops.cross_entropy`, which has the rest of what is to be said.
        targets: (rows,) int64, each below V; those equal to `ignore_index` do not count.
        ignore_index: see there.
        reduction: "mean" over the targets that count (NaN if there are none), "sum", or "none".
        consume: let the backward write the gradient over the logits.
        expected_gradient: the gradient that will come in for the result, as far as the caller knows it.

    Returns:
        A scalar, or (rows,) with 0 at ignored targets for "none"; float32.

    Raises:
        UnsupportedInput: for arguments outside these.
    """
    reasons = checks.against_cross_entropy(logits, targets, reduction, expected_gradient)
    raise_if_any(reasons, "cross_entropy", "native", REMEDY)
    if not takes(logits) or not lie_in_rows(logits):
        return torch_ops.cross_entropy(
            *(logits, targets),
            ignore_index=ignore_index,
            reduction=reduction,
            consume=consume,
            expected_gradient=expected_gradient,
        )
    if expected_gradient is not None and may_be_written(logits, consume):
        expected = expected_tensor(expected_gradient, logits)
        loss: Tensor = _one_pass(logits, targets, expected, ignore_index, reduction)
        return loss
    return reduced(_losses(logits, targets, ignore_index, consume), targets, ignore_index, reduction)
