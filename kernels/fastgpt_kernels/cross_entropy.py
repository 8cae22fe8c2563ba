"""Cross-entropy over wide rows, forward and backward, with the gradient written over the logits on request.

For each row z of V logits, with target t:

    m = max_n z_n       s = sum_n exp(z_n - m)      loss = (m - z_t) + log s
    dz_n = (exp(z_n - m) / s - [n = t]) dloss

A row is too wide for registers, and is read once in each direction. The forward keeps a maximum and a sum for each of
LANES columns modulo LANES, and corrects the sum when the maximum grows, once for DEPTH elements; the lanes are combined
at the end of the row (Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018), section 3). It keeps
m and s. The backward reads the row again and writes the gradient: over the logits with `consume`, else into new memory.

That is three passes over memory, because dloss is unknown in the forward, and float16 needs it before the rounding.
Where the caller says which dloss to expect, memory sees one reading and one writing: a program of the forward goes over
its row a second time, backwards, while the row is still in a cache, and writes the gradient over it. Many threads share
a row, and there are so few programs, each with one row after another, that the rows in work fit the L2 cache: two of
GPT-2's in 16 bits for each multiprocessor of an H100. The backward compares the dloss that comes with the expected one,
on the device, and returns what was written; where they differ, it multiplies the row by their quotient and rounds it a
second time.

A mean over rows divides dloss by their number before it comes here, in float32 and on the device. A row whose target is
ignored is not read: its loss and its gradient are 0, whatever it holds. A target outside [0, V) makes its row's loss
and gradient NaN: telling the caller would wait for the device. An infinite or NaN logit gives what PyTorch gives.

Rows of an odd length, like 50257, start at odd addresses. A program therefore goes through its row in steps that begin
where sixteen bytes do, and masks the first and the last of them alone: all others load and store sixteen bytes a thread
at once, given a base address that is a multiple of sixteen. Which elements share a lane then depends on the address of
the row: equal rows may differ in the last bit of their losses. A repeat gives the same bits.

Limits: float32, float16, bfloat16; any V; rows of adjacent elements with any stride between them, others are copied.

Numerics: all in float32; m and s are kept apart, because log(sum exp) = m + log s would lose the digits of log s where
m is large. One rounding of the gradient, after the product with dloss.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt_kernels import checks, launch
from fastgpt_kernels.checks import Reduction
from fastgpt_kernels.torch_ops.cross_entropy import (
    expected_tensor,
    lie_in_rows,
    may_be_written,
    one_pass,
    reduced,
    refuse_a_second_backward,
)

MAX_LANES, MAX_DEPTH = 1_024, 4  # of a step: eight elements of 16 bits a thread, at each depth
COLUMNS_PER_WARP = 256
MAX_WARPS = 64  # of a multiprocessor
VECTOR_BYTES = 16  # that a thread loads and stores at once
# of the one-pass form: 512 threads a row, 1,024 in float32
ONE_PASS_LANES, ONE_PASS_DEPTH = 4_096, 2
CACHE_SHARE = (
    0.6  # of the L2 cache, for the rows that are in work; not all, because what is written goes through it too
)

_LOWEST = tl.constexpr(-3.4028234663852886e38)  # not -inf, whose difference from itself is NaN


@triton.jit
def _forward_kernel(
    logits_ptr,  # (rows, V), each row `stride` elements after the one before
    targets_ptr,  # (rows,) int64
    losses_ptr,  # (rows,) float32
    statistics_ptr,  # (rows, 2) float32: m and s, kept for the backward
    stride,
    V,
    ignore_index,
    DEPTH: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row)
    loss, total, maximum = 0.0, 1.0, 0.0
    if target != ignore_index:
        start = row * stride
        aligned = start // VECTOR * VECTOR
        first = (start - aligned).to(tl.int32)
        maximum, total = _statistics(logits_ptr + aligned, first, V, DEPTH, LANES, "")
        valid = (target >= 0) & (target < V)
        z_target = tl.load(logits_ptr + start + target, mask=valid, other=float("nan")).to(tl.float32)
        loss = (maximum - z_target) + tl.log(total)
    tl.store(losses_ptr + row, loss)
    tl.store(statistics_ptr + 2 * row, maximum)
    tl.store(statistics_ptr + 2 * row + 1, total)


@triton.jit
def _backward_kernel(
    logits_ptr,  # (rows, V)
    targets_ptr,  # (rows,) int64
    statistics_ptr,  # (rows, 2) float32
    dlosses_ptr,  # (rows,) float32
    gradient_ptr,  # (rows, V), may be the logits
    stride,  # of the logits and of the gradient
    V,
    ignore_index,
    DEPTH: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row)
    start = row * stride
    aligned = start // VECTOR * VECTOR
    first = (start - aligned).to(tl.int32)
    if target == ignore_index:
        _write_zeros(gradient_ptr + aligned, first, V, DEPTH, LANES)
    else:
        maximum = tl.load(statistics_ptr + 2 * row)
        inverse = 1.0 / tl.load(statistics_ptr + 2 * row + 1)
        valid = (target >= 0) & (target < V)
        dloss = tl.load(dlosses_ptr + row, mask=valid, other=float("nan"))
        hit = (first + target).to(tl.int32)
        for step in range(0, first + V, DEPTH * LANES):
            place = _places(step, DEPTH, LANES)
            if _is_whole(step, first, V, DEPTH, LANES):
                z = tl.load(logits_ptr + aligned + place).to(tl.float32)
                dz = _dlogits(z, maximum, inverse, place == hit, dloss)
                tl.store(gradient_ptr + aligned + place, dz.to(gradient_ptr.dtype.element_ty))
            else:
                inside = (place >= first) & (place < first + V)
                z = tl.load(logits_ptr + aligned + place, mask=inside, other=float("-inf")).to(tl.float32)
                dz = _dlogits(z, maximum, inverse, place == hit, dloss)
                tl.store(gradient_ptr + aligned + place, dz.to(gradient_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _one_pass_kernel(
    logits_ptr,  # (rows, V), each row `stride` elements after the one before; overwritten with the gradient
    targets_ptr,  # (rows,) int64
    dloss_ptr,  # one float32
    losses_ptr,  # (rows,) float32
    rows,
    stride,
    V,
    ignore_index,
    DEPTH: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    dloss = tl.load(dloss_ptr)
    # 64 bits, which row takes too
    program = tl.program_id(0).to(tl.int64)
    for row in range(program, rows, tl.num_programs(0)):
        _one_row(logits_ptr, targets_ptr, dloss, losses_ptr, row, stride, V, ignore_index, DEPTH, LANES, VECTOR)


@triton.jit
def _one_row(
    logits_ptr,  # as for the kernel
    targets_ptr,
    dloss,
    losses_ptr,
    row,
    stride,
    V,
    ignore_index,
    DEPTH: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    target = tl.load(targets_ptr + row)
    start = row * stride
    aligned = start // VECTOR * VECTOR
    first = (start - aligned).to(tl.int32)
    if target == ignore_index:
        tl.store(losses_ptr + row, 0.0)
        _write_zeros(logits_ptr + aligned, first, V, DEPTH, LANES)
    else:
        valid = (target >= 0) & (target < V)
        z_target = tl.load(logits_ptr + start + target, mask=valid, other=float("nan")).to(tl.float32)
        dloss = tl.where(valid, dloss, float("nan"))
        maximum, total = _statistics(logits_ptr + aligned, first, V, DEPTH, LANES, "evict_last")
        tl.store(losses_ptr + row, (maximum - z_target) + tl.log(total))
        # every thread has read the target's logit before one of them writes over it
        tl.debug_barrier()
        inverse = 1.0 / total
        hit = (first + target).to(tl.int32)
        steps = tl.cdiv(first + V, DEPTH * LANES)
        for done in range(0, steps):
            # backwards: what was read last is in the nearest cache
            step = (steps - 1 - done) * DEPTH * LANES
            place = _places(step, DEPTH, LANES)
            places = logits_ptr + aligned + place
            if _is_whole(step, first, V, DEPTH, LANES):
                z = tl.load(places, eviction_policy="evict_first").to(tl.float32)
                dz = _dlogits(z, maximum, inverse, place == hit, dloss)
                tl.store(places, dz.to(logits_ptr.dtype.element_ty), eviction_policy="evict_first")
            else:
                inside = (place >= first) & (place < first + V)
                z = tl.load(places, mask=inside, other=float("-inf"), eviction_policy="evict_first").to(tl.float32)
                dz = _dlogits(z, maximum, inverse, place == hit, dloss)
                tl.store(places, dz.to(logits_ptr.dtype.element_ty), mask=inside, eviction_policy="evict_first")


@triton.jit
def _rescale_kernel(
    gradient_ptr,  # (rows, V), each row `stride` elements after the one before
    targets_ptr,  # (rows,) int64
    dresult_ptr,  # one float32, or (rows,) `dresult_stride` apart
    expected_ptr,  # one float32
    stride,
    dresult_stride,
    V,
    ignore_index,
    DEPTH: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row)
    dresult = tl.load(dresult_ptr + row * dresult_stride)
    expected = tl.load(expected_ptr)
    if (dresult != expected) & (target != ignore_index):
        ratio = dresult / expected
        start = row * stride
        aligned = start // VECTOR * VECTOR
        first = (start - aligned).to(tl.int32)
        for step in range(0, first + V, DEPTH * LANES):
            place = _places(step, DEPTH, LANES)
            inside = (place >= first) & (place < first + V)
            dz = tl.load(gradient_ptr + aligned + place, mask=inside).to(tl.float32) * ratio
            tl.store(gradient_ptr + aligned + place, dz.to(gradient_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _statistics(
    row_ptr,  # where sixteen bytes begin, at most `first` elements before the row
    first,
    V,
    DEPTH: tl.constexpr,
    LANES: tl.constexpr,
    EVICTION: tl.constexpr,
):
    """m and s of a row."""
    lane_maximum = tl.full((LANES,), _LOWEST, tl.float32)
    lane_sum = tl.zeros((LANES,), tl.float32)
    for step in range(0, first + V, DEPTH * LANES):
        place = _places(step, DEPTH, LANES)
        if _is_whole(step, first, V, DEPTH, LANES):
            z = tl.load(row_ptr + place, eviction_policy=EVICTION).to(tl.float32)
        else:
            inside = (place >= first) & (place < first + V)
            z = tl.load(row_ptr + place, mask=inside, other=float("-inf"), eviction_policy=EVICTION).to(tl.float32)
        new_maximum = tl.maximum(lane_maximum, tl.max(z, 0))
        lane_sum *= tl.exp(lane_maximum - new_maximum)
        lane_sum += tl.sum(tl.exp(z - new_maximum[None, :]), 0)
        lane_maximum = new_maximum
    maximum = tl.max(lane_maximum, 0)
    return maximum, tl.sum(lane_sum * tl.exp(lane_maximum - maximum), 0)


@triton.jit
def _write_zeros(
    row_ptr,  # where sixteen bytes begin, at most `first` elements before the row
    first,
    V,
    DEPTH: tl.constexpr,
    LANES: tl.constexpr,
):
    for step in range(0, first + V, DEPTH * LANES):
        place = _places(step, DEPTH, LANES)
        inside = (place >= first) & (place < first + V)
        tl.store(row_ptr + place, tl.zeros((DEPTH, LANES), row_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _places(step, DEPTH: tl.constexpr, LANES: tl.constexpr):
    """Where the elements of a step lie behind the aligned start of the row, (DEPTH, LANES)."""
    return step + tl.arange(0, DEPTH)[:, None] * LANES + tl.arange(0, LANES)[None, :]


@triton.jit
def _is_whole(step, first, V, DEPTH: tl.constexpr, LANES: tl.constexpr):
    """Whether all elements of a step belong to the row."""
    return (step >= first) & (step + DEPTH * LANES <= first + V)


@triton.jit
def _dlogits(z, maximum, inverse, is_target, dloss):
    p = tl.exp(z - maximum) * inverse
    return tl.where(is_target, p - 1.0, p) * dloss


class Step(NamedTuple):
    """How a program goes through its row: DEPTH x LANES elements at a time."""

    depth: int
    lanes: int
    warps: int


def step(V: int) -> Step:
    """The step through rows of V columns."""
    lanes = min(MAX_LANES, max(128, triton.next_power_of_2(V)))
    depth = min(MAX_DEPTH, triton.next_power_of_2(triton.cdiv(V, lanes)))
    return Step(depth, lanes, max(1, lanes // COLUMNS_PER_WARP))


def one_pass_step(V: int, itemsize: int, device: torch.device) -> Step:
    """The step of the one-pass form through rows of V columns, of so many bytes each: sixteen bytes for each thread."""
    lanes = min(ONE_PASS_LANES, max(128, triton.next_power_of_2(V)))
    depth = min(ONE_PASS_DEPTH, triton.next_power_of_2(triton.cdiv(V, lanes)))
    threads = 64 if launch.architecture(device).startswith("gfx") else 32  # of a warp
    return Step(depth, lanes, max(1, lanes * itemsize // (threads * VECTOR_BYTES)))


def one_pass_programs(rows: int, row_bytes: int, device: torch.device, warps: int) -> int:
    """How many programs share the rows: so many that their rows fit the cache, and no more than run at a time."""
    processors = launch.multiprocessors(device)
    fitting = int(CACHE_SHARE * launch.cache_bytes(device)) // (processors * row_bytes)
    return min(rows, processors * max(1, min(fitting, MAX_WARPS // warps)))


def launch_forward(logits: Tensor, targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """The losses (rows,) and the statistics (rows, 2) of logits (rows, V) whose columns are adjacent."""
    rows, V = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    statistics = torch.empty((rows, 2), dtype=torch.float32, device=logits.device)
    shape = step(V)
    with launch.on_device_of(logits):
        _forward_kernel[(rows,)](
            logits,
            targets,
            losses,
            statistics,
            logits.stride(0),
            V,
            ignore_index,
            shape.depth,
            shape.lanes,
            VECTOR_BYTES // logits.element_size(),
            num_warps=shape.warps,
            **launch.OPTIONS,
        )
    return losses, statistics


def launch_backward(
    logits: Tensor, targets: Tensor, statistics: Tensor, dlosses: Tensor, ignore_index: int, gradient: Tensor
) -> None:
    """Write the gradient of logits (rows, V) into a matrix of the same strides, or into the logits themselves.

    Args:
        logits: columns are adjacent.
        targets: (rows,) int64.
        statistics: (rows, 2), of the forward.
        dlosses: (rows,) float32, contiguous.
        ignore_index: the target that does not count.
        gradient: in the dtype of the logits.
    """
    rows, V = logits.shape
    shape = step(V)
    with launch.on_device_of(logits):
        _backward_kernel[(rows,)](
            logits,
            targets,
            statistics,
            dlosses,
            gradient,
            logits.stride(0),
            V,
            ignore_index,
            shape.depth,
            shape.lanes,
            VECTOR_BYTES // logits.element_size(),
            num_warps=shape.warps,
            **launch.OPTIONS,
        )


def launch_one_pass(logits: Tensor, targets: Tensor, dloss: Tensor, ignore_index: int) -> Tensor:
    """The losses (rows,) of logits (rows, V), over which their gradient is written.

    Args:
        logits: lie in rows; overwritten.
        targets: (rows,) int64.
        dloss: of every row, one float32.
        ignore_index: the target that does not count.
    """
    rows, V = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    shape = one_pass_step(V, logits.element_size(), logits.device)
    programs = one_pass_programs(rows, V * logits.element_size(), logits.device, shape.warps)
    with launch.on_device_of(logits):
        _one_pass_kernel[(programs,)](
            logits,
            targets,
            dloss,
            losses,
            rows,
            logits.stride(0),
            V,
            ignore_index,
            shape.depth,
            shape.lanes,
            VECTOR_BYTES // logits.element_size(),
            num_warps=shape.warps,
            **launch.OPTIONS,
        )
    return losses


def launch_rescale(gradient: Tensor, targets: Tensor, dresult: Tensor, expected: Tensor, ignore_index: int) -> None:
    """Multiply each row that counts by dresult / expected, where they differ.

    Args:
        gradient: (rows, V), in rows.
        targets: (rows,) int64.
        dresult: one float32, or (rows,) at any distance.
        expected: one float32.
        ignore_index: the target that does not count.
    """
    rows, V = gradient.shape
    shape = step(V)
    with launch.on_device_of(gradient):
        _rescale_kernel[(rows,)](
            gradient,
            targets,
            dresult,
            expected,
            gradient.stride(0),
            dresult.stride(0) if dresult.dim() else 0,
            V,
            ignore_index,
            shape.depth,
            shape.lanes,
            VECTOR_BYTES // gradient.element_size(),
            num_warps=shape.warps,
            **launch.OPTIONS,
        )


@torch.library.custom_op("fastgpt::cross_entropy", mutates_args=())
def _cross_entropy(logits: Tensor, targets: Tensor, ignore_index: int, consume: bool) -> tuple[Tensor, Tensor]:
    """The losses and statistics; `consume` is for the backward."""
    return launch_forward(_in_rows(logits), targets.contiguous(), ignore_index)


@_cross_entropy.register_fake
def _(logits: Tensor, targets: Tensor, ignore_index: int, consume: bool) -> tuple[Tensor, Tensor]:
    rows = logits.shape[0]
    return logits.new_empty(rows, dtype=torch.float32), logits.new_empty((rows, 2), dtype=torch.float32)


@torch.library.custom_op("fastgpt::cross_entropy_backward", mutates_args=())
def _gradient(logits: Tensor, targets: Tensor, statistics: Tensor, dlosses: Tensor, ignore_index: int) -> Tensor:
    logits = _in_rows(logits)
    gradient = logits.new_empty_strided(logits.shape, logits.stride())
    launch_backward(logits, targets.contiguous(), statistics, dlosses.contiguous(), ignore_index, gradient)
    return gradient


@_gradient.register_fake
def _(logits: Tensor, targets: Tensor, statistics: Tensor, dlosses: Tensor, ignore_index: int) -> Tensor:
    strides = logits.stride() if lie_in_rows(logits) else (logits.shape[1], 1)
    return logits.new_empty_strided(logits.shape, strides)


@torch.library.custom_op("fastgpt::cross_entropy_backward_", mutates_args=("logits",))
def _overwrite(logits: Tensor, targets: Tensor, statistics: Tensor, dlosses: Tensor, ignore_index: int) -> None:
    """The gradient over logits that lie in rows."""
    launch_backward(logits, targets.contiguous(), statistics, dlosses.contiguous(), ignore_index, logits)


@_overwrite.register_fake
def _(logits: Tensor, targets: Tensor, statistics: Tensor, dlosses: Tensor, ignore_index: int) -> None:
    return None


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor, int, bool], output: tuple[Tensor, Tensor]) -> None:
    logits, targets, ctx.ignore_index, ctx.consume = inputs
    ctx.save_for_backward(logits, targets, output[1])


def _differentiate(ctx: Any, dlosses: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    refuse_a_second_backward(ctx)
    logits, targets, statistics = ctx.saved_tensors
    if not ctx.consume or not lie_in_rows(logits):
        return _gradient(logits, targets, statistics, dlosses, ctx.ignore_index), None, None, None
    logits = logits.detach()
    _overwrite(logits, targets, statistics, dlosses, ctx.ignore_index)
    return logits, None, None, None


_cross_entropy.register_autograd(_differentiate, setup_context=_setup)


@torch.library.custom_op("fastgpt::cross_entropy_one_pass_", mutates_args=("logits",))
def _losses_and_gradient(logits: Tensor, targets: Tensor, dloss: Tensor, ignore_index: int) -> Tensor:
    """The losses, and the gradient over logits that lie in rows."""
    return launch_one_pass(logits, targets.contiguous(), dloss, ignore_index)


@_losses_and_gradient.register_fake
def _(logits: Tensor, targets: Tensor, dloss: Tensor, ignore_index: int) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.float32)


@torch.library.custom_op("fastgpt::cross_entropy_rescale_", mutates_args=("gradient",))
def _rescale(gradient: Tensor, targets: Tensor, dresult: Tensor, expected: Tensor, ignore_index: int) -> None:
    launch_rescale(gradient, targets.contiguous(), dresult, expected, ignore_index)


@_rescale.register_fake
def _(gradient: Tensor, targets: Tensor, dresult: Tensor, expected: Tensor, ignore_index: int) -> None:
    return None


_one_pass = one_pass(_losses_and_gradient, _rescale)


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    consume: bool = False,
    expected_gradient: float | Tensor | None = None,
) -> Tensor:
    """The negative log-softmax of each row of logits at its target, in nats; in Triton.

    Args:
        logits: (rows, V), float32, float16 or bfloat16, at least one row. Rows may be any distance apart; where they
            overlap, or their elements are not adjacent, they are copied.
        targets: (rows,) int64; those equal to `ignore_index` do not count. One outside [0, V) makes its loss, and the
            gradient of its row, NaN.
        ignore_index: see there.
        reduction: "mean" over the targets that count (NaN if there are none), "sum", or "none".
        consume: let the backward write the gradient over the logits, which nobody may read again; a second backward
            raises RuntimeError. Logits that had to be copied are left alone.
        expected_gradient: the gradient that will come in for the result, as far as the caller knows it: a number, or
            one float32 on the logits' device, not 0. With `consume`, where a gradient will be asked for, the forward
            then writes the gradient over the logits; another one that comes in costs a pass and a second rounding. Else
            it is not used.

    Returns:
        A scalar, or (rows,) with 0 at ignored targets for "none"; float32.

    Raises:
        UnsupportedInput: for arguments outside these.
    """
    reasons = checks.against_cross_entropy(logits, targets, reduction, expected_gradient)
    launch.refuse("cross_entropy", reasons, launch.against(logits=logits))
    if expected_gradient is not None and may_be_written(logits, consume):
        expected = expected_tensor(expected_gradient, logits)
        loss: Tensor = _one_pass(logits, targets, expected, ignore_index, reduction)
        return loss
    losses, _ = _cross_entropy(logits, targets, ignore_index, consume)
    return reduced(losses, targets, ignore_index, reduction)


def _in_rows(logits: Tensor) -> Tensor:
    return logits if lie_in_rows(logits) else logits.contiguous()
