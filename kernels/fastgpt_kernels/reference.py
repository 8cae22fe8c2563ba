"""The mathematics of every operation in plain PyTorch, in the dtypes of its inputs: with float64, the oracle.

Nothing here is fast. Gradients come from autograd; `torch.autograd.gradcheck` confirms them in the tests.

    attention      softmax(scale Q K^T, over the visible j) V           Vaswani et al. 2017, section 3.2
      window       i - window < j <= i                                  Child et al. 2019, section 4.2 (local bands)
    layer norm     (x - mean) / sqrt(variance + eps) * weight + bias    Ba, Kiros and Hinton 2016, section 3
    GELU           x Phi(x) = x/2 erfc(-x / sqrt 2)                     Hendrycks and Gimpel 2016, section 2
      tanh form    x/2 (1 + tanh v) = x sigmoid(2 v), v = sqrt(2/pi) (x + 0.044715 x^3)
    embedding      token row + position row                             Radford et al. 2018, section 3.1
    cross-entropy  log(sum exp z) - z_target
    dropout        x / (1 - p) with probability 1 - p, else 0           Srivastava et al. 2014, section 10
"""

import math

import torch
from torch import Tensor

from fastgpt_kernels import checks
from fastgpt_kernels.checks import REMEDY, Approximate, Reduction, Seed
from fastgpt_kernels.errors import raise_if_any
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
    """Attention of each position over itself and those before it: qkv (B, T, 3, H, D) -> (B, T, H, D)."""
    reasons = checks.against_attention(qkv, scale, dropout_p, seed, window, document_ids)
    raise_if_any(reasons, "causal_attention", "reference", REMEDY)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
    scores = (q @ k.mT) * (scale or 1.0 / math.sqrt(q.shape[-1]))  # (B, H, T, T)
    weights = scores.masked_fill(~visible(qkv, window, document_ids), -math.inf).softmax(-1)
    weights = dropout(weights, dropout_p, seed)
    out: Tensor = weights @ v
    return out.transpose(1, 2).contiguous()


def visible(qkv: Tensor, window: int | None = None, document_ids: Tensor | None = None) -> Tensor:
    """(T, T), or (B, 1, T, T) with document ids: whether position i (the row) sees position j."""
    i = torch.arange(qkv.shape[1], device=qkv.device)[:, None]
    j = i.mT
    seen = j <= i
    if window is not None:
        seen = seen & (j > i - window)
    if document_ids is not None:
        seen = seen & (document_ids[:, None, :, None] == document_ids[:, None, None, :])
    return seen


def decode_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, *, scale: float | None = None
) -> Tensor:
    """One query over the first lengths[b] cached positions: q (B, H, D), caches (B, H, T_max, D) -> (B, H, D)."""
    reasons = checks.against_decode_attention(q, k_cache, v_cache, lengths, scale)
    raise_if_any(reasons, "decode_attention", "reference", REMEDY)
    scores = (k_cache @ q[..., None]).squeeze(-1) * (scale or 1.0 / math.sqrt(q.shape[-1]))  # (B, H, T_max)
    used = torch.arange(k_cache.shape[2], device=q.device) < lengths[:, None, None]
    weights = scores.masked_fill(~used, -math.inf).softmax(-1)
    # nothing is read of the unused positions, whatever they hold: 0 times NaN would be NaN
    out = torch.where(used, weights, 0.0)[..., None, :] @ torch.where(used[..., None], v_cache, 0.0)
    return out.squeeze(-2).contiguous()


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """Each row of x (..., N) with mean 0 and variance 1, times weight (N,) plus bias (N,)."""
    raise_if_any(checks.against_layer_norm(x, weight, bias, eps), "layer_norm", "reference", REMEDY)
    centred = x - x.mean(-1, keepdim=True)
    variance = (centred**2).mean(-1, keepdim=True)
    return (centred / torch.sqrt(variance + eps) * weight + bias).to(x.dtype)


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    *,
    dropout_p: float = 0.0,
    seed: Seed | None = None,
) -> tuple[Tensor, Tensor]:
    """The layer norm of residual + dropout(x), and that sum; all (..., N)."""
    reasons = checks.against_add_layer_norm(x, residual, weight, bias, eps, dropout_p, seed)
    raise_if_any(reasons, "add_layer_norm", "reference", REMEDY)
    new_residual = dropout_add(x, residual, dropout_p, seed)
    return layer_norm(new_residual, weight, bias, eps).to(x.dtype), new_residual


