"""Levels of the model that are not trained: their gradients are zeros, whatever engine computes them."""

from typing import Any

import torch
from torch import Tensor


class _Zeroed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """x, as it is."""
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        """Zeros."""
        return torch.zeros_like(gradient)


def frozen(x: Tensor, when: bool = True) -> Tensor:
    """x, whose gradient is zeros from here down `when` it is to be.

    Zeros and not none: an engine that reduces gradients waits for each of them, and Adam's step counts stay alike.
    """
    result: Tensor = _Zeroed.apply(x) if when and x.requires_grad else x  # type: ignore[no-untyped-call]
    return result
