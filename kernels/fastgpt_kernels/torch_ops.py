"""PyTorch's best built-ins: the backend that runs everywhere, and the baseline for the Triton kernels to beat."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt_kernels import checks
from fastgpt_kernels.checks import REMEDY, Approximate, Seed
from fastgpt_kernels.errors import raise_if_any
from fastgpt_kernels.seeds import seed_tensor, seeded_dropout


def causal_attention(
    qkv: Tensor, *, scale: float | None = None, dropout_p: float = 0.0, seed: Seed | None = None
) -> Tensor:
    """Causal attention over a packed projection, by `scaled_dot_product_attention`.

    With dropout it is written out, (B, H, T, T) weights and all, because SDPA can draw its mask from the global
    generator only.

    Args:
        qkv: (B, T, 3, H, D), any floating-point dtype, any strides.
        scale: factor of the scores before the softmax, positive; 1 / sqrt(D) when None.
        dropout_p: probability, in [0, 1), of dropping an attention weight.
        seed: int in [0, 2^63) or int64 tensor of one element; needed where dropout_p > 0.

    Returns:
        (B, T, H, D), contiguous, in the dtype of qkv.

    Raises:
        UnsupportedInput: for arguments outside these.
    """
    raise_if_any(checks.against_attention(qkv, scale, dropout_p, seed), "causal_attention", "torch", REMEDY)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # views, each (B, H, T, D)
    if dropout_p == 0.0 or seed is None:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    else:
        scores = (q @ k.mT) * (scale or 1.0 / math.sqrt(q.shape[-1]))
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=qkv.device).triu(1)
        weights = scores.masked_fill(future, -math.inf).softmax(-1)
        out = seeded_dropout(weights, dropout_p, seed_tensor(seed, qkv.device)) @ v
    return out.transpose(1, 2).contiguous()


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """Layer normalisation of x (..., N) with weight (N,) and bias (N,), by `torch.nn.functional.layer_norm`."""
    raise_if_any(checks.against_layer_norm(x, weight, bias), "layer_norm", "torch", REMEDY)
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def gelu(x: Tensor, approximate: Approximate = "tanh") -> Tensor:
    """GELU of x (any shape), by `torch.nn.functional.gelu`."""
    raise_if_any(checks.against_gelu(x, approximate), "gelu", "torch", REMEDY)
    return F.gelu(x, approximate=approximate)


def bias_gelu(x: Tensor, bias: Tensor, approximate: Approximate = "tanh") -> Tensor:
    """GELU of x (..., N) + bias (N,)."""
    reasons = checks.against_gelu(x, approximate) + checks.against_vector(x, bias, "bias")
    raise_if_any(reasons, "bias_gelu", "torch", REMEDY)
    return F.gelu(x + bias, approximate=approximate)


def dropout(x: Tensor, p: float, seed: Seed | None) -> Tensor:
    """x / (1 - p) for the elements that the seed keeps, each with probability 1 - p, and 0 for the others.

    The mask depends on the seed, the shape and the device alone, and leaves PyTorch's global generators untouched.
    """
    raise_if_any(checks.against_dropout(p, seed), "dropout", "torch", REMEDY)
    if p == 0.0 or seed is None:
        return x
    return seeded_dropout(x, p, seed_tensor(seed, x.device))
