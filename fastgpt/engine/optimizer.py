"""AdamW as both engines use it."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastgpt.config import TrainConfig
from fastgpt.model.init import decays


def adamw(
    parameters: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]], train: TrainConfig
) -> torch.optim.AdamW:
    """AdamW ("Decoupled Weight Decay Regularization", 2019) with decay on matrices and tables only.

    Args:
        parameters: what is to be updated, by parameter name.
        shapes: the whole shape of each parameter, which a sharded tensor does not show.
        train: rates and constants; the rate is set anew before each update.
    """
    groups: list[dict[str, Any]] = []
    for decay, weight_decay in ((True, train.weight_decay), (False, 0.0)):
        members = [p for name, p in parameters.items() if decays(shapes[name]) is decay]
        if members:
            groups.append({"params": members, "weight_decay": weight_decay})
    return torch.optim.AdamW(groups, lr=train.lr, betas=(train.beta1, train.beta2), eps=train.eps, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every parameter group the learning rate of the coming update."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def clip_gradients(gradients: Sequence[Tensor], clip: float | None, scale: float = 1.0) -> float:
    """Unscale gradients in place and bring their global L2 norm to at most `clip`.

    Args:
        gradients: fp32, multiplied by `scale`.
        clip: largest norm, or None.
        scale: the loss scale.

    Returns:
        The norm before clipping, without the scale. Where it is not finite the gradients are left as they are.
    """
    norm = float(torch.nn.utils.get_total_norm(gradients)) / scale
    if not math.isfinite(norm):
        return norm
    # the form of the quotient is DeepSpeed's, so that both engines round alike
    excess = max(1.0, (norm + 1e-6) / clip) if clip else 1.0
    if excess * scale != 1.0:
        torch._foreach_mul_(list(gradients), 1.0 / (excess * scale))
    return norm
