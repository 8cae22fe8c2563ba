"""Cross-entropy of a linear map by PyTorch."""

import torch.nn.functional as F
from torch import Tensor

from fastgpt_kernels import checks
from fastgpt_kernels.checks import REMEDY, Reduction
from fastgpt_kernels.errors import raise_if_any


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
) -> Tensor:
    """The cross-entropy of the logits x (rows, N) weight (V, N)^T."""
    reasons = checks.against_linear_cross_entropy(x, weight, targets, reduction)
    raise_if_any(reasons, "linear_cross_entropy", "torch", REMEDY)
    return F.cross_entropy(F.linear(x, weight).float(), targets, ignore_index=ignore_index, reduction=reduction)
