"""What every backend demands of its arguments: each function lists the reasons against them, and none means fine."""

import math
import operator
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.autograd import forward_ad

Approximate: TypeAlias = Literal["tanh", "none"]
Reduction: TypeAlias = Literal["mean", "sum", "none"]
Seed: TypeAlias = int | Tensor

REMEDY = "No backend takes these arguments: correct the call."
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
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
    tensors = {"qkv": qkv} if document_ids is None else {"qkv": qkv, "document_ids": document_ids}
    wrong = against_kinds(**tensors)
    reasons = against_dropout(dropout_p, seed, None if wrong else qkv, name="dropout_p")
    if not wrong:
        well_formed = qkv.dim() == 5 and qkv.shape[2] == 3
        if not well_formed:
            reasons.append(f"qkv has shape {shape_of(qkv)}; it must be (B, T, 3, H, D)")
        elif qkv.shape[4] == 0:
            reasons.append(f"qkv has shape {shape_of(qkv)}; D must be at least 1")
        if document_ids is not None:
            shape = tuple(qkv.shape[:2]) if well_formed else None
            reasons += against_integers(document_ids, "document_ids", shape, qkv, "qkv")
            if shape is None and document_ids.dim() != 2:
                reasons.append(f"document_ids has shape {shape_of(document_ids)}; it must be (B, T)")
    if window is not None and (not is_integer(window) or window < 1):
        reasons.append(f"window is {window!r}; it must be None or an integer of at least 1")
    return wrong + reasons + against_scale(scale) + ([] if wrong else against_no_floats(qkv, "qkv"))


def against_decode_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, scale: float | None
) -> list[str]:
    """Reasons against one query q (B, H, D) over caches (B, H, T_max, D) of which lengths (B,) are in use."""
    if wrong := against_kinds(q=q, k_cache=k_cache, v_cache=v_cache, lengths=lengths):
        return wrong + against_scale(scale)
    reasons = against_scale(scale) + against_no_floats(q, "q")
    if q.dim() != 3:
        return [*reasons, f"q has shape {shape_of(q)}; it must be (B, H, D)"]
    if q.shape[2] == 0:
        reasons.append(f"q has shape {shape_of(q)}; D must be at least 1")
    B, H, D = q.shape
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if cache.dim() != 4 or (cache.shape[0], cache.shape[1], cache.shape[3]) != (B, H, D):
            needed = "({}, {}, T_max, {})".format(*shape_of(q))
            reasons.append(f"{name} has shape {shape_of(cache)}; q {shape_of(q)} needs {needed}")
        reasons += against_other(cache, name, q, "q")
    if k_cache.shape != v_cache.shape:
        reasons.append(f"k_cache has shape {shape_of(k_cache)} and v_cache {shape_of(v_cache)}")
    return reasons + against_integers(lengths, "lengths", (B,), q, "q")


def against_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 0.0) -> list[str]:
    """Reasons against the normalisation of x (..., N) with weight (N,) and bias (N,)."""
    wrong = against_kinds(x=x, weight=weight, bias=bias)
    if not wrong:
        wrong = [*against_no_floats(x, "x"), *against_vector(x, weight, "weight"), *against_vector(x, bias, "bias")]
    if not 0.0 <= eps < math.inf:
        wrong.append(f"eps is {eps}; it must be at least 0 and finite")
    return wrong


def against_add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, dropout_p: float, seed: Seed | None
) -> list[str]:
    """Reasons against the normalisation of residual + dropout(x), both (..., N)."""
    reasons = against_dropout(dropout_p, seed, x, name="dropout_p")
    return reasons + against_residual(x, residual) + against_layer_norm(x, weight, bias, eps)


def against_dropout_of(x: Tensor, p: float, seed: Seed | None) -> list[str]:
    """Reasons against dropping elements of x (any shape)."""
    return against_dropout(p, seed, x) + (against_kinds(x=x) or against_no_floats(x, "x"))


def against_dropout_add(x: Tensor, residual: Tensor, p: float, seed: Seed | None) -> list[str]:
    """Reasons against residual + dropout(x), both of one shape."""
    return against_dropout(p, seed, x) + against_residual(x, residual)


