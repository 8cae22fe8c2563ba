"""The optimizer and the clipping of gradients, as both engines use them."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from fastgpt_kernels import FusedAdamW
from fastgpt_kernels.optim_arguments import OptimBackend
from torch import Tensor

from fastgpt.config import KernelsConfig, TrainConfig
from fastgpt.model.init import decays
from fastgpt.model.levels import levels


def adam(
    parameters: Mapping[str, Tensor],
    shapes: Mapping[str, Sequence[int]],
    train: TrainConfig,
    kernels: KernelsConfig,
    working: Iterable[tuple[Tensor, Tensor]] = (),
) -> FusedAdamW:
    """AdamW or GPT-1's own Adam (`train.optimizer`), with decay on matrices and tables only.

    Where levels of the model are trained unlike (`train.layer_lr_decay`, `train.unfreeze_every`) each is a group of its
    own, whose rate is the update's times `rate_scale`, or 0 as long as its `level` is frozen.

    Args:
        parameters: what is to be updated, by parameter name.
        shapes: the whole shape of each parameter, which a sharded tensor does not show.
        train: rates and constants; the rate is set anew before each update.
        kernels: whose backend updates.
        working: pairs of a parameter and its copy in 16 bits, which each update brings in line.
    """
    heights = levels(parameters)
    alike = train.layer_lr_decay == 1 and train.unfreeze_every is None
    top = max(heights.values())
    groups: list[dict[str, Any]] = []
    for level in [top] if alike else range(top + 1):
        for decay, weight_decay in ((True, train.weight_decay), (False, 0.0)):
            members = [
                p
                for name, p in parameters.items()
                if (alike or heights[name] == level) and decays(shapes[name]) is decay
            ]
            if members:
                scale = train.layer_lr_decay ** (level - top)
                groups.append({"params": members, "weight_decay": weight_decay, "level": level, "rate_scale": scale})
    return FusedAdamW(
        groups,
        lr=train.lr,
        betas=(train.beta1, train.beta2),
        eps=train.eps,
        form=train.optimizer,
        backend=optimizer_backend(kernels),
        working=working,
    )


def optimizer_backend(kernels: KernelsConfig) -> OptimBackend:
    """Who updates, and takes the norm: Triton where tensors lie on a GPU, unless the operations are not Triton's."""
    return "auto" if kernels.backend in ("auto", "triton") else "torch"


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float, frozen_levels: int = 0) -> None:
    """Give every parameter group the learning rate of the coming update."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["rate_scale"] if group["level"] >= frozen_levels else 0.0


def updates_applied(optimizer: torch.optim.Optimizer) -> int:
    """Updates that were not skipped: the optimizer counts them, on the device, for which this waits."""
    return max((int(state["step"]) for state in optimizer.state.values()), default=0)


def gradient_factor(norm: Tensor, clip: float | None, scale: float) -> Tensor:
    """What brings the sum of gradients times a loss scale to a norm of at most `clip`, on the device of the norm.

    Args:
        norm: global L2 norm, without the loss scale; a scalar.
        clip: largest norm; None leaves gradients as they are.
        scale: the loss scale.

    Returns:
        A float32 scalar: NaN where the norm is not finite, at which the optimizer leaves everything as it is.
    """
    # the form of the quotient is DeepSpeed's, so that both engines round alike
    norm = norm.double()
    factor = torch.ones_like(norm) if clip is None else ((norm + 1e-6) / clip).clamp(min=1.0).reciprocal()
    return torch.where(norm.isfinite(), factor / scale, math.nan).float()
