"""The transformer block in its two forms: normalisation before each branch (GPT-2), or after each sum (GPT-1)."""

from fastgpt_kernels import Ops
from torch import Tensor, nn

from fastgpt.config import ModelConfig
from fastgpt.model.attention import CausalSelfAttention
from fastgpt.model.dropout import Masks
from fastgpt.model.layers import LayerNorm
from fastgpt.model.mlp import MLP


class Block(nn.Module):
    """The parts that both forms have; x (B, T, N) -> (B, T, N)."""

    def __init__(self, config: ModelConfig, ops: Ops) -> None:
        super().__init__()
        self.norm_1 = LayerNorm(config.n_embd, ops)
        self.attention = CausalSelfAttention(config, ops)
        self.norm_2 = LayerNorm(config.n_embd, ops)
        self.mlp = MLP(config, ops)


class PreNormBlock(Block):
    """GPT-2 (Radford et al. 2019, section 2.3): the residual stream itself is never normalised."""

    def forward(self, x: Tensor, masks: Masks) -> Tensor:
        """One block of the stack."""
        n = x + self.attention(self.norm_1(x), masks)
        h: Tensor = n + self.mlp(self.norm_2(n), masks)
        return h


class PostNormBlock(Block):
    """GPT-1 (Radford et al. 2018, section 3.1), after Vaswani et al. 2017: each sum is normalised."""

    def forward(self, x: Tensor, masks: Masks) -> Tensor:
        """One block of the stack."""
        n = self.norm_1(x + self.attention(x, masks))
        h: Tensor = self.norm_2(n + self.mlp(n, masks))
        return h
