"""Layer norms and dropout of bfloat16 rows, alone and of a residual sum, by the C++ of `src/norms.cpp`."""

from typing import Any

import torch
from torch import Tensor

from fastgpt_kernels import checks, torch_ops
from fastgpt_kernels.checks import REMEDY, Seed
from fastgpt_kernels.errors import raise_if_any
from fastgpt_kernels.native.calls import call, mask_of, takes
from fastgpt_kernels.native.dropout import dropped
from fastgpt_kernels.seeds import seed_tensor


@torch.library.custom_op("fastgpt::native_layer_norm", mutates_args=())
def _layer_norm(
    x: Tensor | None, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, p: float, seed: Tensor | None
) -> list[Tensor]:
    """The norm, and for the backward mean and rstd (rows,) in float32; and the sum, where there is an x to add."""
    residual, weight, bias = residual.contiguous(), weight.contiguous(), bias.contiguous()
    N = residual.shape[-1]
    rows = residual.numel() // N
    y = torch.empty_like(residual)
    mean, rstd = (residual.new_empty(rows, dtype=torch.float32) for _ in range(2))
    s = None if x is None else torch.empty_like(residual)
    x = None if x is None else x.contiguous()
    call("fastgpt_layer_norm", x, residual, weight, bias, eps, y, s, mean, rstd, rows, N, mask_of(seed, p))
    return [y, mean, rstd] if s is None else [y, mean, rstd, s]


@_layer_norm.register_fake
def _(
    x: Tensor | None, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, p: float, seed: Tensor | None
) -> list[Tensor]:
    rows = residual.numel() // residual.shape[-1]
    statistics = [residual.new_empty(rows, dtype=torch.float32) for _ in range(2)]
    tensors = [residual.new_empty(residual.shape) for _ in range(1 if x is None else 2)]
    return [tensors[0], *statistics, *tensors[1:]]


@torch.library.custom_op("fastgpt::native_layer_norm_backward", mutates_args=())
def _layer_norm_backward(
    s: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    dy: Tensor,
    ds: Tensor | None,
    p: float,
    seed: Tensor | None,
) -> list[Tensor]:
    """The gradients of residual, weight and bias, and of x where that is another than that of residual."""
    s, weight, dy = s.contiguous(), weight.contiguous(), dy.contiguous()
    ds = None if ds is None else ds.contiguous()
    N = s.shape[-1]
    dresidual, dweight, dbias = torch.empty_like(s), torch.empty_like(weight), torch.empty_like(weight)
    dx = None if seed is None else torch.empty_like(s)
    call(
        "fastgpt_layer_norm_backward",
        *(s, weight, mean, rstd, dy, ds, dresidual, dx, dweight, dbias, s.numel() // N, N, mask_of(seed, p)),
    )
    return [dresidual, dweight, dbias] if dx is None else [dresidual, dweight, dbias, dx]


@_layer_norm_backward.register_fake
def _(
    s: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    dy: Tensor,
    ds: Tensor | None,
    p: float,
    seed: Tensor | None,
) -> list[Tensor]:
    gradients = [s.new_empty(s.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape)]
    return gradients if seed is None else [*gradients, s.new_empty(s.shape)]


def _setup_context(
    ctx: Any,
    inputs: tuple[Tensor | None, Tensor, Tensor, Tensor, float, float, Tensor | None],
    output: list[Tensor],
) -> None:
    x, residual, weight, _, _, ctx.p, seed = inputs
    _, mean, rstd, *s = output
    ctx.mark_non_differentiable(mean, rstd)
    # a block that uses one of the two results only pays for no gradient of the other
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(s[0] if s else residual, weight, mean, rstd, seed)
    ctx.added = x is not None


def _differentiate(ctx: Any, gradients: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    s, weight, mean, rstd, seed = ctx.saved_tensors
    dy, _, _, *rest = gradients
    ds = rest[0] if rest else None
    if dy is not None:
        dresidual, dweight, dbias, *dx = _layer_norm_backward(s, weight, mean, rstd, dy, ds, ctx.p, seed)
        return (dx[0] if dx else dresidual) if ctx.added else None, dresidual, dweight, dbias, None, None, None
    if ds is None:
        return (None,) * 7
    return (ds if seed is None else dropped(ds, None, ctx.p, seed)) if ctx.added else None, ds, *(None,) * 5


_layer_norm.register_autograd(_differentiate, setup_context=_setup_context)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """Layer normalisation of x (..., N) with weight (N,) and bias (N,); PyTorch's unless all are bfloat16 on a CPU."""
    raise_if_any(checks.against_layer_norm(x, weight, bias, eps), "layer_norm", "native", REMEDY)
    if not takes(x, weight, bias):
        return torch_ops.layer_norm(x, weight, bias, eps)
    y: Tensor = _layer_norm(None, x, weight, bias, eps, 0.0, None)[0]
    return y


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
    """The layer norm of residual + dropout(x), and that sum; PyTorch's unless all are bfloat16 on a CPU."""
    reasons = checks.against_add_layer_norm(x, residual, weight, bias, eps, dropout_p, seed)
    raise_if_any(reasons, "add_layer_norm", "native", REMEDY)
    if not takes(x, residual, weight, bias):
        return torch_ops.add_layer_norm(x, residual, weight, bias, eps, dropout_p=dropout_p, seed=seed)
    drawn = None if dropout_p == 0.0 or seed is None else seed_tensor(seed, x.device)
    y, _, _, s = _layer_norm(x, residual, weight, bias, eps, dropout_p, drawn)
    return y, s