def against_gelu(x: Tensor, approximate: str) -> list[str]:
    """Reasons against the activation of x (any shape)."""
    reasons = against_kinds(x=x) or against_no_floats(x, "x")
    if approximate not in ("tanh", "none"):
        reasons.append(f"approximate is {approximate!r}; it must be 'tanh' or 'none'")
    return reasons


def against_bias_gelu(x: Tensor, bias: Tensor, approximate: str) -> list[str]:
    """Reasons against the activation of x (..., N) + bias (N,)."""
    wrong = against_kinds(x=x, bias=bias)
    return wrong + against_gelu(x, approximate) + ([] if wrong else against_vector(x, bias, "bias"))


def against_linear_gelu(x: Tensor, weight: Tensor, bias: Tensor, approximate: str) -> list[str]:
    """Reasons against the activation of x (..., K) weight (N, K)^T + bias (N,)."""
    wrong = against_kinds(x=x, weight=weight, bias=bias)
    return wrong + against_gelu(x, approximate) + ([] if wrong else _against_affine(x, weight, bias))


def against_linear(x: Tensor, weight: Tensor, bias: Tensor) -> list[str]:
    """Reasons against x (..., K) weight (N, K)^T + bias (N,)."""
    wrong = against_kinds(x=x, weight=weight, bias=bias)
    return wrong or against_no_floats(x, "x") + _against_affine(x, weight, bias)


def _against_affine(x: Tensor, weight: Tensor, bias: Tensor) -> list[str]:
    reasons = against_factor(weight, "weight", x, "x") + against_factor(bias, "bias", x, "x")
    if x.dim() == 0:
        reasons.append("x has no dimensions; it must be (..., K)")
    elif weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        reasons.append(f"weight has shape {shape_of(weight)}; x (..., {shape_of(x)[-1]}) needs (N, {shape_of(x)[-1]})")
    elif bias.shape != weight.shape[:1]:
        reasons.append(f"bias has shape {shape_of(bias)}; weight {shape_of(weight)} needs ({shape_of(weight)[0]},)")
    return reasons


def against_embedding(
    tokens: Tensor, token_table: Tensor, position_table: Tensor, dropout_p: float, seed: Seed | None
) -> list[str]:
    """Reasons against the sum of rows of token_table (V, N) and position_table (T_max, N) for tokens (B, T)."""
    reasons = against_dropout(dropout_p, seed, tokens, name="dropout_p")
    if wrong := against_kinds(tokens=tokens, token_table=token_table, position_table=position_table):
        return wrong + reasons
    reasons += against_no_floats(token_table, "token_table")
    reasons += against_other(position_table, "position_table", token_table, "token_table")
    if tokens.dtype not in (torch.int64, torch.int32):
        reasons.append(f"tokens are {tokens.dtype}; they must be int64 or int32")
    if tokens.device != token_table.device:
        reasons.append(f"tokens is on {tokens.device} and token_table on {token_table.device}")
    if tokens.dim() != 2:
        reasons.append(f"tokens has shape {shape_of(tokens)}; it must be (B, T)")
    if token_table.dim() != 2:
        return [*reasons, f"token_table has shape {shape_of(token_table)}; it must be (V, N)"]
    if position_table.dim() != 2 or position_table.shape[1] != token_table.shape[1]:
        reasons.append(
            f"position_table has shape {shape_of(position_table)}; token_table {shape_of(token_table)} needs "
            f"(T_max, {shape_of(token_table)[1]})"
        )
    elif tokens.dim() == 2 and tokens.shape[1] > position_table.shape[0]:
        reasons.append(f"tokens has {shape_of(tokens)[1]} positions; position_table has {shape_of(position_table)[0]}")
    return reasons


def against_logits(x: Tensor, weight: Tensor) -> list[str]:
    """Reasons against the product of x (..., N) and weight (V, N)^T."""
    if wrong := against_kinds(x=x, weight=weight):
        return wrong
    reasons = against_no_floats(x, "x") + against_factor(weight, "weight", x, "x")
    if x.dim() == 0:
        reasons.append("x has no dimensions; it must be (..., N)")
    elif weight.dim() != 2 or weight.shape[1] != x.shape[-1] or not len(weight):
        reasons.append(f"weight has shape {shape_of(weight)}; x (..., {shape_of(x)[-1]}) needs (V, {shape_of(x)[-1]})")
    return reasons


