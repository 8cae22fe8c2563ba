"""GPT: token and position embeddings, a stack of blocks, and the token table again as output matrix."""

import torch
from fastgpt_kernels import Ops
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastgpt.config import ModelConfig
from fastgpt.errors import UserError
from fastgpt.model.block import PostNormBlock, PreNormBlock
from fastgpt.model.dropout import Masks, Site
from fastgpt.model.layers import Embedding, LayerNorm, TiedEmbedding


class GPT(nn.Module):
    """GPT-1 (`norm: post`) or GPT-2 (`norm: pre`, and a final normalisation).

    Construction allocates the parameters with `torch.empty` and does not initialise them: see `fastgpt.model.init`. It
    works on the meta device, and under a context that shards each module's parameters as soon as they are made.

    In training mode with `config.dropout` > 0, dropout acts on the embedding, on the attention weights and on the
    output of each residual branch (Radford et al. 2018, section 4.1). Its masks come from `dropout_seed` alone.
    """

    def __init__(self, config: ModelConfig, ops: Ops) -> None:
        super().__init__()
        self.config = config
        self.ops = ops
        self.token_embedding = TiedEmbedding(config.vocab_size, config.n_embd)
        self.position_embedding = Embedding(config.context, config.n_embd)
        block = PreNormBlock if config.norm == "pre" else PostNormBlock
        self.blocks = nn.ModuleList(block(config, ops) for _ in range(config.n_layer))
        self.final_norm = LayerNorm(config.n_embd, ops) if config.norm == "pre" else nn.Identity()

    def forward(
        self,
        tokens: Tensor,
        *,
        dropout_seed: int | None = None,
        checkpoint_activations: bool = False,
        last_only: bool = False,
    ) -> Tensor:
        """Logits of the token that follows each position.

        Args:
            tokens: (B, T) int64, each below `vocab_size`, T at most `context`.
            dropout_seed: required where dropout is active.
            checkpoint_activations: keep only each block's input for the backward pass, which recomputes the rest.
            last_only: compute the logits of the last position only.

        Returns:
            (B, T, V), or (B, V) with `last_only`, in the dtype of the parameters.

        Raises:
            UserError: T is out of range, or dropout is active and has no seed.
        """
        x = self.hidden(tokens, dropout_seed=dropout_seed, checkpoint_activations=checkpoint_activations)
        logits: Tensor = self.token_embedding(x[:, -1] if last_only else x, reverse=True)
        return logits

    def hidden(
        self, tokens: Tensor, *, dropout_seed: int | None = None, checkpoint_activations: bool = False
    ) -> Tensor:
        """The final hidden states (B, T, N), which the output matrix turns into logits; arguments as for `forward`."""
        length = tokens.shape[1]
        if not 1 <= length <= self.config.context:
            raise UserError(f"{length} tokens do not fit the model: model.context allows 1 to {self.config.context}")
        p, seed = self._dropout(dropout_seed)
        positions = torch.arange(length, device=tokens.device)
        x = self.token_embedding(tokens) + self.position_embedding(positions)
        x = self.ops.dropout(x, p, Masks(p, seed, layer=0).seed_at(Site.EMBEDDING))
        for layer, block in enumerate(self.blocks):
            masks = Masks(p, seed, layer)
            if checkpoint_activations:
                # no random state to preserve: the seeds are arguments
                x = checkpoint(block, x, masks, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, masks)
        normed: Tensor = self.final_norm(x)
        return normed

    def _dropout(self, seed: int | None) -> tuple[float, int]:
        """The dropout probability of this pass, and its seed."""
        if not self.training or self.config.dropout == 0.0:
            return 0.0, 0
        if seed is None:
            raise UserError(
                f"model.dropout is {self.config.dropout} and the model is in training mode, but dropout_seed is None: "
                "give a seed, or call eval() first"
            )
        return self.config.dropout, seed


def parameter_count(config: ModelConfig) -> int:
    """The number of parameters, the tied output matrix counted once."""
    n = config.n_embd
    embeddings = (config.vocab_size + config.context) * n
    block = 12 * n * n + 13 * n  # matrices of n x 3n, n x n and twice n x 4n; biases 3n + n + 4n + n; two norms of 2n
    final_norm = 2 * n if config.norm == "pre" else 0
    return embeddings + config.n_layer * block + final_norm


def flops_per_token(config: ModelConfig) -> int:
    """Floating-point operations of training on one token of a full context, forward and backward: 6N + 12 L C T.

    N counts the weights that take part in a matrix product, 12 C^2 in each of L blocks and the V x C output matrix: not
    the input side of the token table, nor positions, biases and norms. 12 L C T is attention over T positions in full,
    without the half that causality saves (Chowdhery et al. 2022, "PaLM", appendix B). What activation checkpointing
    computes twice counts once.
    """
    layers, width = config.n_layer, config.n_embd
    matrices = layers * 12 * width * width + config.vocab_size * width
    return 6 * matrices + 12 * layers * width * config.context
