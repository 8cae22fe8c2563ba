"""ZeRO-1 in bf16 in as few passes over memory as the single engine's, and without a wait for the device.

DeepSpeed's `BF16_Optimizer` clears the fp32 sums of the gradients twice in an update and adds to them by way of a copy,
flattens what is flat, takes the norm and clips tensor by tensor, asks the device twice how it came out, and rounds the
masters in a pass of its own. `in_one_pass` lets a wrapper that DeepSpeed has built do the same work so:

    first micro-batch            sum <- gradient, in fp32
    the others                   sum <- sum + gradient
    after the last, W > 1 ranks  DeepSpeed's all-reduce of the sums
    the update                   the norm in one launch; clipping, AdamW and rounding in one pass over this rank's part
    W > 1 ranks                  DeepSpeed's all-gather of the rounded weights

It overrides methods that are DeepSpeed's own. They hold for the versions that pyproject.toml allows; tests compare an
update's every bit with what DeepSpeed and the single engine make of the same batches.
"""

import logging
from typing import Any

import torch
import torch.distributed as dist
from fastgpt_kernels import FusedAdamW, accumulate, grad_norm
from torch import Tensor

from fastgpt.engine.optimizer import gradient_factor

log = logging.getLogger(__name__)


class OnePass:
    """What `in_one_pass` puts before DeepSpeed's class; the attributes are DeepSpeed's, W is the number of ranks."""

    optimizer: FusedAdamW
    clip_grad: float  # 0 leaves gradients as they are
    dp_rank: int
    real_dp_process_group: list[Any]  # of each parameter group
    bf16_groups_flat: list[Tensor]  # the weights of each group, (elements,) bfloat16
    bf16_partitioned_groups: list[list[Tensor]]  # W views of them, (elements / W,)
    fp32_groups_flat_partition: list[Tensor]  # the masters of this rank's part, (elements / W,) float32
    fp32_groups_gradients_flat: list[Tensor]  # sums of gradients, (elements,) float32
    fp32_groups_gradients: list[list[Tensor]]  # views of them, one a weight
    fp32_groups_gradient_flat_partition: list[Tensor]  # and one of this rank's part
    fp32_groups_has_gradients: list[list[bool]]  # whether a weight's sum has been begun in this update
    _global_grad_norm: Tensor

    def accumulate_hp_grads_and_remove_lp(self, lp_param: Tensor, group_idx: int, param_idx: int) -> None:
        """Move a weight's gradient into its sum: what DeepSpeed's hook does as soon as there is one."""
        if lp_param.grad is None:
            return
        total, begun = self.fp32_groups_gradients[group_idx][param_idx], self.fp32_groups_has_gradients[group_idx]
        gradient = lp_param.grad.view(-1)
        if begun[param_idx]:
            accumulate(total, gradient)
        else:
            total.copy_(gradient)
            begun[param_idx] = True
        lp_param.grad = None

    def get_grads_for_reduction(self) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
        """What the engine reduces after the last micro-batch: nothing where there is one rank."""
        for totals, begun in zip(self.fp32_groups_gradients, self.fp32_groups_has_gradients, strict=True):
            for total, is_begun in zip(totals, begun, strict=True):
                if not is_begun:
                    total.zero_()
        groups = zip(self.fp32_groups_gradients_flat, self.real_dp_process_group, strict=True)
        return [total for total, ranks in groups if dist.get_world_size(ranks) > 1], {}

    @torch.no_grad()
    def step(self) -> None:
        """The update; none where the norm is not finite, which the host does not ask."""
        norm = self._global_grad_norm = grad_norm(self.fp32_groups_gradients_flat, backend=self.optimizer.backend)
        parts = zip(self.fp32_groups_flat_partition, self.fp32_groups_gradient_flat_partition, strict=True)
        for master, gradient in parts:
            master.grad = gradient
        self.optimizer.step(gradient_scale=gradient_factor(norm, self.clip_grad or None, scale=1.0))
        groups = zip(self.bf16_groups_flat, self.bf16_partitioned_groups, self.real_dp_process_group, strict=True)
        for weights, rounded, ranks in groups:
            if dist.get_world_size(ranks) > 1:
                dist.all_gather_into_tensor(weights, rounded[self.dp_rank], group=ranks)

    def clear_hp_grads(self) -> None:
        """Begin new sums: the first gradient is copied over what there is."""
        for begun in self.fp32_groups_has_gradients:
            begun[:] = [False] * len(begun)


def in_one_pass(wrapper: Any) -> None:
    """Give a `BF16_Optimizer`, made with immediate_grad_update, the methods of `OnePass`.

    One that is not built as those of the versions that we know is left as it is, and the log says so.
    """
    known = [*OnePass.__annotations__, *(name for name in vars(OnePass) if not name.startswith("__"))]
    missing = [name for name in known if name != "_global_grad_norm" and not hasattr(wrapper, name)]
    if missing:
        log.warning("this DeepSpeed's %s has no %s: its own update is used", type(wrapper).__name__, missing[0])
        return
    rounded = [parts[wrapper.dp_rank] for parts in wrapper.bf16_partitioned_groups]
    wrapper.optimizer.set_working(zip(wrapper.fp32_groups_flat_partition, rounded, strict=True))
    wrapper.__class__ = type("OnePassBF16Optimizer", (OnePass, type(wrapper)), {})
