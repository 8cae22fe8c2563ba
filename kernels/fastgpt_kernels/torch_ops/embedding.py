"""Token plus position embedding by PyTorch.

On a CPU PyTorch's own gradient adds up the rows of a token in the dtype of the table. In 16 bits such a sum stops
growing after some hundred terms (256 + 1 = 256), which the space or the newline reach in any batch. Here the tokens are
sorted and `embedding_bag` adds the rows of each in float32 (in float64 for float64), in their order: one rounding, the
same bits in every run, and little more time than it takes to fill the gradient of the table with zeros.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt_kernels import checks
from fastgpt_kernels.checks import REMEDY, Seed
from fastgpt_kernels.errors import raise_if_any
from fastgpt_kernels.seeds import seed_tensor
from fastgpt_kernels.torch_ops.dropout import _dropout, dropout


@torch.library.custom_op("fastgpt::embedding_cpu", mutates_args=())
def _embedding(tokens: Tensor, token_table: Tensor, position_table: Tensor, p: float, seed: Tensor | None) -> Tensor:
    y = F.embedding(tokens, token_table).add_(position_table[: tokens.shape[1]])
    return y if seed is None else _dropout(y, None, seed, p, y.dtype)


@_embedding.register_fake
def _(tokens: Tensor, token_table: Tensor, position_table: Tensor, p: float, seed: Tensor | None) -> Tensor:
    return token_table.new_empty((*tokens.shape, token_table.shape[1]))


@torch.library.custom_op("fastgpt::embedding_cpu_token_gradient", mutates_args=())
def _token_gradient(tokens: Tensor, dy: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    """(rows, N): to each token the sum of its rows of dy (B, T, N)."""
    N = dy.shape[-1]
    dtable = dy.new_zeros((rows, N), dtype=dtype)
    ordered, order = tokens.reshape(-1).sort(stable=True)
    used, counts = ordered.unique_consecutive(return_counts=True)
    if len(used):
        sums = F.embedding_bag(order, dy.reshape(-1, N), counts.cumsum(0) - counts, mode="sum")
        dtable[used.long()] = sums.to(dtype)
    return dtable


@_token_gradient.register_fake
def _(tokens: Tensor, dy: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    return dy.new_empty((rows, dy.shape[-1]), dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, float, Tensor | None], output: Tensor) -> None:
    tokens, token_table, position_table, ctx.p, seed = inputs
    ctx.rows = token_table.shape[0], position_table.shape[0]
    ctx.save_for_backward(tokens, seed)


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    tokens, seed = ctx.saved_tensors
    dtype, wide = dy.dtype, torch.promote_types(dy.dtype, torch.float32)
    if seed is not None:
        # in float32, so that no term of the sums is rounded
        dy = _dropout(dy, None, seed, ctx.p, wide)
    dtokens = dpositions = None
    if ctx.needs_input_grad[1]:
        dtokens = _token_gradient(tokens, dy, ctx.rows[0], dtype)
    if ctx.needs_input_grad[2]:
        dpositions = F.pad(dy.sum(0, dtype=wide).to(dtype), (0, 0, 0, ctx.rows[1] - tokens.shape[1]))
    return None, dtokens, dpositions, None, None


_embedding.register_autograd(_differentiate, setup_context=_setup_context)


def embedding(
    tokens: Tensor,
    token_table: Tensor,
    position_table: Tensor,
    *,
    dropout_p: float = 0.0,
    seed: Seed | None = None,
) -> Tensor:
    """Row tokens[b, t] of a table plus row t of another, and dropout.

    Args:
        tokens: (B, T) int64 or int32, any strides.
        token_table: (V, N), any floating-point dtype.
        position_table: (at least T, N), in the dtype of token_table.
        dropout_p: probability, in [0, 1), of dropping an element of the sum.
        seed: int in [0, 2^63) or int64 tensor of one element; needed where dropout_p > 0.

    Returns:
        (B, T, N) in the dtype of the tables. The mask is that of `dropout`.

    Raises:
        UnsupportedInput: for arguments outside these.
        IndexError: on a CPU, for a token outside the table.
    """
    reasons = checks.against_embedding(tokens, token_table, position_table, dropout_p, seed)
    raise_if_any(reasons, "embedding", "torch", REMEDY)
    if tokens.device.type != "cpu":
        # GPUs add up in float32 by themselves
        return dropout(F.embedding(tokens, token_table) + position_table[: tokens.shape[1]], dropout_p, seed)
    drawn = None if dropout_p == 0.0 or seed is None else seed_tensor(seed, tokens.device)
    y: Tensor = _embedding(tokens, token_table, position_table, dropout_p, drawn)
    return y
