"""Causal attention by PyTorch."""

import math

import torch.nn.functional as F
from torch import Tensor

from fastgpt_kernels import checks
from fastgpt_kernels.checks import REMEDY, Seed
from fastgpt_kernels.errors import raise_if_any
from fastgpt_kernels.reference import visible
from fastgpt_kernels.seeds import seed_tensor, seeded_dropout


def causal_attention(
    qkv: Tensor,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Seed | None = None,
    window: int | None = None,
    document_ids: Tensor | None = None,
) -> Tensor:
    """Causal attention over a packed projection, by `scaled_dot_product_attention`.

    With dropout it is written out, (B, H, T, T) weights and all, because SDPA can draw its mask from the global
    generator only.

    Args:
        qkv: (B, T, 3, H, D), any floating-point dtype, any strides.
        scale: factor of the scores before the softmax, positive; 1 / sqrt(D) when None.
        dropout_p: probability, in [0, 1), of dropping an attention weight.
        seed: int in [0, 2^63) or int64 tensor of one element; needed where dropout_p > 0.
        window: position i sees j with i - window < j <= i; all before it when None.
        document_ids: (B, T) integers; i sees j only where their ids are equal.

    Returns:
        (B, T, H, D), contiguous, in the dtype of qkv.

    Raises:
        UnsupportedInput: for arguments outside these.
    """
    reasons = checks.against_attention(qkv, scale, dropout_p, seed, window, document_ids)
    raise_if_any(reasons, "causal_attention", "torch", REMEDY)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # views, each (B, H, T, D)
    if dropout_p and seed is not None:
        scores = (q @ k.mT) * (scale or 1.0 / math.sqrt(q.shape[-1]))
        weights = scores.masked_fill(~visible(qkv, window, document_ids), -math.inf).softmax(-1)
        out = seeded_dropout(weights, dropout_p, seed_tensor(seed, qkv.device)) @ v
    elif window is None and document_ids is None:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    else:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible(qkv, window, document_ids), scale=scale)
    return out.transpose(1, 2).contiguous()
