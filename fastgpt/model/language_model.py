"""What every language model here is asked for, and what is the same in all: logits, their loss, dropout's seeds."""

from abc import ABC, abstractmethod

import torch
from fastgpt_kernels import Ops
from fastgpt_kernels.checks import Reduction
from torch import Tensor, nn

from fastgpt.config import ModelConfig
from fastgpt.errors import UserError
from fastgpt.model.cache import Cache
from fastgpt.model.dropout import Site, dropout_seeds
from fastgpt.model.heads import language_model_loss
from fastgpt.model.layers import TableEmbedding, TiedEmbedding


class LanguageModel(nn.Module, ABC):
    """A table of tokens, a stack of blocks, and the table again as output matrix.

    Construction allocates the parameters with `torch.empty` and does not initialise them: see `fastgpt.model.init`. It
    works on the meta device, and under a context that shards each module's parameters as soon as they are made.
    """

    token_embedding: TiedEmbedding | TableEmbedding
    blocks: nn.ModuleList

    def __init__(self, config: ModelConfig, ops: Ops) -> None:
        super().__init__()
        self.config = config
        self.ops = ops

    def forward(
        self,
        tokens: Tensor,
        *,
        targets: Tensor | None = None,
        reduction: Reduction = "mean",
        dropout_seed: int | Tensor | None = None,
        checkpoint_activations: bool = False,
        cache: Cache | None = None,
        last_only: bool = False,
        loss_gradient: float | Tensor | None = None,
        frozen_levels: int = 0,
    ) -> Tensor:
        """Logits of the token that follows each position, or how well they tell the targets.

        Args:
            tokens: (B, T) int64, each below `vocab_size`, T at most `context`.
            targets: (B, T) int64, the tokens that follow, or -100 where none counts; asks for the loss.
            reduction: of the loss, "mean", "sum" or "none".
            dropout_seed: required where dropout is active: an int, or the table that `dropout_seeds` makes of one.
            checkpoint_activations: keep only the stream before each block for the backward pass, which computes the
                rest again, to the same bits.
            cache: of the tokens before these, which are added to it. Positions count from its first.
            last_only: compute the logits of the last position only.
            loss_gradient: what the caller will multiply the loss by before its backward pass, a number or one float32;
                not needed, but known in advance it saves a pass over the logits.
            frozen_levels: of `fastgpt.model.levels`, from the bottom, whose gradients are to be zeros.

        Returns:
            (B, T, V), or (B, V) with `last_only`, in the dtype of the parameters. With targets the loss in nats, in
            float32 at least: a scalar, or (B, T) for "none". With `embedding: table` the logits have a column for each
            position too, (B, T, V + context), which the loss is of; those with `last_only` have not.

        Raises:
            UserError: T is out of range; dropout is active and has no seed, or a cache; the cache has no room for these
                tokens.
        """
        p, seeds = self._dropout(dropout_seed, tokens.device)
        x = self.hidden(
            tokens,
            dropout_seed=seeds,
            checkpoint_activations=checkpoint_activations,
            cache=cache,
            frozen_levels=frozen_levels,
        )
        logits = self.logits(x[:, -1] if last_only else x, p, seeds, frozen_levels)
        if targets is None:
            return logits[:, : self.config.vocab_size] if last_only else logits
        # nobody else has these logits: their memory is free to take their gradient
        consume = torch.is_grad_enabled()
        return language_model_loss(self.ops, logits, targets, reduction, consume=consume, loss_gradient=loss_gradient)

    @abstractmethod
    def hidden(
        self,
        tokens: Tensor,
        *,
        dropout_seed: int | Tensor | None = None,
        checkpoint_activations: bool = False,
        cache: Cache | None = None,
        frozen_levels: int = 0,
        blocks: int | None = None,
    ) -> Tensor:
        """The final hidden states (B, T, N), which the output matrix turns into logits; arguments as for `forward`.

        With `blocks`, what so many blocks make: 0 is the embedding.
        """

    def logits(self, x: Tensor, p: float, seeds: Tensor | None, frozen_levels: int = 0) -> Tensor:
        """Hidden states (..., N) -> logits; p and seeds of the masks, which OpenAI's one table has here too."""
        seed = None if seeds is None else seeds[0, Site.EMBEDDING]
        found: Tensor = self.token_embedding(x, p=p, seed=seed, frozen_table=frozen_levels > 0)
        return found

    def _check_length(self, length: int, cache: Cache | None) -> None:
        start = cache.length if cache else 0
        if length < 1 or start + length > self.config.context:
            after = f" after {start}" if start else ""
            raise UserError(
                f"{length} tokens{after} do not fit the model: model.context allows 1 to {self.config.context}"
            )

    def _dropout(self, seed: int | Tensor | None, device: torch.device) -> tuple[float, Tensor | None]:
        """The dropout probability of this pass, and the seeds of its masks on the device, in one copy."""
        if not self.training or self.config.dropout == 0.0:
            return 0.0, None
        if seed is None:
            raise UserError(
                f"model.dropout is {self.config.dropout} and the model is in training mode, but dropout_seed is None: "
                "give a seed, or call eval() first"
            )
        seeds = seed if isinstance(seed, Tensor) else dropout_seeds(seed, self.config.n_layer)
        if device.type == "cuda" and seeds.device.type == "cpu":
            # from pinned memory, or the host would wait for the device
            seeds = seeds.pin_memory().to(device, non_blocking=True)
        return self.config.dropout, seeds.to(device)
