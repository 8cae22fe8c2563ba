"""Gradients of masters that lie on a disk stay in memory, where they are already.

DeepSpeed 0.19 writes each gradient of 1 MiB or more to the disk, and reads it back to its place behind the others of
the sub-group. Where that is no multiple of 512 bytes, which direct access asks for, what arrives is not what was
written, and nothing says so: a model that trains right on one rank, by the luck of even sizes, trains on noise on two.

Stage 3 keeps the fp32 sums of all gradients in one buffer in the host's memory whatever is written, so that the way
over the disk saves nothing: the swapper is handed views of that buffer, as it has them for gradients below 1 MiB.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from torch import Tensor


def keep_gradients_in_memory(wrapper: Any) -> None:
    """Let a stage-3 optimizer whose state lies on a disk take gradients from the buffer of their sums."""
    swapper = wrapper.optimizer_swapper
    sizes = wrapper.fp16_partitioned_groups_flat_numel
    # the buffer holds the sub-groups one after the other
    starts = list(accumulate(sizes[:-1], initial=0))
    places = {id(flat): start for flat, start in zip(wrapper.fp32_partitioned_groups_flat, starts, strict=True)}

    def swap_out_gradients(
        parameter: Tensor, gradient_offsets: Sequence[int], gradient_tensors: Sequence[Tensor]
    ) -> None:
        kept = swapper.swap_params_info[parameter.ds_id].unswapped_gradients  # type: ignore[attr-defined]
        for offset, gradient in zip(gradient_offsets, gradient_tensors, strict=True):
            start = places[id(parameter)] + offset
            kept[offset] = wrapper.grad_partitions_flat_buffer.narrow(0, start, gradient.numel())

    swapper.swap_out_gradients = swap_out_gradients
