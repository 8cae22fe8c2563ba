"""GELU alone, after a bias and after a linear map, by PyTorch.

On a CPU PyTorch's tanh form spends most of its time in tanh, forward and backward. In 16 bits it is composed here
instead, of PyTorch's faster sigmoid, over chunks that stay in the cache:

    y = u s    y' = s + u w' s (1 - s),    s = sigmoid(w),  w = a u + a c u^3,  u w' = 3 w - 2 a u
    a = 2 sqrt(2 / pi),  c = 0.044715

The forward keeps the slope y' in place of u, so that the backward is one product. All is in float32; y' is rounded to
16 bits, as u would be. In float32, 1 - s would cancel in digits that count, and the matrix products take all the time.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt_kernels import checks
from fastgpt_kernels.checks import REMEDY, Approximate
from fastgpt_kernels.errors import raise_if_any

CHUNK = 65_536  # elements for each thread: four float32 buffers of them fit in a core's cache

_A, _C = 2.0 * math.sqrt(2.0 / math.pi), 0.044715


@torch.library.custom_op("fastgpt::gelu_tanh_16", mutates_args=())
def _gelu_tanh_16(x: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    """GELU of 16-bit numbers on a CPU, and where it is to be kept its slope."""
    x = x.contiguous()
    y, slope = torch.empty_like(x), torch.empty_like(x) if keep else x.new_empty(0)
    size = min(CHUNK * torch.get_num_threads(), x.numel())
    buffers = torch.empty((4, size), dtype=torch.float32).unbind()
    a = torch.tensor(_A)
    flat_x, flat_y, flat_slope = x.view(-1), y.view(-1), slope.view(-1)
    for start in range(0, x.numel(), size or 1):
        part = flat_x[start : start + size]
        u, v, w, s = buffers if len(part) == size else (buffer[: len(part)] for buffer in buffers)
        u.copy_(part)
        torch.addcmul(a, u, u, value=_A * _C, out=v)
        torch.mul(u, v, out=w)
        torch.sigmoid(w, out=s)
        torch.mul(u, s, out=flat_y[start : start + size])
        if keep:
            torch.sub(w, u, alpha=2.0 / 3.0 * _A, out=v)
            torch.ops.aten.sigmoid_backward.grad_input(v, s, grad_input=w)
            torch.add(s, w, alpha=3.0, out=flat_slope[start : start + size])
    return y, slope


@_gelu_tanh_16.register_fake
def _(x: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape if keep else 0)


@torch.library.custom_op("fastgpt::gelu_tanh_16_backward", mutates_args=())
def _gelu_tanh_16_backward(slope: Tensor, dy: Tensor) -> Tensor:
    return slope * dy.contiguous()


@_gelu_tanh_16_backward.register_fake
def _(slope: Tensor, dy: Tensor) -> Tensor:
    return slope.new_empty(slope.shape)


def _setup(ctx: Any, inputs: tuple[Tensor, bool], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1])


def _differentiate(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor, None]:
    return _gelu_tanh_16_backward(*ctx.saved_tensors, dy), None


_gelu_tanh_16.register_autograd(_differentiate, setup_context=_setup)


def gelu(x: Tensor, approximate: Approximate = "tanh") -> Tensor:
    """GELU of x (any shape), by `torch.nn.functional.gelu`; on a CPU in 16 bits the tanh form composed."""
    raise_if_any(checks.against_gelu(x, approximate), "gelu", "torch", REMEDY)
    return _gelu(x, approximate)


def bias_gelu(x: Tensor, bias: Tensor, approximate: Approximate = "tanh") -> Tensor:
    """GELU of x (..., N) + bias (N,)."""
    raise_if_any(checks.against_bias_gelu(x, bias, approximate), "bias_gelu", "torch", REMEDY)
    return _gelu(x + bias.to(x.dtype), approximate)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor, approximate: Approximate = "tanh") -> Tensor:
    """GELU of x (..., K) weight (N, K)^T + bias (N,); the product adds the bias. Under autocast, in its dtype."""
    raise_if_any(checks.against_linear_gelu(x, weight, bias, approximate), "linear_gelu", "torch", REMEDY)
    x, weight, bias = in_autocast_dtype(x, weight, bias)
    return _gelu(F.linear(x, weight, bias), approximate)


def in_autocast_dtype(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The operands of a product as autocast has them."""
    return tuple(tensor.to(checks.autocast_dtype(tensor)) for tensor in tensors)


def _gelu(x: Tensor, approximate: Approximate) -> Tensor:
    if approximate == "tanh" and x.device.type == "cpu" and x.dtype in (torch.float16, torch.bfloat16):
        y: Tensor = _gelu_tanh_16(x, torch.is_grad_enabled() and x.requires_grad)[0]
        return y
    return F.gelu(x, approximate=approximate)
