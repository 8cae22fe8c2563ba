"""Token plus position embedding by PyTorch.

On a CPU PyTorch's own gradient adds up the rows of a token in the dtype of the table. In 16 bits such a sum stops
growing after some hundred terms (256 + 1 = 256), which the space or the newline reach in any batch. Here the tokens are
sorted and `embedding_bag` adds the rows of each in float32 (in float64 for float64), in their order: one rounding, and
the same bits in every run. Each row of a table is a bag, empty for a token that does not occur, so that a gradient is
written in one pass, without zeros before it.
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


@torch.library.custom_op("fastgpt::embedding_cpu_gradients", mutates_args=())
def _gradients(tokens: Tensor, dy: Tensor, rows: list[int], needed: list[bool], dtype: torch.dtype) -> list[Tensor]:
    """Of the tables of tokens and of positions, so many rows each, those that are needed; dy (B, T, N)."""
    gradients = []
    if needed[0]:
        gradients.append(token_gradient(tokens, dy, rows[0], dtype))
    if needed[1]:
        gradients.append(position_gradient(dy, rows[1], dtype))
    return gradients


@_gradients.register_fake
def _(tokens: Tensor, dy: Tensor, rows: list[int], needed: list[bool], dtype: torch.dtype) -> list[Tensor]:
    return [dy.new_empty((n, dy.shape[-1]), dtype=dtype) for n, need in zip(rows, needed, strict=True) if need]


def token_gradient(tokens: Tensor, dy: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    """(rows, N): to each token the sum of its rows of dy (B, T, N)."""
    ordered, order = tokens.reshape(-1).sort(stable=True)
    if dy.dtype == dtype:
        return sums_of_rows(dy, order, (ordered + 1).bincount(minlength=rows + 1)[:rows].cumsum(0))
    # a sum for every row in the wider dtype of dy would be a second table
    dtable = dy.new_zeros((rows, dy.shape[-1]), dtype=dtype)
    used, counts = ordered.unique_consecutive(return_counts=True)
    dtable[used.long()] = sums_of_rows(dy, order, counts.cumsum(0) - counts).to(dtype)
    return dtable


def position_gradient(dy: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    """(rows, N): to each position the sum of its rows of dy (B, T, N)."""
    B, T, _ = dy.shape
    order = torch.arange(B * T).view(B, T).t().reshape(-1)
    return sums_of_rows(dy, order, torch.arange(rows).mul_(B).clamp_(max=B * T)).to(dtype)


def sums_of_rows(dy: Tensor, order: Tensor, starts: Tensor) -> Tensor:
    """The sums of bags of rows of dy (B, T, N), which start at these places of an order: (bags, N) in dy's dtype."""
    return F.embedding_bag(order, dy.reshape(-1, dy.shape[-1]), starts, mode="sum")


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, float, Tensor | None], output: Tensor) -> None:
    tokens, token_table, position_table, ctx.p, seed = inputs
    ctx.rows = [token_table.shape[0], position_table.shape[0]]
    ctx.save_for_backward(tokens, seed)


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    tokens, seed = ctx.saved_tensors
    dtype, wide = dy.dtype, torch.promote_types(dy.dtype, torch.float32)
    if seed is not None:
        # in float32, so that no term of the sums is rounded
        dy = _dropout(dy, None, seed, ctx.p, wide)
    needed = list(ctx.needs_input_grad[1:3])
    gradients = iter(_gradients(tokens, dy, ctx.rows, needed, dtype))
    dtokens, dpositions = (next(gradients) if need else None for need in needed)
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
