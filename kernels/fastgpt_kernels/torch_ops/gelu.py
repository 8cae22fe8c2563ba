"""GELU alone, after a bias and after a linear map, by PyTorch."""

import torch.nn.functional as F
from torch import Tensor

from fastgpt_kernels import checks
from fastgpt_kernels.checks import REMEDY, Approximate
from fastgpt_kernels.errors import raise_if_any


def gelu(x: Tensor, approximate: Approximate = "tanh") -> Tensor:
    """GELU of x (any shape), by `torch.nn.functional.gelu`."""
    raise_if_any(checks.against_gelu(x, approximate), "gelu", "torch", REMEDY)
    return F.gelu(x, approximate=approximate)


def bias_gelu(x: Tensor, bias: Tensor, approximate: Approximate = "tanh") -> Tensor:
    """GELU of x (..., N) + bias (N,)."""
    raise_if_any(checks.against_bias_gelu(x, bias, approximate), "bias_gelu", "torch", REMEDY)
    return F.gelu(x + bias.to(x.dtype), approximate=approximate)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor, approximate: Approximate = "tanh") -> Tensor:
    """GELU of x (..., K) weight (N, K)^T + bias (N,); the product adds the bias. Under autocast, in its dtype."""
    raise_if_any(checks.against_linear_gelu(x, weight, bias, approximate), "linear_gelu", "torch", REMEDY)
    x, weight, bias = in_autocast_dtype(x, weight, bias)
    return F.gelu(F.linear(x, weight, bias), approximate=approximate)


def in_autocast_dtype(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The operands of a product as autocast has them."""
    return tuple(tensor.to(checks.autocast_dtype(tensor)) for tensor in tensors)