def against_cross_entropy(
    logits: Tensor, targets: Tensor, reduction: str, expected_gradient: float | Tensor | None = None
) -> list[str]:
    """Reasons against the losses of logits (rows, V) at targets (rows,)."""
    if wrong := against_kinds(logits=logits, targets=targets):
        return wrong + against_reduction(reduction)
    reasons = against_no_floats(logits, "logits") + against_reduction(reduction)
    if logits.dim() != 2 or 0 in logits.shape[1:]:
        reasons.append(f"logits has shape {shape_of(logits)}; it must be (rows, V)")
    reasons += against_targets(targets, logits, "logits")
    return reasons + against_expected_gradient(expected_gradient, logits, "logits")


def against_linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, reduction: str) -> list[str]:
    """Reasons against the losses of x (rows, N) weight (V, N)^T at targets (rows,)."""
    if wrong := against_kinds(x=x, weight=weight, targets=targets):
        return wrong + against_reduction(reduction)
    reasons = against_no_floats(x, "x") + against_reduction(reduction) + against_factor(weight, "weight", x, "x")
    if x.dim() != 2:
        reasons.append(f"x has shape {shape_of(x)}; it must be (rows, N)")
    elif weight.dim() != 2 or weight.shape[1] != x.shape[1] or not len(weight):
        reasons.append(f"weight has shape {shape_of(weight)}; x {shape_of(x)} needs (V, {shape_of(x)[1]})")
    return reasons + against_targets(targets, x, "x")


def against_dropout(p: float, seed: Seed | None, x: Tensor | None = None, name: str = "p") -> list[str]:
    """Reasons against dropping elements of x with probability p from this seed."""
    reasons = []
    if not 0.0 <= p < 1.0:
        reasons.append(f"{name} is {p}; it must be at least 0 and below 1")
    elif p >= 1.0 - 2.0**-25:
        reasons.append(f"{name} is {p}; it must be below 1 when rounded to float32, which is what a GPU is given")
    if seed is None:
        if p != 0.0:
            reasons.append(f"{name} is {p} but seed is None; give an int, or an int64 tensor of one element")
    elif isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1:
            reasons.append(f"seed is a tensor of {operator.index(seed.numel())} x {seed.dtype}; it must be one int64")
        if isinstance(x, Tensor) and seed.device != x.device:
            reasons.append(
                f"seed is on {seed.device} and the tensor to drop from on {x.device}; it must be there, or an int, "
                "because a copy would wait for the device"
            )
    elif not is_integer(seed):
        reasons.append(f"seed is {seed!r}; it must be an int, or an int64 tensor of one element")
    elif not 0 <= seed < 2**63:
        reasons.append(f"seed is {seed}; it must be at least 0 and below 2^63")
    return reasons


def against_residual(x: Tensor, residual: Tensor) -> list[str]:
    """Reasons why x cannot be added to a residual: one shape and device, of one dtype or residual in float32."""
    if wrong := against_kinds(x=x, residual=residual):
        return wrong
    reasons = against_no_floats(x, "x") + against_no_floats(residual, "residual")
    if residual.shape != x.shape:
        reasons.append(f"residual has shape {shape_of(residual)} and x {shape_of(x)}")
    if residual.device != x.device:
        reasons.append(f"residual is on {residual.device} and x on {x.device}")
    if residual.dtype not in (x.dtype, torch.float32):
        reasons.append(f"residual is {residual.dtype} and x {x.dtype}; it must be of the same dtype, or float32")
    return reasons


def against_scale(scale: float | None) -> list[str]:
    """A reason against a factor of the scores."""
    if scale is None or 0.0 < scale < math.inf:
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
        if -math.inf < expected < math.inf and expected != 0.0:  # comparisons, which compile
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
    if rows.dim() == 2 and targets.shape != rows.shape[:1]:
        reasons.append(f"targets has shape {shape_of(targets)}; {name} {shape_of(rows)} needs ({shape_of(rows)[0]},)")
    if targets.device != rows.device:
        reasons.append(f"targets is on {targets.device} and {name} on {rows.device}")
    return reasons


