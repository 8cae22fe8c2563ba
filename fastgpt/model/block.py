"""The transformer block in its two forms: normalisation before each branch (GPT-2), or after each sum (GPT-1)."""

from fastgpt_kernels import Ops
from torch import Tensor, nn

from fastgpt.config import ModelConfig
from fastgpt.model.attention import CausalSelfAttention
from fastgpt.model.cache import LayerCache
from fastgpt.model.dropout import Masks, Site
from fastgpt.model.layers import AddLayerNorm, LayerNorm
from fastgpt.model.mlp import MLP


class PreNormBlock(nn.Module):
    """GPT-2 (Radford et al. 2019, section 2.3): the residual stream itself is never normalised.

    n = x + dropout(attention(norm_1(x)))    h = n + dropout(mlp(norm_2(n)))    x, n, h (B, T, N)
    """

    def __init__(self, config: ModelConfig, ops: Ops, window: int | None = None) -> None:
        super().__init__()
        self.ops = ops
        self.norm_1 = LayerNorm(config.n_embd, ops)
        self.attention = CausalSelfAttention(config, ops, window)
        self.norm_2 = AddLayerNorm(config.n_embd, ops)
        self.mlp = MLP(config, ops)

    def forward(self, x: Tensor, masks: Masks, *, cache: LayerCache | None = None) -> Tensor:
        """One block of the stack."""
        branch = self.attention(self.norm_1(x), masks, cache=cache)
        normed, n = self.norm_2(branch, x, masks.p, masks.seed_at(Site.ATTENTION_OUTPUT))
        return self.ops.dropout_add(self.mlp(normed), n, masks.p, masks.seed_at(Site.MLP_OUTPUT))


class PostNormBlock(nn.Module):
    """GPT-1 (Radford et al. 2018, section 3.1), after Vaswani et al. 2017: each sum is normalised.

    n = norm_1(x + dropout(attention(x)))    h = norm_2(n + dropout(mlp(n)))    x, n, h (B, T, N)
    """

    def __init__(self, config: ModelConfig, ops: Ops, window: int | None = None) -> None:
        super().__init__()
        self.norm_1 = AddLayerNorm(config.n_embd, ops)
        self.attention = CausalSelfAttention(config, ops, window)
        self.norm_2 = AddLayerNorm(config.n_embd, ops)
        self.mlp = MLP(config, ops)

    def forward(self, x: Tensor, masks: Masks, *, cache: LayerCache | None = None) -> Tensor:
        """One block of the stack."""
        branch = self.attention(x, masks, cache=cache)
        n, _ = self.norm_1(branch, x, masks.p, masks.seed_at(Site.ATTENTION_OUTPUT))
        h: Tensor = self.norm_2(self.mlp(n), n, masks.p, masks.seed_at(Site.MLP_OUTPUT))[0]
        return h
