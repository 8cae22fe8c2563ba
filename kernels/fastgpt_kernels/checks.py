"""What every backend demands of its arguments: each function lists the reasons against them, and none means fine."""

import math
from typing import Literal, TypeAlias

import torch
from torch import Tensor

Approximate: TypeAlias = Literal["tanh", "none"]
Seed: TypeAlias = int | Tensor

REMEDY = "No backend takes these arguments: correct the call."


def against_attention(qkv: Tensor, scale: float | None, dropout_p: float, seed: Seed | None) -> list[str]:
    """Reasons against attention over a packed projection qkv (B, T, 3, H, D)."""
    reasons = against_dropout(dropout_p, seed, name="dropout_p")
    if qkv.dim() != 5 or qkv.shape[2] != 3:
        reasons.append(f"qkv has shape {tuple(qkv.shape)}; it must be (B, T, 3, H, D)")
    if scale is not None and not (scale > 0 and math.isfinite(scale)):
        reasons.append(f"scale is {scale}; it must be positive and finite")
    return reasons + against_integers(qkv, "qkv")


def against_layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> list[str]:
    """Reasons against the normalisation of x (..., N) with weight (N,) and bias (N,)."""
    return [*against_integers(x, "x"), *against_vector(x, weight, "weight"), *against_vector(x, bias, "bias")]


def against_gelu(x: Tensor, approximate: str) -> list[str]:
    """Reasons against the activation of x (any shape)."""
    reasons = against_integers(x, "x")
    if approximate not in ("tanh", "none"):
        reasons.append(f"approximate is {approximate!r}; it must be 'tanh' or 'none'")
    return reasons


def against_dropout(p: float, seed: Seed | None, name: str = "p") -> list[str]:
    """Reasons against dropping with probability p from this seed."""
    reasons = []
    if not 0.0 <= p < 1.0:
        reasons.append(f"{name} is {p}; it must be at least 0 and below 1")
    if seed is None:
        if p != 0.0:
            reasons.append(f"{name} is {p} but seed is None; give an int, or an int64 tensor of one element")
    elif isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1:
            reasons.append(f"seed is a tensor of {seed.numel()} x {seed.dtype}; it must be one int64")
    elif not 0 <= seed < 2**63:
        reasons.append(f"seed is {seed}; it must be at least 0 and below 2^63")
    return reasons


def against_integers(x: Tensor, name: str) -> list[str]:
    """A reason where x holds no floating-point numbers."""
    return [] if x.is_floating_point() else [f"{name} is {x.dtype}; it must be a floating-point tensor"]


def against_vector(x: Tensor, vector: Tensor, name: str) -> list[str]:
    """Reasons why a vector does not fit the last dimension of x (..., N)."""
    if x.dim() == 0:
        return ["x has no dimensions; it must be (..., N)"]
    reasons = []
    if tuple(vector.shape) != (x.shape[-1],):
        reasons.append(f"{name} has shape {tuple(vector.shape)}; x (..., {x.shape[-1]}) needs ({x.shape[-1]},)")
    if vector.device != x.device:
        reasons.append(f"{name} is on {vector.device} and x on {x.device}")
    return reasons
