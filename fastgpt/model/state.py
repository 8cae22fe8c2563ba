"""A model around tensors that are already there, and its embedding in one table or in two."""

from collections.abc import Mapping

import torch
from fastgpt_kernels import Ops
from torch import Tensor

from fastgpt.config import ModelConfig
from fastgpt.errors import UserError
from fastgpt.model.build import new_model
from fastgpt.model.language_model import LanguageModel

TOKENS = "token_embedding.weight"
POSITIONS = "position_embedding.weight"


def model_from_state(
    config: ModelConfig, ops: Ops, state: Mapping[str, Tensor], *, where: str = "state"
) -> LanguageModel:
    """A model whose parameters are the tensors of `state`, without a copy and in their own dtype.

    Args:
        config: the model's shape.
        ops: its operations.
        state: parameter name -> tensor, all of one floating-point dtype and on one device.
        where: the origin of the tensors, for errors.

    Raises:
        UserError: a tensor is missing, not the model's, or of a wrong shape or dtype.
    """
    with torch.device("meta"):
        model = new_model(config, ops)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    if missing := [name for name in shapes if name not in state]:
        raise UserError(f"{where}: {missing[0]} is missing ({len(missing)} of {len(shapes)} tensors are)")
    if extra := sorted(set(state) - set(shapes)):
        raise UserError(f"{where}: {extra[0]} belongs to no parameter of this model ({len(extra)} such tensors)")
    for name, shape in shapes.items():
        if tuple(state[name].shape) != shape:
            raise UserError(
                f"{where}: {name} has shape {tuple(state[name].shape)}; the model's config asks for {shape}"
            )
        if not state[name].is_floating_point():
            raise UserError(f"{where}: {name} is {state[name].dtype}; weights are floating-point numbers")
    if len(dtypes := {str(tensor.dtype) for tensor in state.values()}) > 1:
        raise UserError(f"{where}: its tensors mix {' and '.join(sorted(dtypes))}; choose one with the argument dtype")
    model.load_state_dict(dict(state), assign=True)
    return model


def join_tables(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters of a model with `embedding: separate` as those of one with `table`: positions below the tokens.

    The model computes the same logits of the tokens, and more, of the positions; its dropout is another.
    """
    joined = dict(state)
    joined[TOKENS] = torch.cat([state[TOKENS], joined.pop(POSITIONS)])
    return joined


def split_table(state: Mapping[str, Tensor], vocab_size: int) -> dict[str, Tensor]:
    """The inverse of `join_tables`, for a table whose first `vocab_size` rows are the tokens."""
    table = state[TOKENS]
    return {**state, TOKENS: table[:vocab_size], POSITIONS: table[vocab_size:]}
