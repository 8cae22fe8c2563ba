"""Activation checkpointing: a block keeps one tensor, its stream, and computes the rest again for the backward pass."""

from typing import Any

import torch
from fastgpt_kernels import Ops
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastgpt.model.cache import LayerCache
from fastgpt.model.dropout import Masks, Site


def recomputed(
    block: nn.Module, branch: Tensor | None, stream: Tensor, masks: Masks, ops: Ops, *, cache: LayerCache | None = None
) -> tuple[Tensor | None, Tensor]:
    """What the block hands on, with the branch already in the stream: see `_Closed`."""
    # no random state to preserve: the seeds are arguments
    branch, stream = checkpoint(
        block, branch, stream, masks, cache=cache, use_reentrant=False, preserve_rng_state=False
    )
    if branch is None:
        return None, stream
    zeros, total = _Closed.apply(branch, stream, masks, ops)  # type: ignore[no-untyped-call]
    return zeros, total


class _Closed(torch.autograd.Function):
    """A branch and its stream become zeros and their sum, in the forward pass only.

    A checkpoint keeps what its block is given: a branch and a stream would be two tensors, their sum is one, and zeros
    are a single number. The next block adds the zeros, which changes no bit of the sum, and its norm reckons from the
    sum the gradients of a branch under this very mask and of a stream: those of the two that were summed here. So both
    passes are made of the operations of a model that keeps everything, and their results are the same bits.
    """

    @staticmethod
    def forward(ctx: Any, branch: Tensor, stream: Tensor, masks: Masks, ops: Ops) -> tuple[Tensor, Tensor]:
        total = ops.dropout_add(branch, stream, masks.p, masks.seed_at(Site.MLP_OUTPUT))
        return branch.new_zeros(()).expand_as(branch), total

    @staticmethod
    def backward(ctx: Any, dbranch: Tensor, dstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return dbranch, dstream, None, None
