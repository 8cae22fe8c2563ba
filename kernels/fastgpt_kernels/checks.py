"""What every backend demands of its arguments: each function lists the reasons against them, and none means fine."""

import math
from typing import Literal, TypeAlias

import torch
from torch import Tensor

Approximate: TypeAlias = Literal["tanh", "none"]
Reduction: TypeAlias = Literal["mean", "sum", "none"]
Seed: TypeAlias = int | Tensor

REMEDY = "No backend takes these arguments: correct the call."
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def against_attention(
    qkv: Tensor,
    scale: float | None,
    dropout_p: float,
    seed: Seed | None,
    window: int | None = None,
    document_ids: Tensor | None = None,
) -> list[str]:
    """Reasons against attention over a packed projection qkv (B, T, 3, H, D)."""
    reasons = against_dropout(dropout_p, seed, name="dropout_p")
    if qkv.dim() != 5 or qkv.shape[2] != 3:
        reasons.append(f"qkv has shape {tuple(qkv.shape)}; it must be (B, T, 3, H, D)")
    elif document_ids is not None:
        reasons += against_integers(document_ids, "document_ids", tuple(qkv.shape[:2]), qkv, "qkv")
    if window is not None and (isinstance(window, bool) or not isinstance(window, int) or window < 1):
        reasons.append(f"window is {window!r}; it must be None or an integer of at least 1")
    return reasons + against_scale(scale) + against_no_floats(qkv, "qkv")


def against_decode_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, scale: float | None
) -> list[str]:
    """Reasons against one query q (B, H, D) over caches (B, H, T_max, D) of which lengths (B,) are in use."""
    reasons = against_scale(scale) + against_no_floats(q, "q")
    if q.dim() != 3:
        return [*reasons, f"q has shape {tuple(q.shape)}; it must be (B, H, D)"]
    B, H, D = q.shape
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if cache.dim() != 4 or (cache.shape[0], cache.shape[1], cache.shape[3]) != (B, H, D):
            reasons.append(f"{name} has shape {tuple(cache.shape)}; q {tuple(q.shape)} needs ({B}, {H}, T_max, {D})")
        reasons += against_other(cache, name, q, "q")
    if k_cache.shape != v_cache.shape:
        reasons.append(f"k_cache has shape {tuple(k_cache.shape)} and v_cache {tuple(v_cache.shape)}")
    return reasons + against_integers(lengths, "lengths", (B,), q, "q")


def against_layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> list[str]:
    """Reasons against the normalisation of x (..., N) with weight (N,) and bias (N,)."""
    return [*against_no_floats(x, "x"), *against_vector(x, weight, "weight"), *against_vector(x, bias, "bias")]


def against_add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, dropout_p: float, seed: Seed | None
) -> list[str]:
    """Reasons against the normalisation of residual + dropout(x), both (..., N)."""
    reasons = against_dropout(dropout_p, seed, name="dropout_p")
    return reasons + against_residual(x, residual) + against_layer_norm(x, weight, bias)


def against_gelu(x: Tensor, approximate: str) -> list[str]:
    """Reasons against the activation of x (any shape)."""
    reasons = against_no_floats(x, "x")
    if approximate not in ("tanh", "none"):
        reasons.append(f"approximate is {approximate!r}; it must be 'tanh' or 'none'")
    return reasons


def against_bias_gelu(x: Tensor, bias: Tensor, approximate: str) -> list[str]:
    """Reasons against the activation of x (..., N) + bias (N,)."""
    return against_gelu(x, approximate) + against_vector(x, bias, "bias")


def against_linear_gelu(x: Tensor, weight: Tensor, bias: Tensor, approximate: str) -> list[str]:
    """Reasons against the activation of x (..., K) weight (N, K)^T + bias (N,)."""
    reasons = (
        against_gelu(x, approximate) + against_other(weight, "weight", x, "x") + against_other(bias, "bias", x, "x")
    )
    if x.dim() == 0:
        reasons.append("x has no dimensions; it must be (..., K)")
    elif weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        reasons.append(f"weight has shape {tuple(weight.shape)}; x (..., {x.shape[-1]}) needs (N, {x.shape[-1]})")
    elif bias.shape != weight.shape[:1]:
        reasons.append(f"bias has shape {tuple(bias.shape)}; weight {tuple(weight.shape)} needs ({weight.shape[0]},)")
    return reasons


def against_embedding(
    tokens: Tensor, token_table: Tensor, position_table: Tensor, dropout_p: float, seed: Seed | None
) -> list[str]:
    """Reasons against the sum of rows of token_table (V, N) and position_table (T_max, N) for tokens (B, T)."""
    reasons = against_dropout(dropout_p, seed, name="dropout_p") + against_no_floats(token_table, "token_table")
    reasons += against_other(position_table, "position_table", token_table, "token_table")
    if tokens.dtype not in (torch.int64, torch.int32):
        reasons.append(f"tokens are {tokens.dtype}; they must be int64 or int32")
    if tokens.device != token_table.device:
        reasons.append(f"tokens is on {tokens.device} and token_table on {token_table.device}")
    if tokens.dim() != 2:
        reasons.append(f"tokens has shape {tuple(tokens.shape)}; it must be (B, T)")
    if token_table.dim() != 2:
        return [*reasons, f"token_table has shape {tuple(token_table.shape)}; it must be (V, N)"]
    if position_table.dim() != 2 or position_table.shape[1] != token_table.shape[1]:
        reasons.append(
            f"position_table has shape {tuple(position_table.shape)}; token_table {tuple(token_table.shape)} needs "
            f"(T_max, {token_table.shape[1]})"
        )
    elif tokens.dim() == 2 and tokens.shape[1] > position_table.shape[0]:
        reasons.append(f"tokens has {tokens.shape[1]} positions; position_table has {position_table.shape[0]}")
    return reasons


