"""Attention of one query over cached keys and values, by PyTorch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt_kernels import checks
from fastgpt_kernels.checks import REMEDY
from fastgpt_kernels.errors import raise_if_any


@torch.library.custom_op("fastgpt::decode_attention_cpu", mutates_args=())
def _decode(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, scale: float | None) -> Tensor:
    """Nothing of the caches is read but what is in use; on a CPU the lengths are there to be read."""
    out = q.new_zeros(q.shape)
    used = [min(max(length, 0), k_cache.shape[2]) for length in lengths.tolist()]
    alike = len(set(used)) == 1
    # an op's own products are seen by autocast, which would round its operands
    with torch.autocast("cpu", enabled=False):
        for batch, length in enumerate(used[:1] if alike else used):
            rows = slice(None) if alike else slice(batch, batch + 1)
            if length:
                query, keys, values = q[rows, :, None], k_cache[rows, :, :length], v_cache[rows, :, :length]
                out[rows] = _attend(query, keys, values, scale).squeeze(2)
    return out


@_decode.register_fake
def _(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, scale: float | None) -> Tensor:
    return q.new_empty(q.shape)


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    # for a single query SDPA takes three times as long in 16 bits as it does with all of it widened
    wide = torch.promote_types(q.dtype, torch.float32)
    return F.scaled_dot_product_attention(q.to(wide), k.to(wide), v.to(wide), scale=scale)


def decode_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, *, scale: float | None = None
) -> Tensor:
    """One query over the keys and values kept of the tokens before it, by `scaled_dot_product_attention`.

    Args:
        q: (B, H, D), any floating-point dtype, any strides.
        k_cache: (B, H, T_max, D), in the dtype of q, any strides.
        v_cache: the same.
        lengths: (B,) integers: the positions in use of the caches, at most T_max. The others may hold anything.
        scale: factor of the scores before the softmax, positive; 1 / sqrt(D) when None.

    Returns:
        (B, H, D), contiguous, in the dtype of q; zeros where the length is 0. It requires no gradient.

    Raises:
        UnsupportedInput: for arguments outside these.
    """
    reasons = checks.against_decode_attention(q, k_cache, v_cache, lengths, scale)
    raise_if_any(reasons, "decode_attention", "torch", REMEDY)
    with torch.no_grad():
        if q.device.type == "cpu":
            out: Tensor = _decode(q, k_cache, v_cache, lengths, scale)
            return out
        used = torch.arange(k_cache.shape[2], device=q.device) < lengths[:, None]
        # a masked weight is 0, and 0 times NaN is NaN
        k, v = (torch.where(used[:, None, :, None], cache, 0.0) for cache in (k_cache, v_cache))
        out = F.scaled_dot_product_attention(q[:, :, None], k, v, attn_mask=used[:, None, None], scale=scale)
        return torch.where(used.any(1)[:, None, None], out.squeeze(2), 0.0)
