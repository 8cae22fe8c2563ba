"""Attention of one query over cached keys and values, by PyTorch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt_kernels import checks
from fastgpt_kernels.checks import REMEDY
from fastgpt_kernels.errors import raise_if_any


def decode_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, *, scale: float | None = None
) -> Tensor:
    """One query over the keys and values kept of the tokens before it, by `scaled_dot_product_attention`."""
    raise_if_any(
        checks.against_decode_attention(q, k_cache, v_cache, lengths, scale), "decode_attention", "torch", REMEDY
    )
    used = torch.arange(k_cache.shape[2], device=q.device) < lengths[:, None, None, None]
    return F.scaled_dot_product_attention(q[:, :, None], k_cache, v_cache, attn_mask=used, scale=scale).squeeze(2)
