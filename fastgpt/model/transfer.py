"""What a model starts with when it takes over another's weights."""

from collections.abc import Mapping

import torch
from torch import Tensor

from fastgpt.config import ModelConfig
from fastgpt.errors import UserError
from fastgpt.model.init import InitialValues, initial_value
from fastgpt.model.levels import HEAD, levels

TOKENS = "token_embedding.weight"


def transferred_values(
    source: Mapping[str, Tensor], config: ModelConfig, seed: int, *, blocks: int | None = None
) -> InitialValues:
    """Initial values that are another model's as far as it goes, and new above.

    Args:
        source: the other model's parameters, by name. An output layer of a task among them is left out.
        config: of the model that is to start; as the other's, but for the dropout, more rows in the table of tokens
            (new tokens), whose values are those of a model that begins to train, a GPT's N(0, 0.02), and more blocks.
        seed: of what is new.
        blocks: how many blocks are taken over, from the bottom, with the embeddings below them: GPT-1's n_transfer.
            0 takes over the embeddings alone, -1 nothing, None everything. The last normalisation, or the projection
            of an LSTM, goes with the last block of the other model.

    Raises:
        UserError: the other model has fewer blocks than are to be taken over.
    """
    heights = levels(source)
    highest = max((height for name, height in heights.items() if not name.startswith(HEAD)), default=0)
    if blocks is not None and not -1 <= blocks <= highest:
        raise UserError(f"the pre-trained model has {highest} blocks; {blocks} of them cannot be transferred")
    taken = {
        name for name, height in heights.items() if not name.startswith(HEAD) and (blocks is None or height <= blocks)
    }

    def value(name: str, shape: tuple[int, ...]) -> Tensor:
        if name not in taken:
            return initial_value(name, shape, config, seed)
        old = source[name].detach()
        if name == TOKENS and len(old) < shape[0]:
            # new rows: those of a model that begins to train, so that they do not depend on how many old ones there are
            new = initial_value(f"new.{name}", (shape[0] - len(old), *shape[1:]), config, seed)
            old = old.to(new.device, new.dtype)
            # OpenAI's one table has the positions below the tokens
            tokens = len(old) - (config.context if config.embedding == "table" else 0)
            return torch.cat([old[:tokens], new, old[tokens:]])
        if tuple(old.shape) != shape:
            raise UserError(f"{name} has shape {tuple(old.shape)} in the pre-trained model, and is to have {shape}")
        return old

    return value
