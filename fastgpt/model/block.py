"""The transformer block in its two forms: normalisation before each branch (GPT-2), or after each sum (GPT-1).

A stack of either is walked alike. A block is given a branch and the stream that it has yet to join, or None and the
stream, and hands on the same: a sum and the norm of it are one operation, wherever the norm stands.
"""

from fastgpt_kernels import Ops
from torch import Tensor, nn

from fastgpt.config import ModelConfig
from fastgpt.model.attention import CausalSelfAttention
from fastgpt.model.cache import LayerCache
from fastgpt.model.dropout import Masks, Site
from fastgpt.model.layers import AddLayerNorm
from fastgpt.model.mlp import MLP


class PreNormBlock(nn.Module):
    """GPT-2 (Radford et al. 2019, section 2.3): the residual stream itself is never normalised.

    n = x + dropout(attention(norm_1(x)))    h = n + dropout(mlp(norm_2(n)))    x, n, h (B, T, N)

    The norm that reads h is the next block's, or the last: the block leaves that sum to it, and begins with x as the
    sum that the block before has left.
    """

    def __init__(self, config: ModelConfig, ops: Ops, window: int | None = None) -> None:
        super().__init__()
        self.norm_1 = AddLayerNorm(config.n_embd, ops)
        self.attention = CausalSelfAttention(config, ops, window)
        self.norm_2 = AddLayerNorm(config.n_embd, ops)
        self.mlp = MLP(config, ops)

    def forward(
        self, branch: Tensor | None, stream: Tensor, masks: Masks, *, cache: LayerCache | None = None
    ) -> tuple[Tensor, Tensor]:
        """The terms of x, the first None if x is the embedding, to those of h: MLP output and n."""
        normed, x = self.norm_1(branch, stream, masks.p, masks.entering)
        attended = self.attention(normed, masks, cache=cache)
        normed, n = self.norm_2(attended, x, masks.p, masks.seed_at(Site.ATTENTION_OUTPUT))
        return self.mlp(normed), n


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

    def forward(self, branch: None, x: Tensor, masks: Masks, *, cache: LayerCache | None = None) -> tuple[None, Tensor]:
        """From x to h; no branch is ever left to the next block."""
        attended = self.attention(x, masks, cache=cache)
        n, _ = self.norm_1(attended, x, masks.p, masks.seed_at(Site.ATTENTION_OUTPUT))
        h, _ = self.norm_2(self.mlp(n), n, masks.p, masks.seed_at(Site.MLP_OUTPUT))
        return None, h
