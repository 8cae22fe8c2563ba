"""Dropout with its mask regenerated in the backward, never stored.

    y_n = x_n z_n        dx_n = dy_n z_n        z_n = 1 / (1 - p) where u_n >= p, else 0

u_n is uniform on [0, 1), from Philox 4x32-10 with the seed as key. The four words of one call serve four elements
that lie 1,024 apart: element n takes word n / 1024 mod 4 of call 1024 (n / 4096) + n mod 1024. The mask is thus a
function of the seed and of n, the index of the element in memory order.

Limits: float32, float16, bfloat16; any shape.

Numerics: u has 31 random bits; the product is taken in float32 and rounded once.

Source: Srivastava et al., "Dropout" (2014), section 10 (the scaled form). Salmon et al., "Parallel random numbers: as
easy as 1, 2, 3" (2011), section 3.3 (Philox).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt_kernels import checks, launch
from fastgpt_kernels.checks import Seed
from fastgpt_kernels.errors import raise_if_any
from fastgpt_kernels.seeds import seed_tensor

BLOCK = 1_024  # part of the definition of the mask: calls of Philox in a program, each for four elements


@triton.jit
def _dropout_kernel(
    x_ptr,  # (n,)
    seed_ptr,  # (1,) int64
    y_ptr,  # (n,)
    n,
    p,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    call = program * BLOCK + tl.arange(0, BLOCK)
    low, high = (call & 0xFFFFFFFF).to(tl.uint32), (call >> 32).to(tl.uint32)
    words = tl.philox(tl.load(seed_ptr), low, high, 0, 0)
    for word in tl.static_range(4):
        offset = (4 * program + word) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + offset, mask=offset < n, other=0.0).to(tl.float32)
        y = tl.where(tl.uint_to_uniform_float(words[word]) >= p, x * (1.0 / (1.0 - p)), 0.0)
        tl.store(y_ptr + offset, y.to(y_ptr.dtype.element_ty), mask=offset < n)


def launch_dropout(x: Tensor, p: float, seed: Tensor) -> Tensor:
    """A contiguous x through the mask of the seed; also the backward, with dy for x."""
    y = torch.empty_like(x)
    with launch.on_device_of(x):
        _dropout_kernel[(triton.cdiv(x.numel(), 4 * BLOCK),)](x, seed, y, x.numel(), p, BLOCK, **launch.OPTIONS)
    return y


@torch.library.custom_op("fastgpt::dropout", mutates_args=())
def _dropout(x: Tensor, p: float, seed: Tensor) -> Tensor:
    return launch_dropout(x.contiguous(), p, seed)


@_dropout.register_fake
def _(x: Tensor, p: float, seed: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _setup_context(ctx: Any, inputs: tuple[Tensor, float, Tensor], output: Tensor) -> None:
    _, ctx.p, seed = inputs
    ctx.save_for_backward(seed)


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
    return _dropout(dy, ctx.p, *ctx.saved_tensors), None, None


_dropout.register_autograd(_differentiate, setup_context=_setup_context)


def dropout(x: Tensor, p: float, seed: Seed | None) -> Tensor:
    """x / (1 - p) for the elements that the seed keeps, each with probability 1 - p, and 0 for the others; in Triton.

    Args:
        x: any shape, float32, float16 or bfloat16; made contiguous where it is not.
        p: probability, in [0, 1), of dropping an element; with 0, x itself is returned.
        seed: int in [0, 2^63) or int64 tensor of one element; needed where p > 0.

    Returns:
        The shape and dtype of x, contiguous. The same seed gives the same mask, in the backward too.

    Raises:
        UnsupportedInput: for arguments outside these.
    """
    raise_if_any(checks.against_dropout(p, seed), "dropout", "triton", checks.REMEDY)
    raise_if_any(launch.against(x=x), "dropout", "triton", launch.REMEDY)
    if p == 0.0 or seed is None:
        return x
    y: Tensor = _dropout(x, p, seed_tensor(seed, x.device))
    return y
