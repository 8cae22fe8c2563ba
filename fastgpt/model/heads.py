"""What the logits are trained on: the language-model loss."""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORED = -100  # a target that does not count

# Elements of the buffer in accumulation precision: on a CPU it should stay in cache, elsewhere fill the device.
_BUFFER_ELEMENTS = {"cpu": 2**18, "other": 2**26}


def language_model_loss(logits: Tensor, targets: Tensor, reduction: Literal["mean", "sum", "none"] = "mean") -> Tensor:
    """Cross-entropy, in nats, of the targets under the softmax of the logits.

    Args:
        logits: (B, T, V), any floating-point dtype; log-softmax is accumulated in float32 (float64 for float64).
        targets: (B, T) int64; those that equal -100 do not count.
        reduction: "mean" over the targets that count (NaN if there are none), "sum" (0 if there are none), or "none".

    Returns:
        A scalar, or (B, T) with 0 at ignored targets for "none", in the dtype of accumulation.
    """
    losses: Tensor = _RowLosses.apply(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1))
    if reduction == "none":
        return losses.view(targets.shape)
    total = losses.sum()
    return total if reduction == "sum" else total / (targets != IGNORED).sum()


class _RowLosses(torch.autograd.Function):
    """logits (R, V), targets (R,) -> losses (R,): the negative log-softmax of each row at its target.

    Works through a few rows at a time, so that neither direction holds a second copy of the logits in float32. The
    gradient is (softmax(row) - onehot(target)) * d_loss, rounded once: a loss scale in d_loss acts before fp16 could
    underflow.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        losses = torch.empty(len(logits), dtype=_accumulation(logits), device=logits.device)
        for rows in _chunks(logits):
            z, counts, columns = _rows(logits, targets, rows)
            losses[rows] = torch.where(counts, -z.log_softmax(-1).gather(-1, columns).squeeze(-1), 0.0)
        ctx.save_for_backward(logits, targets)
        return losses

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, d_losses: Tensor) -> tuple[Tensor, None]:
        logits, targets = ctx.saved_tensors
        d_logits = torch.empty_like(logits)
        for rows in _chunks(logits):
            z, counts, columns = _rows(logits, targets, rows)
            weight = torch.where(counts, d_losses[rows], 0.0).unsqueeze(-1)
            d_logits[rows] = z.softmax(-1).mul_(weight).scatter_add_(-1, columns, -weight)
        return d_logits, None


def _accumulation(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


def _chunks(logits: Tensor) -> list[slice]:
    count, columns = logits.shape
    size = max(1, _BUFFER_ELEMENTS["cpu" if logits.device.type == "cpu" else "other"] // columns)
    return [slice(start, start + size) for start in range(0, count, size)]


def _rows(logits: Tensor, targets: Tensor, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
    """Some rows in accumulation precision, which of them count, and a valid column (rows, 1) for each."""
    counts = targets[rows] != IGNORED
    columns = torch.where(counts, targets[rows], 0).unsqueeze(-1)
    return logits[rows].to(_accumulation(logits)), counts, columns
