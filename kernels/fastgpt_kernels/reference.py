"""The mathematics of every operation in plain PyTorch, in the dtype of its input: with float64, the oracle.

Nothing here is fast. Gradients come from autograd; `torch.autograd.gradcheck` confirms them in the tests.

    attention   softmax(scale Q K^T, over j <= i) V                     Vaswani et al. 2017, section 3.2
    layer norm  (x - mean) / sqrt(variance + eps) * weight + bias       Ba, Kiros and Hinton 2016, section 3
    GELU        x Phi(x) = x/2 erfc(-x / sqrt 2)                        Hendrycks and Gimpel 2016, section 2
      tanh form x/2 (1 + tanh v) = x sigmoid(2 v), v = sqrt(2/pi) (x + 0.044715 x^3)
    dropout     x / (1 - p) with probability 1 - p, else 0              Srivastava et al. 2014, section 10
"""

import math

import torch
from torch import Tensor

from fastgpt_kernels import checks
from fastgpt_kernels.checks import REMEDY, Approximate, Seed
from fastgpt_kernels.errors import raise_if_any
from fastgpt_kernels.seeds import seed_tensor, seeded_dropout


def causal_attention(
    qkv: Tensor, *, scale: float | None = None, dropout_p: float = 0.0, seed: Seed | None = None
) -> Tensor:
    """Attention of each position over itself and those before it: qkv (B, T, 3, H, D) -> (B, T, H, D)."""
    reasons = checks.against_attention(qkv, scale, dropout_p, seed)
    raise_if_any(reasons, "causal_attention", "reference", REMEDY)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
    scores = (q @ k.mT) * (scale or 1.0 / math.sqrt(q.shape[-1]))  # (B, H, T, T)
    future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=qkv.device).triu(1)
    weights = scores.masked_fill(future, -math.inf).softmax(-1)
    weights = dropout(weights, dropout_p, seed)
    out: Tensor = weights @ v
    return out.transpose(1, 2).contiguous()


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """Each row of x (..., N) with mean 0 and variance 1, times weight (N,) plus bias (N,)."""
    raise_if_any(checks.against_layer_norm(x, weight, bias), "layer_norm", "reference", REMEDY)
    centred = x - x.mean(-1, keepdim=True)
    variance = (centred**2).mean(-1, keepdim=True)
    return centred / torch.sqrt(variance + eps) * weight + bias


def gelu(x: Tensor, approximate: Approximate = "tanh") -> Tensor:
    """x times the probability that a standard normal variable is below it; x has any shape."""
    raise_if_any(checks.against_gelu(x, approximate), "gelu", "reference", REMEDY)
    if approximate == "tanh":
        # not 1 + tanh, nor 1 + erf below, which cancel far below zero
        return x * torch.sigmoid(2.0 * math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3))
    return 0.5 * x * torch.erfc(-x / math.sqrt(2.0))


def bias_gelu(x: Tensor, bias: Tensor, approximate: Approximate = "tanh") -> Tensor:
    """GELU of x (..., N) + bias (N,)."""
    raise_if_any(checks.against_vector(x, bias, "bias"), "bias_gelu", "reference", REMEDY)
    return gelu(x + bias, approximate)


def dropout(x: Tensor, p: float, seed: Seed | None) -> Tensor:
    """x / (1 - p) for the elements that the seed keeps, each with probability 1 - p, and 0 for the others."""
    raise_if_any(checks.against_dropout(p, seed), "dropout", "reference", REMEDY)
    if p == 0.0 or seed is None:
        return x
    return seeded_dropout(x, p, seed_tensor(seed, x.device))
