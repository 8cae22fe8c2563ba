"""The leaves of the model: modules that hold parameters, uninitialised, and hand the work to the operations.

Each uses its parameters in its own `forward` only, so that a sharding engine can gather them there and let go after.
"""

import torch
from fastgpt_kernels import Ops
from torch import Tensor, nn

from fastgpt.model.frozen import frozen

EPSILON = 1e-5  # of layer normalisation, in GPT-1 and GPT-2


class Linear(nn.Module):
    """x (..., inputs) -> (..., outputs), with a bias."""

    def __init__(self, inputs: int, outputs: int, ops: Ops) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs))
        self.ops = ops

    def forward(self, x: Tensor) -> Tensor:
        """The affine map of each row."""
        return self.ops.linear(x, self.weight, self.bias)


class LinearGelu(Linear):
    """x (..., inputs) -> (..., outputs): the tanh form of GELU after an affine map."""

    def forward(self, x: Tensor) -> Tensor:
        """The activation of each row's affine map."""
        return self.ops.linear_gelu(x, self.weight, self.bias, approximate="tanh")


class AddLayerNorm(nn.Module):
    """A residual branch joins the stream, where there is one, and each row of the sum is normalised."""

    def __init__(self, width: int, ops: Ops) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width))
        self.ops = ops

    def forward(self, branch: Tensor | None, stream: Tensor, p: float, seed: Tensor | None) -> tuple[Tensor, Tensor]:
        """The norm of stream + dropout(branch), scaled and shifted, and that sum; all (..., width)."""
        if branch is None:
            return self.ops.layer_norm(stream, self.weight, self.bias, EPSILON), stream
        return self.ops.add_layer_norm(branch, stream, self.weight, self.bias, EPSILON, dropout_p=p, seed=seed)


class NoNorm(nn.Module):
    """In the place of the last norm, where the stream is normalised as it is."""

    def forward(self, branch: None, stream: Tensor, p: float, seed: Tensor | None) -> tuple[Tensor, Tensor]:
        """The stream (..., width), on which no branch waits, for both results."""
        return stream, stream


class TiedEmbedding(nn.Module):
    """The table of tokens, both the input embedding and the output matrix (Press and Wolf 2017)."""

    def __init__(self, rows: int, width: int, ops: Ops) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, width))
        self.ops = ops

    def forward(
        self,
        x: Tensor,
        *,
        positions: Tensor | None = None,
        p: float = 0.0,
        seed: Tensor | None = None,
        frozen_table: bool = False,
    ) -> Tensor:
        """Activations (..., width) -> logits (..., rows); with positions (at least T, width), the way in.

        Tokens (B, T) then become dropout(token + position), (B, T, width). On the way out nothing is dropped, and where
        the table is frozen its gradient is zeros.
        """
        if positions is None:
            return self.ops.logits(x, frozen(self.weight, when=frozen_table))
        return self.ops.embedding(x, self.weight, positions, dropout_p=p, seed=seed)


class TableEmbedding(nn.Module):
    """A table of tokens and, below them, positions, which is the output matrix too: OpenAI's code for GPT-1.

    Dropout acts on the table (V + T_max, width), so that a token lacks the same elements wherever it stands in the
    batch, and in the output matrix. Each of the two uses draws the mask anew, from the same seed.
    """

    def __init__(self, tokens: int, positions: int, width: int, ops: Ops) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(tokens + positions, width))
        self.tokens = tokens
        self.ops = ops

    def forward(
        self,
        x: Tensor,
        *,
        start: int | None = None,
        p: float = 0.0,
        seed: Tensor | None = None,
        frozen_table: bool = False,
    ) -> Tensor:
        """Activations (..., width) -> logits (..., V + T_max); with `start`, the way in.

        Tokens (B, T) at positions from `start` on then become token + position, (B, T, width).
        """
        table = self.ops.dropout(self.weight, p, seed) if p else self.weight
        if start is None:
            return self.ops.logits(x, frozen(table, when=frozen_table))
        return self.ops.embedding(x, table[: self.tokens], table[self.tokens + start :])


class PositionEmbedding(nn.Module):
    """The table of positions, each added to the token that stands there."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, width))

    def forward(
        self, tokens: Tensor, *, table: TiedEmbedding, start: int = 0, p: float = 0.0, seed: Tensor | None = None
    ) -> Tensor:
        """Tokens (B, T) at positions from `start` on -> dropout(token + position), (B, T, width).

        The table's own forward runs within this one, so that both tables are there for the one operation that reads
        them.
        """
        positions = self.weight[start:] if start else self.weight
        embedded: Tensor = table(tokens, positions=positions, p=p, seed=seed)
        return embedded
