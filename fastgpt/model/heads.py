"""What the logits are trained on: the language-model loss."""

from fastgpt_kernels import Ops
from fastgpt_kernels.checks import Reduction
from torch import Tensor

IGNORED = -100  # a target that does not count


def language_model_loss(
    ops: Ops,
    logits: Tensor,
    targets: Tensor,
    reduction: Reduction = "mean",
    *,
    consume: bool = False,
    loss_gradient: float | Tensor | None = None,
) -> Tensor:
    """Cross-entropy, in nats, of the targets under the softmax of the logits.

    Args:
        ops: whose cross-entropy it is.
        logits: (B, T, V), any floating-point dtype; log-softmax is accumulated in float32 (float64 for float64).
        targets: (B, T) int64; those that equal -100 do not count.
        reduction: "mean" over the targets that count (NaN if there are none), "sum" (0 if there are none), or "none".
        consume: let the gradient take the memory of the logits, which nobody may read again.
        loss_gradient: the gradient that will come in for the result, as far as the caller knows it; saves a pass over
            the logits where they are consumed.

    Returns:
        A scalar, or (B, T) with 0 at ignored targets for "none", in the dtype of accumulation.
    """
    losses = ops.cross_entropy(
        logits.flatten(0, -2),
        targets.flatten(),
        ignore_index=IGNORED,
        reduction=reduction,
        consume=consume,
        expected_gradient=loss_gradient,
    )
    return losses.view(targets.shape) if reduction == "none" else losses