def against_integers(x: Tensor, name: str, shape: tuple[int, ...] | None, other: Tensor, other_name: str) -> list[str]:
    """Reasons why x is not a tensor of integers of a shape (None: of any), on the device of another."""
    reasons = []
    if x.dtype not in INTEGERS:
        reasons.append(f"{name} is {x.dtype}; it must be a tensor of integers")
    if shape is not None and tuple(x.shape) != shape:
        needed = "(" + ", ".join(str(operator.index(size)) for size in shape) + ("," if len(shape) == 1 else "") + ")"
        reasons.append(f"{name} has shape {shape_of(x)}; {other_name} {shape_of(other)} needs {needed}")
    if x.device != other.device:
        reasons.append(f"{name} is on {x.device} and {other_name} on {other.device}")
    return reasons


def against_no_floats(x: Tensor, name: str) -> list[str]:
    """A reason where x holds no floating-point numbers."""
    return [] if x.is_floating_point() else [f"{name} is {x.dtype}; it must be a floating-point tensor"]


def against_kinds(**arguments: object) -> list[str]:
    """A reason for each argument that is no tensor, or one with a tangent, which our operators would lose."""
    reasons = []
    for name, x in arguments.items():
        if not isinstance(x, Tensor):
            kind = "None" if x is None else f"of type {type(x).__name__}"
            reasons.append(f"{name} is {kind}; it must be a tensor")
        elif not torch.compiler.is_compiling() and forward_ad._current_level >= 0 and _has_tangent(x):
            reasons.append(f"{name} carries a tangent; forward-mode derivatives are not offered")
    return reasons


def _has_tangent(x: Tensor) -> bool:
    """Whether x has a tangent, or was made under `torch.func.jvp` with another transformation inside, where it may."""
    functorch = torch._C._functorch
    if not functorch.is_functorch_wrapped_tensor(x):
        return forward_ad.unpack_dual(x).tangent is not None
    stack = functorch.get_interpreter_stack() or []
    levels = [level.level() for level in stack if level.key() == functorch.TransformType.Jvp]
    if levels and levels[-1] == stack[-1].level() == functorch.maybe_get_level(x):
        return forward_ad.unpack_dual(x).tangent is not None
    while functorch.is_functorch_wrapped_tensor(x):
        if functorch.maybe_get_level(x) in levels:
            return True
        x = functorch.get_unwrapped(x)
    return False


def against_other(x: Tensor, name: str, other: Tensor, other_name: str) -> list[str]:
    """Reasons why x is not of the dtype and device of another tensor."""
    reasons = []
    if x.dtype != other.dtype:
        reasons.append(f"{name} is {x.dtype} and {other_name} {other.dtype}; they must be of one dtype")
    if x.device != other.device:
        reasons.append(f"{name} is on {x.device} and {other_name} on {other.device}")
    return reasons


def against_factor(x: Tensor, name: str, other: Tensor, other_name: str) -> list[str]:
    """Reasons why x is not of the dtype, as autocast has it, and device of what it is multiplied with."""
    if autocast_dtype(x) == autocast_dtype(other):
        return [] if x.device == other.device else [f"{name} is on {x.device} and {other_name} on {other.device}"]
    return against_other(x, name, other, other_name)


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype that x has in a product: autocast's where it is on and x of a dtype that it casts, else its own."""
    device = x.device.type
    if device in ("cpu", "cuda") and x.dtype in DTYPES and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def against_vector(x: Tensor, vector: Tensor, name: str) -> list[str]:
    """Reasons why a vector does not fit the last dimension of x (..., N)."""
    if x.dim() == 0:
        return ["x has no dimensions; it must be (..., N)"]
    reasons = []
    reasons += against_no_floats(vector, name)
    if vector.shape != x.shape[-1:]:
        reasons.append(f"{name} has shape {shape_of(vector)}; x (..., {shape_of(x)[-1]}) needs ({shape_of(x)[-1]},)")
    if vector.device != x.device:
        reasons.append(f"{name} is on {vector.device} and x on {x.device}")
    return reasons


def is_integer(value: object) -> bool:
    """Whether a value is an integer of any type, bool and tensors apart."""
    if isinstance(value, (bool, Tensor)):
        return False
    if isinstance(value, (int, torch.SymInt)):
        return True
    try:
        operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return False
    return True


def integer(value: int) -> int:
    """A value for which `is_integer` holds, as PyTorch's operators want it."""
    return value if isinstance(value, (int, torch.SymInt)) else operator.index(value)


def shape_of(x: Tensor) -> tuple[int, ...]:
    """A shape for a message: numbers, also where a compiler has symbols for them."""
    return tuple(operator.index(size) for size in x.shape)
