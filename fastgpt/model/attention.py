"""Multi-head causal self-attention (Vaswani et al. 2017, section 3.2)."""

from fastgpt_kernels import Ops
from torch import Tensor, nn

from fastgpt.config import ModelConfig
from fastgpt.model.cache import LayerCache
from fastgpt.model.dropout import Masks, Site
from fastgpt.model.layers import Linear


class CausalSelfAttention(nn.Module):
    """x (B, T, N) -> (B, T, N): each position reads itself and those before it, of these the nearest with a window.

    Windows in every other layer are GPT-3's "locally banded" pattern (Brown et al. 2020, section 2.1, after Child et
    al. 2019, "Generating Long Sequences with Sparse Transformers").
    """

    def __init__(self, config: ModelConfig, ops: Ops, window: int | None = None) -> None:
        super().__init__()
        self.heads = config.heads
        self.window = window
        self.ops = ops
        self.qkv = Linear(config.n_embd, 3 * config.n_embd, ops)
        self.out = Linear(config.n_embd, config.n_embd, ops)

    def forward(self, x: Tensor, masks: Masks, *, cache: LayerCache | None = None) -> Tensor:
        """Project, attend, project back; dropout on the attention weights."""
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # a view: (B, T, 3, H, D)
        projected: Tensor = self.out(self._attend(qkv, masks, cache).flatten(-2))
        return projected

    def _attend(self, qkv: Tensor, masks: Masks, cache: LayerCache | None) -> Tensor:
        """(B, T, 3, H, D) -> (B, T, H, D); with a cache that holds earlier tokens, over those too."""
        if cache is not None:
            cache.append(qkv)
            if cache.start:
                return self.ops.decode_attention(qkv[:, 0, 0], *cache.seen(self.window)).unsqueeze(1)
        seed = masks.seed_at(Site.ATTENTION_WEIGHTS)
        return self.ops.causal_attention(qkv, dropout_p=masks.p, seed=seed, window=self.window)
