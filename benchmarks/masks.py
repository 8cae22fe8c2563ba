"""Whether dropout is right, whoever draws the mask: results and gradients are those of the mask that shows in them."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from fastgpt_kernels import native, torch_ops
from fastgpt_kernels.ops import Ops
from fastgpt_kernels.reference import visible
from fastgpt_kernels.seeds import rate
from fastgpt_kernels.testing import assert_close, pytorch_and_oracle, results_of
from torch import Tensor


def rate_of(contender: Any, p: float) -> float:
    """The rate at which a contender drops: exactly p, but for masks of 16 bits."""
    return rate(p) if getattr(contender, "dropout", None) in (native.dropout, torch_ops.dropout) else p


def assert_as_close(
    call: Callable[..., Any],
    masked: Callable[..., Any],
    kept: Callable[[Sequence[Tensor]], Tensor],
    p: float,
    *inputs: Tensor,
) -> None:
    """Compare a call under dropout with the mathematics, given the mask of that very call.

    Args:
        call: the call of the inputs.
        masked: `masked(ops, z, *inputs)`, the same with z, which is 1 / (1 - p) where the mask keeps and 0 elsewhere.
        kept: the mask, from the results of the call: its outputs, then gradients.
        p: the rate of dropping, of `rate_of`.
        inputs: what both are given.
    """
    ours = results_of(call, inputs)
    mask = kept(ours)
    few = 10 * (p * (1.0 - p) / mask.numel()) ** 0.5  # ten standard deviations
    assert abs(mask.float().mean().item() - (1.0 - p)) < few, "it does not drop at its rate"
    z = mask / (1.0 - p)
    theirs, oracle = pytorch_and_oracle(lambda ops, *xs: masked(ops, z, *xs), inputs)
    assert_close(ours, theirs, oracle, [x.dtype for x in ours])


def assert_attention_as_close(attend: Callable[[Tensor], Tensor], qkv: Tensor, p: float) -> None:
    """The same of causal attention by a kernel whose mask depends on its seed and the shape alone."""
    B, T, _, H, D = qkv.shape
    kept = torch.empty(B, H, T, T, dtype=torch.bool, device=qkv.device)
    for first in range(0, T, D):
        # with q = k = 0 and v a unit matrix the output is the weights
        unit, columns = torch.zeros_like(qkv), torch.arange(min(D, T - first), device=qkv.device)
        unit[:, first + columns, 2, :, columns] = 1.0
        kept[..., first : first + len(columns)] = (attend(unit) != 0)[..., : len(columns)].transpose(1, 2)
    past = visible(qkv)

    def masked(ops: Ops, z: Tensor, qkv: Tensor) -> Tensor:
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        weights = (q @ k.mT * D**-0.5).masked_fill(~past, -torch.inf).softmax(-1)
        z = torch.zeros_like(weights).masked_scatter(past.expand_as(weights), z.to(weights.dtype))
        return (weights * z @ v).transpose(1, 2)

    assert_as_close(attend, masked, lambda found: kept[past.expand_as(kept)], p, qkv)
