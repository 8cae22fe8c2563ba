"""Multi-head causal self-attention (Vaswani et al. 2017, section 3.2)."""

from fastgpt_kernels import Ops
from torch import Tensor, nn

from fastgpt.config import ModelConfig
from fastgpt.model.dropout import Masks, Site
from fastgpt.model.layers import Linear


class CausalSelfAttention(nn.Module):
    """x (B, T, N) -> (B, T, N): each position reads itself and those before it."""

    def __init__(self, config: ModelConfig, ops: Ops) -> None:
        super().__init__()
        self.heads = config.n_head
        self.ops = ops
        self.qkv = Linear(config.n_embd, 3 * config.n_embd)
        self.out = Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor, masks: Masks) -> Tensor:
        """Project, attend, project back; dropout on the attention weights and on the output."""
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # a view: (B, T, 3, H, D)
        mixed = self.ops.causal_attention(qkv, dropout_p=masks.p, seed=masks.seed_at(Site.ATTENTION_WEIGHTS))
        return self.ops.dropout(self.out(mixed.flatten(-2)), masks.p, masks.seed_at(Site.ATTENTION_OUTPUT))
