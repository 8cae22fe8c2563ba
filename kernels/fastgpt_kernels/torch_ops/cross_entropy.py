"""Cross-entropy by PyTorch."""

import torch.nn.functional as F
from torch import Tensor

from fastgpt_kernels import checks
from fastgpt_kernels.checks import REMEDY, Reduction
from fastgpt_kernels.errors import raise_if_any


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    consume: bool = False,
) -> Tensor:
    """The negative log-softmax of each row of logits (rows, V) at its target."""
    raise_if_any(checks.against_cross_entropy(logits, targets, reduction), "cross_entropy", "torch", REMEDY)
    return F.cross_entropy(logits.float(), targets, ignore_index=ignore_index, reduction=reduction)
