"""The gradients that an update sums over its micro-batches, in fp32 beside weights in 16 bits."""

from collections.abc import Mapping

import torch
from fastgpt_kernels import accumulate
from torch import Tensor


class MainGradients:
    """Gradients on their way from the weights, where a backward pass leaves them, to the masters that are updated.

    In fp32 the weights are the masters, and PyTorch sums. Weights in 16 bits would sum in 16 bits: what each backward
    pass leaves there moves to the masters' gradients, unless the update has one micro-batch alone, whose gradients the
    optimizer takes in 16 bits where they lie.
    """

    def __init__(self, weights: Mapping[str, Tensor], masters: Mapping[str, Tensor], *, micro_batches: int) -> None:
        """Move gradients from weights to masters, by name; in fp32 the two are one mapping."""
        self._pairs = [(name, weights[name], masters[name]) for name in weights]
        self.at_weights = weights is masters  # the weights' own gradients are the sums
        self._moves = micro_batches > 1 and not self.at_weights
        # memory of the sums, by the name of the weight; it stays from update to update
        self._sums: dict[str, Tensor] = {}

    def start_from_zero(self) -> None:
        """Let every sum start from zeros that stay in one place, as a graph needs it that was recorded once."""
        if self._moves or self.at_weights:
            for name, _, master in self._pairs:
                master.grad = self._sum(name, master)
            torch._foreach_zero_(list(self._sums.values()))

    @torch.no_grad()
    def move(self) -> None:
        """Take up what a backward pass has left."""
        if not self._moves:
            return
        for name, weight, master in self._pairs:
            if weight.grad is None:
                continue
            if master.grad is None:
                master.grad = self._sum(name, master).copy_(weight.grad)
            else:
                accumulate(master.grad, weight.grad)
            weight.grad = None

    def all(self) -> list[Tensor]:
        """Those of the update: in fp32, or in 16 bits where one micro-batch is all."""
        found = (weight.grad if master.grad is None else master.grad for _, weight, master in self._pairs)
        return [gradient for gradient in found if gradient is not None]

    def clear(self) -> None:
        """Forget them."""
        for _, weight, master in self._pairs:
            weight.grad = master.grad = None

    def _sum(self, name: str, master: Tensor) -> Tensor:
        if name not in self._sums:
            self._sums[name] = torch.empty_like(master, requires_grad=False)
        return self._sums[name]
