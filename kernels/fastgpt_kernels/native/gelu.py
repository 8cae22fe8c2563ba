"""GELU in its tanh form over bfloat16, alone and after a linear map, by the C++ of `src/gelu.cpp`."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt_kernels import checks, torch_ops
from fastgpt_kernels.checks import REMEDY, Approximate
from fastgpt_kernels.errors import raise_if_any
from fastgpt_kernels.native.calls import call, takes
from fastgpt_kernels.native.linear import linear


@torch.library.custom_op("fastgpt::native_gelu", mutates_args=())
def _gelu(x: Tensor) -> Tensor:
    x = x.contiguous()
    y = torch.empty_like(x)
    call("fastgpt_gelu", x, y, x.numel())
    return y


@_gelu.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("fastgpt::native_gelu_backward", mutates_args=())
def _gelu_backward(x: Tensor, dy: Tensor) -> Tensor:
    x, dy = x.contiguous(), dy.contiguous()
    dx = torch.empty_like(x)
    call("fastgpt_gelu_backward", x, dy, dx, x.numel())
    return dx


@_gelu_backward.register_fake
def _(x: Tensor, dy: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, dy: Tensor) -> Tensor:
    dx: Tensor = _gelu_backward(*ctx.saved_tensors, dy)
    return dx


_gelu.register_autograd(_differentiate, setup_context=_setup_context)


def _activated(x: Tensor, approximate: Approximate) -> Tensor:
    y: Tensor = _gelu(x) if takes(x) and approximate == "tanh" else F.gelu(x, approximate=approximate)
    return y


def gelu(x: Tensor, approximate: Approximate = "tanh") -> Tensor:
    """GELU of x (any shape); in its exact form, or not in bfloat16 on a CPU, PyTorch's."""
    raise_if_any(checks.against_gelu(x, approximate), "gelu", "native", REMEDY)
    return _activated(x, approximate)


def bias_gelu(x: Tensor, bias: Tensor, approximate: Approximate = "tanh") -> Tensor:
    """GELU of x (..., N) + bias (N,), by PyTorch: a block adds the bias in the product before it (`linear_gelu`)."""
    return torch_ops.bias_gelu(x, bias, approximate)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor, approximate: Approximate = "tanh") -> Tensor:
    """GELU of x (..., K) weight (N, K)^T + bias (N,); the product adds the bias. Under autocast, in its dtype."""
    raise_if_any(checks.against_linear_gelu(x, weight, bias, approximate), "linear_gelu", "native", REMEDY)
    return _activated(linear(x, weight, bias), approximate)
