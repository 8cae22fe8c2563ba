"""The position-wise feed-forward network."""

from fastgpt_kernels import Ops
from torch import Tensor, nn

from fastgpt.config import ModelConfig
from fastgpt.model.layers import Linear, LinearGelu


class MLP(nn.Module):
    """x (B, T, N) -> (B, T, N) through 4N GELU units."""

    def __init__(self, config: ModelConfig, ops: Ops) -> None:
        super().__init__()
        self.up = LinearGelu(config.n_embd, 4 * config.n_embd, ops)
        self.down = Linear(4 * config.n_embd, config.n_embd, ops)

    def forward(self, x: Tensor) -> Tensor:
        """Up, GELU, down."""
        down: Tensor = self.down(self.up(x))
        return down
