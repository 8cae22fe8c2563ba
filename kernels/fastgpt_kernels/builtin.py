"""Every operation by PyTorch's own built-ins and nothing of ours: what "as close as PyTorch" is measured against.

The baseline of the parity tests and of the benchmarks, as a user would write it; `load_ops` does not offer it.
Arguments and shapes are those of `fastgpt_kernels.ops`, unchecked.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt_kernels.checks import Approximate, Reduction, Seed
from fastgpt_kernels.ops import Ops
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
    """`scaled_dot_product_attention`; with dropout written out, because SDPA's mask has no seed of its own."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    if dropout_p and seed is not None:
        scores = q @ k.mT * (scale or q.shape[-1] ** -0.5)
        weights = scores.masked_fill(~visible(qkv, window, document_ids), float("-inf")).softmax(-1)
        out = dropout(weights, dropout_p, seed) @ v
    elif window is None and document_ids is None:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    else:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible(qkv, window, document_ids), scale=scale)
    return out.transpose(1, 2).contiguous()


def decode_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, *, scale: float | None = None
) -> Tensor:
    """`scaled_dot_product_attention` with a mask."""
    used = torch.arange(k_cache.shape[2], device=q.device) < lengths[:, None, None, None]
    return F.scaled_dot_product_attention(q[:, :, None], k_cache, v_cache, attn_mask=used, scale=scale).squeeze(2)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """`torch.nn.functional.layer_norm`."""
    return F.layer_norm(x, weight.shape, weight.to(x.dtype), bias.to(x.dtype), eps)


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
    """A sum, then `torch.nn.functional.layer_norm`."""
    new_residual = dropout_add(x, residual, dropout_p, seed)
    return layer_norm(new_residual, weight, bias, eps).to(x.dtype), new_residual


def gelu(x: Tensor, approximate: Approximate = "tanh") -> Tensor:
    """`torch.nn.functional.gelu`."""
    return F.gelu(x, approximate=approximate)


def bias_gelu(x: Tensor, bias: Tensor, approximate: Approximate = "tanh") -> Tensor:
    """A sum, then `torch.nn.functional.gelu`."""
    return F.gelu(x + bias.to(x.dtype), approximate=approximate)


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`torch.nn.functional.linear`."""
    return F.linear(x, weight, bias)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor, approximate: Approximate = "tanh") -> Tensor:
    """`torch.nn.functional.linear`, then `gelu`."""
    return F.gelu(F.linear(x, weight, bias), approximate=approximate)


def embedding(
    tokens: Tensor,
    token_table: Tensor,
    position_table: Tensor,
    *,
    dropout_p: float = 0.0,
    seed: Seed | None = None,
) -> Tensor:
    """`torch.nn.functional.embedding`, and a sum."""
    return dropout(F.embedding(tokens, token_table) + position_table[: tokens.shape[1]], dropout_p, seed)


def dropout(x: Tensor, p: float, seed: Seed | None) -> Tensor:
    """A product with a mask drawn from the seed: `torch.nn.functional.dropout` has no seed of its own."""
    return x if p == 0.0 or seed is None else seeded_dropout(x, p, seed_tensor(seed, x.device))


def dropout_add(x: Tensor, residual: Tensor, p: float, seed: Seed | None) -> Tensor:
    """Dropout, then a sum."""
    return residual + dropout(x, p, seed)


def logits(x: Tensor, weight: Tensor) -> Tensor:
    """`torch.nn.functional.linear`."""
    return F.linear(x, weight)


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    consume: bool = False,
    expected_gradient: float | Tensor | None = None,
) -> Tensor:
    """`torch.nn.functional.cross_entropy`."""
    return F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction=reduction)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
) -> Tensor:
    """`torch.nn.functional.linear`, then `cross_entropy`."""
    return F.cross_entropy(F.linear(x, weight), targets, ignore_index=ignore_index, reduction=reduction)


BUILTIN = Ops("torch", *(globals()[operation] for operation in Ops._fields[1:]))
