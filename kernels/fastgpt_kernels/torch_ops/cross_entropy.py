"""Cross-entropy by PyTorch, in place where it may be.

    loss = -log_softmax(z)_t        dz_n = (softmax(z)_n - [n = t]) dloss

Both directions go through the rows a few at a time, in one float32 buffer that stays in a CPU's cache (float64 for
float64): neither writes the logits out in float32, and with `consume` the backward writes nothing but their gradient,
over them. Where the logits are float32 already, it works on them where they lie. Nothing is kept for the backward but
the logits: PyTorch's softmax, whose exponential is fast, takes less time than `torch.exp` of what a kept log(sum exp)
would leave.

Where the caller says which dloss to expect, one pass does it all: a softmax p, whose largest element is
1 / sum exp(z - m), gives the losses too,

    loss = (m - z_t) - log max_n p_n        m = max_n z_n

and becomes the gradient, which is written over the logits at once. If another dloss comes, the backward multiplies what
was written by their quotient; on a GPU always, because the host may not wait to know.

dloss multiplies before the only rounding, so that a loss scale acts before float16 could underflow. Each row is summed
by one thread, in an order that depends on V alone: the results depend neither on the chunks nor on the threads.
"""

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fastgpt_kernels import checks
from fastgpt_kernels.checks import REMEDY, Reduction
from fastgpt_kernels.errors import raise_if_any

CHUNK = 2**20  # elements for each thread of a CPU: more would leave its cache, fewer would make it wait more often
GPU_CHUNK = 2**24  # elements that fill a GPU

# logits, targets, dloss (one element), ignore_index -> the losses, with the gradient left in the logits
Write: TypeAlias = Callable[[Tensor, Tensor, Tensor, int], Tensor]
# gradient, targets, dresult and expected (one element, or one a row), ignore_index
Rescale: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor, int], None]

CONSUMED = (
    "cross_entropy was called with consume=True, and its backward has already overwritten the logits with their "
    "gradient: a second backward needs consume=False"
)

NO_SECOND_DERIVATIVES = (
    "cross_entropy with consume=True gives no second derivatives, which create_graph=True asks for: use consume=False"
)


