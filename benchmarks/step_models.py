"""GPT-1 and GPT-2 as a user writes them in plain PyTorch: the model that ours is measured beside.

Its parameters have the names of `fastgpt.model.gpt`, and so the initial values of ours.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgpt.config import ModelConfig
from fastgpt.model.init import initial_value


class Attention(nn.Module):
    """Causal self-attention by `scaled_dot_product_attention`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.p = config.n_head, config.dropout
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.out = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, N)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        p = self.p if self.training else 0.0
        attended = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True)
        projected: Tensor = self.out(attended.transpose(1, 2).flatten(-2))
        return projected


class MLP(nn.Module):
    """Up, GELU, down."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.down = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        down: Tensor = self.down(F.gelu(self.up(x), approximate="tanh"))
        return down


class Block(nn.Module):
    """Normalisation before each branch (GPT-2) or after each sum (GPT-1)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.pre, self.p = config.norm == "pre", config.dropout
        self.norm_1, self.norm_2 = nn.LayerNorm(config.n_embd), nn.LayerNorm(config.n_embd)
        self.attention, self.mlp = Attention(config), MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        if self.pre:
            x = x + self.dropout(self.attention(self.norm_1(x)))
            return x + self.dropout(self.mlp(self.norm_2(x)))
        x = self.norm_1(x + self.dropout(self.attention(x)))
        normed: Tensor = self.norm_2(x + self.dropout(self.mlp(x)))
        return normed

    def dropout(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.p, self.training)


class PlainGPT(nn.Module):
    """The whole model, its output matrix tied to the token table."""

    def __init__(self, config: ModelConfig, seed: int) -> None:
        super().__init__()
        self.p = config.dropout
        self.token_embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.position_embedding = nn.Embedding(config.context, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.final_norm = nn.LayerNorm(config.n_embd) if config.norm == "pre" else nn.Identity()
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                parameter.copy_(initial_value(name, tuple(parameter.shape), config, seed))

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """The mean loss in nats; tokens and targets (B, T)."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = F.dropout(self.token_embedding(tokens) + self.position_embedding(positions), self.p, self.training)
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.final_norm(x), self.token_embedding.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())
