"""The leaves of the model: modules that hold parameters, uninitialised, and hand the work to the operations.

Each uses its parameters in its own `forward` only, so that a sharding engine can gather them there and let go after.
"""

import torch
import torch.nn.functional as F
from fastgpt_kernels import Ops
from torch import Tensor, nn

from fastgpt.model.lookup import lookup

EPSILON = 1e-5  # of layer normalisation, in GPT-1 and GPT-2


class Linear(nn.Module):
    """x (..., inputs) -> (..., outputs), with a bias."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """The affine map of each row."""
        return F.linear(x, self.weight, self.bias)


class LinearGelu(Linear):
    """x (..., inputs) -> (..., outputs): the tanh form of GELU after an affine map."""

    def __init__(self, inputs: int, outputs: int, ops: Ops) -> None:
        super().__init__(inputs, outputs)
        self.ops = ops

    def forward(self, x: Tensor) -> Tensor:
        """The activation of each row's affine map."""
        return self.ops.bias_gelu(F.linear(x, self.weight), self.bias, approximate="tanh")


class LayerNorm(nn.Module):
    """x (..., width) -> the same shape, each row normalised, then scaled and shifted."""

    def __init__(self, width: int, ops: Ops) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width))
        self.ops = ops

    def forward(self, x: Tensor) -> Tensor:
        """The normalised rows."""
        return self.ops.layer_norm(x, self.weight, self.bias, EPSILON)


class Embedding(nn.Module):
    """ids (...) int64 -> (..., width): rows of a table."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, width))

    def forward(self, ids: Tensor) -> Tensor:
        """The row of each id."""
        return lookup(ids, self.weight)


class TiedEmbedding(Embedding):
    """A table that is both the input embedding and the output matrix (Press and Wolf 2017)."""

    def forward(self, x: Tensor, *, reverse: bool = False) -> Tensor:
        """ids (...) -> (..., width); in reverse, activations (..., width) -> logits (..., rows)."""
        return F.linear(x, self.weight) if reverse else super().forward(x)
