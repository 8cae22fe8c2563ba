"""Rows of a table, with a gradient that holds for tokens that occur often.

PyTorch's gradient on the CPU adds up the rows of one token in the dtype of the table. In bf16 such a sum stops growing
after some hundred terms (256 + 1 = 256), which the space or the newline reach in any batch. On GPUs PyTorch accumulates
in float32.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def lookup(ids: Tensor, table: Tensor) -> Tensor:
    """ids (...) int64, table (rows, width) -> (..., width); the gradient is summed in float32 at least."""
    if table.device.type == "cpu" and table.dtype in (torch.bfloat16, torch.float16):
        rows: Tensor = _Lookup.apply(ids, table)
        return rows
    return F.embedding(ids, table)


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, table: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.shape = table.shape
        return F.embedding(ids, table)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, d_rows: Tensor) -> tuple[None, Tensor]:
        (ids,) = ctx.saved_tensors
        used, places = ids.unique(return_inverse=True)
        sums = torch.zeros(len(used), ctx.shape[1], dtype=torch.float32, device=d_rows.device)
        sums.index_add_(0, places.flatten(), d_rows.reshape(-1, ctx.shape[1]).float())
        d_table = d_rows.new_zeros(ctx.shape)
        d_table[used] = sums.to(d_rows.dtype)
        return None, d_table