def row_losses(logits: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    """The loss of each row of logits (rows, V), 0 where the target does not count; float32 at least."""
    losses = logits.new_empty(logits.shape[0], dtype=_accumulation(logits))
    for rows, z, buffer in _chunks(logits):
        counts, columns = _counts_and_columns(targets[rows], ignore_index)
        if z.dtype != buffer.dtype:
            z = buffer.copy_(z)
        torch.log_softmax(z, -1, out=buffer)
        losses[rows] = torch.where(counts, -buffer.gather(-1, columns).squeeze(-1), 0.0)
    return losses


def write_gradient(logits: Tensor, targets: Tensor, dlosses: Tensor, ignore_index: int, gradient: Tensor) -> None:
    """The gradient of the logits (rows, V) into a matrix of their shape, or into the logits themselves.

    Args:
        logits: (rows, V).
        targets: (rows,) int64.
        dlosses: (rows,), in the dtype of the losses.
        ignore_index: the target that does not count.
        gradient: (rows, V), in the dtype of the logits.
    """
    for rows, z, buffer in _chunks(logits):
        counts, columns = _counts_and_columns(targets[rows], ignore_index)
        weights = torch.where(counts, dlosses[rows], 0.0).unsqueeze(-1)
        written = gradient[rows]
        # an output of softmax must be contiguous
        p = written if written.dtype == buffer.dtype and written.is_contiguous() else buffer
        if z.dtype != p.dtype:
            z = p.copy_(z)
        torch.softmax(z, -1, out=p).mul_(weights).scatter_add_(-1, columns, -weights)
        if p is buffer:
            written.copy_(p)


def write_losses_and_gradient(logits: Tensor, targets: Tensor, dloss: Tensor, ignore_index: int) -> Tensor:
    """The loss of each row of logits (rows, V), which lie in rows, and over the logits their gradient.

    Args:
        logits: (rows, V); overwritten.
        targets: (rows,) int64.
        dloss: of every row, one element in the dtype of the losses.
        ignore_index: the target that does not count.
    """
    losses = logits.new_empty(logits.shape[0], dtype=_accumulation(logits))
    for rows, z, buffer in _chunks(logits):
        counts, columns = _counts_and_columns(targets[rows], ignore_index)
        weights = torch.where(counts, dloss, 0.0).unsqueeze(-1)
        # an output of softmax must be contiguous
        p = z if z.dtype == buffer.dtype and z.is_contiguous() else buffer
        if p is buffer:
            p.copy_(z)
        below_maximum = p.amax(-1) - p.gather(-1, columns).squeeze(-1)
        torch.softmax(p, -1, out=p)
        losses[rows] = torch.where(counts, below_maximum - p.amax(-1).log_(), 0.0)
        p.mul_(weights).scatter_add_(-1, columns, -weights)
        if p is buffer:
            z.copy_(p)
    return losses


def rescale_gradient(gradient: Tensor, targets: Tensor, dresult: Tensor, expected: Tensor, ignore_index: int) -> None:
    """Multiply the rows that count by dresult / expected, one element or one a row; on a CPU unless all are equal."""
    if gradient.device.type == "cpu" and bool((dresult == expected).all()):
        return
    ratios = torch.where(targets != ignore_index, dresult / expected, 1.0).unsqueeze(-1)
    for rows, dz, _ in _chunks(gradient):
        dz.mul_(ratios[rows])


def _accumulation(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


def _chunks(logits: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """A few rows at a time, as a slice and as a view, and a buffer of their shape."""
    count, V = logits.shape
    if logits.device.type == "cpu":
        threads = torch.get_num_threads()
        size = threads * max(1, CHUNK // V)
    else:
        size = max(1, GPU_CHUNK // V)
    whole = logits.new_empty((min(size, count), V), dtype=_accumulation(logits))
    for start in range(0, count, size):
        z = logits[start : start + size]
        yield slice(start, start + z.shape[0]), z, whole[: z.shape[0]]


def _counts_and_columns(targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Which rows count (rows,), and a column (rows, 1) of each, 0 where it does not count."""
    counts = targets != ignore_index
    return counts, torch.where(counts, targets, 0).unsqueeze(-1)


def against_columns(targets: Tensor, V: int, ignore_index: int) -> list[str]:
    """A reason against targets outside [0, V); none on a GPU, where looking would wait for it."""
    if targets.device.type != "cpu":
        return []
    columns = targets[targets != ignore_index]
    if not columns.shape[0] or (columns.min() >= 0 and columns.max() < V):
        return []
    wrong = columns[(columns < 0) | (columns >= V)][0].item()
    return [f"targets has {wrong}; with V = {V} columns it must be from 0 to {V - 1}, or ignore_index {ignore_index}"]


@torch.library.custom_op("fastgpt::cross_entropy_by_torch", mutates_args=())
def _losses(logits: Tensor, targets: Tensor, ignore_index: int, consume: bool) -> Tensor:
    """The loss of each row; `consume` is for the backward."""
    raise_if_any(against_columns(targets, logits.shape[1], ignore_index), "cross_entropy", "torch", REMEDY)
    return row_losses(logits, targets, ignore_index)


@_losses.register_fake
def _(logits: Tensor, targets: Tensor, ignore_index: int, consume: bool) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=_accumulation(logits))


@torch.library.custom_op("fastgpt::cross_entropy_by_torch_backward", mutates_args=())
def _gradient(logits: Tensor, targets: Tensor, dlosses: Tensor, ignore_index: int) -> Tensor:
    gradient = logits.new_empty(logits.shape)
    write_gradient(logits, targets, dlosses, ignore_index, gradient)
    return gradient


@_gradient.register_fake
def _(logits: Tensor, targets: Tensor, dlosses: Tensor, ignore_index: int) -> Tensor:
    return logits.new_empty(logits.shape)


@torch.library.custom_op("fastgpt::cross_entropy_by_torch_backward_", mutates_args=("logits",))
def _overwrite(logits: Tensor, targets: Tensor, dlosses: Tensor, ignore_index: int) -> None:
    write_gradient(logits, targets, dlosses, ignore_index, logits)


@_overwrite.register_fake
def _(logits: Tensor, targets: Tensor, dlosses: Tensor, ignore_index: int) -> None:
    return None


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor, int, bool], output: Tensor) -> None:
    logits, targets, ctx.ignore_index, ctx.consume = inputs
    ctx.save_for_backward(logits, targets)


def _differentiate(ctx: Any, dlosses: Tensor) -> tuple[Tensor | None, ...]:
    refuse_a_second_backward(ctx)
    logits, targets = ctx.saved_tensors
    if not ctx.consume or not lie_in_rows(logits):
        return _gradient(logits, targets, dlosses, ctx.ignore_index), None, None, None
    logits = logits.detach()
    _overwrite(logits, targets, dlosses, ctx.ignore_index)
    return logits, None, None, None


_losses.register_autograd(_differentiate, setup_context=_setup)


@torch.library.custom_op("fastgpt::cross_entropy_by_torch_one_pass_", mutates_args=("logits",))
def _losses_and_gradient(logits: Tensor, targets: Tensor, dloss: Tensor, ignore_index: int) -> Tensor:
    raise_if_any(against_columns(targets, logits.shape[1], ignore_index), "cross_entropy", "torch", REMEDY)
    return write_losses_and_gradient(logits, targets, dloss, ignore_index)


@_losses_and_gradient.register_fake
def _(logits: Tensor, targets: Tensor, dloss: Tensor, ignore_index: int) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=_accumulation(logits))


@torch.library.custom_op("fastgpt::cross_entropy_by_torch_rescale_", mutates_args=("gradient",))
def rescale(gradient: Tensor, targets: Tensor, dresult: Tensor, expected: Tensor, ignore_index: int) -> None:
    """`rescale_gradient`, as the one-pass form of another backend may use it too."""
    rescale_gradient(gradient, targets, dresult, expected, ignore_index)


@rescale.register_fake
def _(gradient: Tensor, targets: Tensor, dresult: Tensor, expected: Tensor, ignore_index: int) -> None:
    return None


def one_pass(write: Write, rescale: Rescale) -> Any:
    """A differentiable function of (logits, targets, expected, ignore_index, reduction), expected of one element.

    It is no `torch.library` op with a registered backward, because that must not write over its inputs. Nor is the
    writing op called outside it: it makes PyTorch derive anew where logits that are a view came from, by a node that
    copies their gradient. A function knows that before.
    """

    class OnePass(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx: Any, logits: Tensor, targets: Tensor, expected: Tensor, ignore_index: int, reduction: Reduction
        ) -> Tensor:
            count = (targets != ignore_index).sum()
            dloss = expected / count if reduction == "mean" else expected
            losses = write(logits, targets, dloss, ignore_index)
            ctx.save_for_backward(logits, targets, expected)
            ctx.ignore_index, ctx.consume = ignore_index, True
            if reduction == "none":
                return losses
            return losses.sum() / count if reduction == "mean" else losses.sum()

        @staticmethod
        def backward(ctx: Any, dresult: Tensor) -> tuple[Tensor | None, ...]:
            refuse_a_second_backward(ctx)
            logits, targets, expected = ctx.saved_tensors
            gradient = logits.detach()
            rescale(gradient, targets, dresult, expected, ctx.ignore_index)
            return gradient, None, None, None, None

    return OnePass.apply


_one_pass = one_pass(_losses_and_gradient, rescale)


def expected_tensor(expected: float | Tensor, logits: Tensor) -> Tensor:
    """The expected gradient on the device of the logits, with no dimension and in the dtype of the losses."""
    dtype = _accumulation(logits)
    if isinstance(expected, Tensor):
        return expected.detach().to(dtype).reshape(())
    return logits.new_full((), expected, dtype=dtype)


def may_be_written(logits: Tensor, consume: bool) -> bool:
    """Whether the forward may leave the gradient in the logits: it will be asked for, and is theirs to hold."""
    return consume and torch.is_grad_enabled() and logits.requires_grad and lie_in_rows(logits)


def refuse_a_second_backward(ctx: Any) -> None:
    """Raise where the backward of this context has consumed the logits before, or is to be differentiated itself."""
    if ctx.consume:
        if torch.is_grad_enabled():  # under create_graph, which the logits' own memory cannot be part of
            raise RuntimeError(NO_SECOND_DERIVATIVES)
        if getattr(ctx, "consumed", False):
            raise RuntimeError(CONSUMED)
        ctx.consumed = True


def lie_in_rows(logits: Tensor) -> bool:
    """Whether rows of adjacent elements follow each other, with or without gaps between them."""
    return logits.stride(1) == 1 and logits.stride(0) >= logits.shape[1]


def reduced(losses: Tensor, targets: Tensor, ignore_index: int, reduction: Reduction) -> Tensor:
    """The losses (rows,) themselves, their sum, or their mean over the targets that count."""
    if reduction == "none":
        return losses
    total = losses.sum()
    return total if reduction == "sum" else total / (targets != ignore_index).sum()


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
        logits: (rows, V), any floating-point dtype and strides.
        targets: (rows,) int64, each below V; those equal to `ignore_index` do not count.
        ignore_index: see there.
        reduction: "mean" over the targets that count (NaN if there are none), "sum", or "none".
        consume: let the backward write the gradient over the logits, which nobody may read again; a second backward
            raises RuntimeError. Logits whose rows overlap or are not each of adjacent elements are left alone.
        expected_gradient: the gradient that will come in for the result, as far as the caller knows it: a number, or
            one float32 on the logits' device, not 0. With `consume`, where a gradient will be asked for, the forward
            then writes the gradient over the logits; another one that comes in costs a pass and a second rounding. Else
            it is not used.

    Returns:
        A scalar, or (rows,) with 0 at ignored targets for "none"; float32, or float64 for float64.

    Raises:
        UnsupportedInput: for arguments outside these; on a GPU, a target outside [0, V) is a device-side assertion.
    """
    reasons = checks.against_cross_entropy(logits, targets, reduction, expected_gradient)
    raise_if_any(reasons, "cross_entropy", "torch", REMEDY)
    if expected_gradient is not None and may_be_written(logits, consume):
        expected = expected_tensor(expected_gradient, logits)
        loss: Tensor = _one_pass(logits, targets, expected, ignore_index, reduction)
        return loss
    return reduced(_losses(logits, targets, ignore_index, consume), targets, ignore_index, reduction)