def gelu(x: Tensor, approximate: Approximate = "tanh") -> Tensor:
    """x times the probability that a standard normal variable is below it; x has any shape."""
    raise_if_any(checks.against_gelu(x, approximate), "gelu", "reference", REMEDY)
    if approximate == "tanh":
        # not 1 + tanh, nor 1 + erf below, which cancel far below zero
        return x * torch.sigmoid(2.0 * math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3))
    return 0.5 * x * torch.erfc(-x / math.sqrt(2.0))


def bias_gelu(x: Tensor, bias: Tensor, approximate: Approximate = "tanh") -> Tensor:
    """GELU of x (..., N) + bias (N,)."""
    raise_if_any(checks.against_bias_gelu(x, bias, approximate), "bias_gelu", "reference", REMEDY)
    return gelu(x + bias, approximate).to(x.dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x (..., K) weight (N, K)^T + bias (N,)."""
    raise_if_any(checks.against_linear(x, weight, bias), "linear", "reference", REMEDY)
    return x @ weight.mT + bias


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor, approximate: Approximate = "tanh") -> Tensor:
    """GELU of x (..., K) weight (N, K)^T + bias (N,)."""
    raise_if_any(checks.against_linear_gelu(x, weight, bias, approximate), "linear_gelu", "reference", REMEDY)
    return gelu(x @ weight.mT + bias, approximate)


def embedding(
    tokens: Tensor,
    token_table: Tensor,
    position_table: Tensor,
    *,
    dropout_p: float = 0.0,
    seed: Seed | None = None,
) -> Tensor:
    """Row tokens[b, t] of token_table (V, N) plus row t of position_table (T_max, N): (B, T, N)."""
    reasons = checks.against_embedding(tokens, token_table, position_table, dropout_p, seed)
    raise_if_any(reasons, "embedding", "reference", REMEDY)
    return dropout(token_table[tokens] + position_table[: tokens.shape[1]], dropout_p, seed)


def dropout(x: Tensor, p: float, seed: Seed | None) -> Tensor:
    """x / (1 - p) for the elements that the seed keeps, each with probability 1 - p, and 0 for the others."""
    raise_if_any(checks.against_dropout_of(x, p, seed), "dropout", "reference", REMEDY)
    if p == 0.0 or seed is None:
        return x
    return seeded_dropout(x, p, seed_tensor(seed, x.device))


def dropout_add(x: Tensor, residual: Tensor, p: float, seed: Seed | None) -> Tensor:
    """residual + dropout(x), in the dtype of residual."""
    reasons = checks.against_dropout_add(x, residual, p, seed)
    raise_if_any(reasons, "dropout_add", "reference", REMEDY)
    return (residual + dropout(x, p, seed)).to(residual.dtype)


def logits(x: Tensor, weight: Tensor) -> Tensor:
    """x (..., N) weight (V, N)^T."""
    raise_if_any(checks.against_logits(x, weight), "logits", "reference", REMEDY)
    return x @ weight.mT


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    consume: bool = False,
    expected_gradient: float | Tensor | None = None,
) -> Tensor:
    """The negative log-softmax of each row of logits (rows, V) at its target.

    `consume` and `expected_gradient` change nothing here.
    """
    reasons = checks.against_cross_entropy(logits, targets, reduction, expected_gradient)
    raise_if_any(reasons, "cross_entropy", "reference", REMEDY)
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    counts = targets != ignore_index
    columns = torch.where(counts, targets, 0)[:, None]
    losses = torch.where(counts, z.logsumexp(-1) - z.gather(-1, columns).squeeze(-1), 0.0)
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / counts.sum()


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
) -> Tensor:
    """The cross-entropy of the logits x (rows, N) weight (V, N)^T."""
    reasons = checks.against_linear_cross_entropy(x, weight, targets, reduction)
    raise_if_any(reasons, "linear_cross_entropy", "reference", REMEDY)
    return cross_entropy(logits(x, weight), targets, ignore_index=ignore_index, reduction=reduction)
