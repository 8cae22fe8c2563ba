"""Causal attention in bfloat16 by the C++ of `src/attention.cpp`, which has its mathematics and limits."""

import ctypes
import math
from typing import Any

import torch
from torch import Tensor

from fastgpt_kernels import checks, torch_ops
from fastgpt_kernels.checks import REMEDY, Seed
from fastgpt_kernels.errors import raise_if_any
from fastgpt_kernels.native.calls import Attention, call, mask_of, takes
from fastgpt_kernels.seeds import seed_tensor
from fastgpt_kernels.torch_ops.attention import numbered_documents


class _Problem:
    """What both directions share; it holds the tensors whose addresses it has."""

    def __init__(
        self,
        qkv: Tensor,
        scale: float,
        dropout_p: float,
        seed: Tensor | None,
        window: int | None,
        document_ids: Tensor | None,
    ) -> None:
        B, T, _, H, D = qkv.shape
        self._documents = None if document_ids is None else _documents(document_ids)
        numbers, firsts = (None, None) if self._documents is None else (x.data_ptr() for x in self._documents)
        strides = (ctypes.c_int64 * 5)(*qkv.stride())
        mask = mask_of(seed, dropout_p)
        self.description = Attention(B, T, H, D, window or T, strides, scale, mask, qkv.data_ptr(), numbers, firsts)


def _documents(ids: Tensor) -> tuple[Tensor, Tensor]:
    numbers, firsts = numbered_documents(ids)
    return numbers.contiguous(), firsts.to(torch.int32).contiguous()


@torch.library.custom_op("fastgpt::native_attention", mutates_args=())
def _attention(
    qkv: Tensor, scale: float, dropout_p: float, seed: Tensor | None, window: int | None, document_ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The output (B, T, H, D) and, for the backward, maxima and sums of its weights, (B, H, 2, T) in float32."""
    B, T, _, H, D = qkv.shape
    out, statistics = qkv.new_empty((B, T, H, D)), qkv.new_empty((B, H, 2, T), dtype=torch.float32)
    problem = _Problem(qkv, scale, dropout_p, seed, window, document_ids)
    call("fastgpt_attention", problem.description, out, statistics)
    return out, statistics


@_attention.register_fake
def _(
    qkv: Tensor, scale: float, dropout_p: float, seed: Tensor | None, window: int | None, document_ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    B, T, _, H, D = qkv.shape
    return qkv.new_empty((B, T, H, D)), qkv.new_empty((B, H, 2, T), dtype=torch.float32)


@torch.library.custom_op("fastgpt::native_attention_backward", mutates_args=())
def _attention_backward(
    qkv: Tensor,
    statistics: Tensor,
    dout: Tensor,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    window: int | None,
    document_ids: Tensor | None,
) -> Tensor:
    """The gradient of qkv, which lies in memory as qkv does; statistics and dout are contiguous."""
    dqkv = torch.empty_like(qkv)
    strides = (ctypes.c_int64 * 5)(*dqkv.stride())
    problem = _Problem(qkv, scale, dropout_p, seed, window, document_ids)
    call("fastgpt_attention_backward", problem.description, statistics, dout, dqkv, strides)
    return dqkv


@_attention_backward.register_fake
def _(
    qkv: Tensor,
    statistics: Tensor,
    dout: Tensor,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    window: int | None,
    document_ids: Tensor | None,
) -> Tensor:
    return torch.empty_like(qkv)


def _setup_context(
    ctx: Any,
    inputs: tuple[Tensor, float, float, Tensor | None, int | None, Tensor | None],
    output: tuple[Tensor, Tensor],
) -> None:
    qkv, ctx.scale, ctx.dropout_p, seed, ctx.window, document_ids = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(qkv, output[1], seed, document_ids)


def _differentiate(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    qkv, statistics, seed, document_ids = ctx.saved_tensors
    dqkv: Tensor = _attention_backward(
        qkv, statistics, dout.contiguous(), ctx.scale, ctx.dropout_p, seed, ctx.window, document_ids
    )
    return dqkv, None, None, None, None, None


_attention.register_autograd(_differentiate, setup_context=_setup_context)


def causal_attention(
    qkv: Tensor,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Seed | None = None,
    window: int | None = None,
    document_ids: Tensor | None = None,
) -> Tensor:
    """Causal attention over a packed projection.

    Args:
        qkv: (B, T, 3, H, D), any strides; bfloat16 on a CPU, else it is `torch_ops.causal_attention`.
        scale: factor of the scores before the softmax, positive; 1 / sqrt(D) when None.
        dropout_p: probability, in [0, 1), of dropping an attention weight.
        seed: int in [0, 2^63) or int64 tensor of one element; needed where dropout_p > 0. The mask is that of
            `torch_ops.causal_attention`.
        window: position i sees j with i - window < j <= i; all before it when None.
        document_ids: (B, T) integers; i sees j only where their ids are equal.

    Returns:
        (B, T, H, D), contiguous, in the dtype of qkv.

    Raises:
        UnsupportedInput: for arguments outside these.
    """
    reasons = checks.against_attention(qkv, scale, dropout_p, seed, window, document_ids)
    raise_if_any(reasons, "causal_attention", "native", REMEDY)
    if not takes(qkv):
        return torch_ops.causal_attention(
            qkv, scale=scale, dropout_p=dropout_p, seed=seed, window=window, document_ids=document_ids
        )
    factor = scale or 1.0 / math.sqrt(qkv.shape[-1])
    key = None if dropout_p == 0.0 or seed is None else seed_tensor(seed, qkv.device)
    band = None if window is None or window >= qkv.shape[1] else checks.integer(window)
    out: Tensor = _attention(qkv, factor, dropout_p, key, band, document_ids)[0]
    return out
