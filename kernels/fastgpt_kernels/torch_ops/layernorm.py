"""Layer normalisation, alone and of a residual sum, by PyTorch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt_kernels import checks
from fastgpt_kernels.checks import REMEDY, Seed
from fastgpt_kernels.errors import raise_if_any
from fastgpt_kernels.torch_ops.dropout import residual_sum


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """Layer normalisation of x (..., N) with weight (N,) and bias (N,), by `torch.nn.functional.layer_norm`."""
    raise_if_any(checks.against_layer_norm(x, weight, bias, eps), "layer_norm", "torch", REMEDY)
    return _normed(x, weight, bias, eps)


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
    """The layer norm of residual + dropout(x), in the dtype of x, and that sum, in the dtype of residual."""
    reasons = checks.against_add_layer_norm(x, residual, weight, bias, eps, dropout_p, seed)
    raise_if_any(reasons, "add_layer_norm", "torch", REMEDY)
    new_residual = residual_sum(x, residual, dropout_p, seed)
    return _normed(new_residual, weight, bias, eps).to(x.dtype), new_residual


def _normed(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    # PyTorch wants one dtype: the widest, as the other backends reckon, and one rounding
    wide = torch.promote_types(x.dtype, torch.promote_types(weight.dtype, bias.dtype))
    return F.layer_norm(x.to(wide), weight.shape, weight.to(wide), bias.to(wide), eps).to(x.dtype)