def against_cross_entropy(
    logits: Tensor, targets: Tensor, reduction: str, expected_gradient: float | Tensor | None = None
) -> list[str]:
    """Reasons against the losses of logits (rows, V) at targets (rows,)."""
    reasons = against_no_floats(logits, "logits") + against_reduction(reduction)
    if logits.dim() != 2 or 0 in logits.shape[1:]:
        reasons.append(f"logits has shape {tuple(logits.shape)}; it must be (rows, V)")
    reasons += against_targets(targets, logits, "logits")
    return reasons + against_expected_gradient(expected_gradient, logits, "logits")


def against_linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, reduction: str) -> list[str]:
    """Reasons against the losses of x (rows, N) weight (V, N)^T at targets (rows,)."""
    reasons = against_no_floats(x, "x") + against_reduction(reduction) + against_other(weight, "weight", x, "x")
    if x.dim() != 2:
        reasons.append(f"x has shape {tuple(x.shape)}; it must be (rows, N)")
    elif weight.dim() != 2 or weight.shape[1] != x.shape[1] or not len(weight):
        reasons.append(f"weight has shape {tuple(weight.shape)}; x {tuple(x.shape)} needs (V, {x.shape[1]})")
    return reasons + against_targets(targets, x, "x")


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


def against_residual(x: Tensor, residual: Tensor) -> list[str]:
    """Reasons why x cannot be added to a residual: one shape and device, float32 at the most in both."""
    reasons = against_no_floats(x, "x") + against_no_floats(residual, "residual")
    if residual.shape != x.shape:
        reasons.append(f"residual has shape {tuple(residual.shape)} and x {tuple(x.shape)}")
    if residual.device != x.device:
        reasons.append(f"residual is on {residual.device} and x on {x.device}")
    if residual.dtype not in (x.dtype, torch.float32):
        reasons.append(f"residual is {residual.dtype} and x {x.dtype}; it must be of the same dtype, or float32")
    return reasons


def against_scale(scale: float | None) -> list[str]:
    """A reason against a factor of the scores."""
    if scale is None or (scale > 0 and math.isfinite(scale)):
        return []
    return [f"scale is {scale}; it must be positive and finite"]


def against_reduction(reduction: str) -> list[str]:
    """A reason against a way to sum up losses."""
    if reduction in ("mean", "sum", "none"):
        return []
    return [f"reduction is {reduction!r}; it must be 'mean', 'sum' or 'none'"]


def against_expected_gradient(expected: float | Tensor | None, other: Tensor, other_name: str) -> list[str]:
    """Reasons against the gradient that a caller announces for a result; the value of a tensor is not looked at."""
    if expected is None:
        return []
    if not isinstance(expected, Tensor):
        if math.isfinite(expected) and expected != 0.0:
            return []
        return [f"expected_gradient is {expected}; it must be finite and not 0, or None"]
    reasons = []
    if expected.dtype != torch.float32 or expected.numel() != 1:
        reasons.append(
            f"expected_gradient is a tensor of {expected.numel()} x {expected.dtype}; it must be one float32, a number "
            "or None"
        )
    if expected.device != other.device:
        reasons.append(f"expected_gradient is on {expected.device} and {other_name} on {other.device}")
    return reasons


def against_targets(targets: Tensor, rows: Tensor, name: str) -> list[str]:
    """Reasons against targets (rows,) for a matrix of so many rows."""
    reasons = []
    if targets.dtype != torch.int64:
        reasons.append(f"targets are {targets.dtype}; they must be int64")
    if rows.dim() == 2 and tuple(targets.shape) != (rows.shape[0],):
        reasons.append(f"targets has shape {tuple(targets.shape)}; {name} {tuple(rows.shape)} needs ({rows.shape[0]},)")
    if targets.device != rows.device:
        reasons.append(f"targets is on {targets.device} and {name} on {rows.device}")
    return reasons


def against_integers(x: Tensor, name: str, shape: tuple[int, ...], other: Tensor, other_name: str) -> list[str]:
    """Reasons why x is not a tensor of integers of a shape, on the device of another."""
    reasons = []
    if x.dtype not in INTEGERS:
        reasons.append(f"{name} is {x.dtype}; it must be a tensor of integers")
    if tuple(x.shape) != shape:
        needed = "(" + ", ".join(map(str, shape)) + ("," if len(shape) == 1 else "") + ")"
        reasons.append(f"{name} has shape {tuple(x.shape)}; {other_name} {tuple(other.shape)} needs {needed}")
    if x.device != other.device:
        reasons.append(f"{name} is on {x.device} and {other_name} on {other.device}")
    return reasons


def against_no_floats(x: Tensor, name: str) -> list[str]:
    """A reason where x holds no floating-point numbers."""
    return [] if x.is_floating_point() else [f"{name} is {x.dtype}; it must be a floating-point tensor"]


def against_other(x: Tensor, name: str, other: Tensor, other_name: str) -> list[str]:
    """Reasons why x is not of the dtype and device of another tensor."""
    reasons = []
    if x.dtype != other.dtype:
        reasons.append(f"{name} is {x.dtype} and {other_name} {other.dtype}; they must be of one dtype")
    if x.device != other.device:
        reasons.append(f"{name} is on {x.device} and {other_name} on {other.device}")
    return reasons


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
