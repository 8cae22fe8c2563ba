"""Token plus position embedding by PyTorch."""

import torch.nn.functional as F
from torch import Tensor

from fastgpt_kernels import checks
from fastgpt_kernels.checks import REMEDY, Seed
from fastgpt_kernels.errors import raise_if_any
from fastgpt_kernels.torch_ops.dropout import dropout


def embedding(
    tokens: Tensor,
    token_table: Tensor,
    position_table: Tensor,
    *,
    dropout_p: float = 0.0,
    seed: Seed | None = None,
) -> Tensor:
    """dropout(row tokens[b, t] of token_table (V, N) + row t of position_table): (B, T, N)."""
    reasons = checks.against_embedding(tokens, token_table, position_table, dropout_p, seed)
    raise_if_any(reasons, "embedding", "torch", REMEDY)
    return dropout(F.embedding(tokens, token_table) + position_table[: tokens.shape[1]], dropout_p, seed)
