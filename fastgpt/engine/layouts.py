"""Where the optimizers of DeepSpeed 0.19 keep their fp32 masters and moments, and how their weights follow them.

DeepSpeed's public helpers do not suffice to read and write them (no answer at stage 0, an error for a second parameter
group at stages 1 and 2, nothing before the first update, stale weights after a write), so these classes know its
private attributes. They hold for the versions that pyproject.toml allows; a test compares the first forward pass after
loading.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor

from fastgpt.engine.one_pass import in_one_pass
from fastgpt.engine.precision import LossScale
from fastgpt.engine.ranks import Ranks
from fastgpt.engine.state import Fragment


class Layout(Protocol):
    """Where a DeepSpeed optimizer keeps its fp32 pieces."""

    optimizer: torch.optim.Optimizer  # the AdamW within

    def fragments(self, *, to_fill: bool = False) -> Iterator[Fragment]:
        """The pieces on this rank; each is surely in memory until the next one is asked for.

        Args:
            to_fill: they are to be written to, and what the optimizer has kept beside them is out of date.
        """

    def refresh_weights(self) -> None:
        """Bring the working weights in line with the masters, on all ranks."""

    def loss_scale(self) -> LossScale:
        """The dynamic loss scale (fp16)."""

    def set_loss_scale(self, scale: LossScale) -> None:
        """Go on with a loss scale."""


class PlainLayout:
    """Stage 0 in fp32: every rank holds every weight, the optimizer works on the weights themselves."""

    def __init__(self, optimizer: torch.optim.Optimizer, weights: Mapping[str, Tensor], ranks: Ranks) -> None:
        self.optimizer = optimizer
        self._weights = weights
        self._ranks = ranks

    def fragments(self, *, to_fill: bool = False) -> Iterator[Fragment]:
        """Whole parameters, dealt to the ranks for writing."""
        for number, (name, weight) in enumerate(self._weights.items()):
            yield Fragment(name, 0, weight.numel(), weight, 0, _deals(number, self._ranks))

    def refresh_weights(self) -> None:
        """Nothing to do: the weights are the masters."""

    def loss_scale(self) -> LossScale:
        """fp32 has none."""
        return LossScale()

    def set_loss_scale(self, scale: LossScale) -> None:
        """fp32 has none."""


class ReplicatedLayout:
    """Stage 0 in bf16 and fp16 (FP16_UnfusedOptimizer): an fp32 copy of every weight on every rank."""

    def __init__(self, wrapper: Any, names: dict[int, str], ranks: Ranks) -> None:
        self.optimizer = wrapper.optimizer
        self._wrapper = wrapper
        self._names = names
        self._ranks = ranks
        # DeepSpeed has already taken a step with zero gradients to make the moments: that decayed the masters, and
        # Adam's bias correction would be one step ahead
        self.optimizer.state.clear()
        for weight, master in self._pairs():
            master.data.copy_(weight.data)

    def _pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        for weights, masters in zip(self._wrapper.fp16_groups, self._wrapper.fp32_groups, strict=True):
            yield from zip(weights, masters, strict=True)

    def fragments(self, *, to_fill: bool = False) -> Iterator[Fragment]:
        """Whole parameters, dealt to the ranks for writing."""
        for number, (weight, master) in enumerate(self._pairs()):
            yield Fragment(self._names[id(weight)], 0, master.numel(), master, 0, _deals(number, self._ranks))

    def refresh_weights(self) -> None:
        """Round every master into its weight."""
        for weight, master in self._pairs():
            weight.data.copy_(master.data)

    def loss_scale(self) -> LossScale:
        """The scale and the updates since the last overflow."""
        state = self._wrapper.loss_scale_config
        return LossScale(float(state.cur_scale), state.cur_iter - state.last_overflow_iter - 1)

    def set_loss_scale(self, scale: LossScale) -> None:
        """Go on with a loss scale."""
        state = self._wrapper.loss_scale_config
        state.cur_scale, state.last_overflow_iter = scale.scale, state.cur_iter - scale.clean - 1


class FlatLayout:
    """Stages 1 and 2: each group's weights in one flat buffer, of which every rank owns one equal part."""

    def __init__(self, wrapper: Any, names: dict[int, str], ranks: Ranks) -> None:
        self.optimizer = wrapper.optimizer
        self._wrapper = wrapper
        self._names = names
        self._rank = ranks.rank

    def _groups(self) -> Iterator[tuple[list[Tensor], list[int], Tensor]]:
        """Each group's weights, their offsets in the flat buffer, and this rank's part of the masters."""
        yield from zip(
            self._wrapper.round_robin_bit16_groups,
            self._wrapper.round_robin_bit16_offsets,
            self._wrapper.single_partition_of_fp32_groups,
            strict=True,
        )

    def fragments(self, *, to_fill: bool = False) -> Iterator[Fragment]:
        """The parts of parameters that fall into this rank's part of the buffer."""
        for weights, offsets, part in self._groups():
            low = self._rank * part.numel()
            high = low + part.numel()
            for weight, offset in zip(weights, offsets, strict=True):
                start, stop = max(offset, low), min(offset + weight.numel(), high)
                if start < stop:
                    yield Fragment(self._names[id(weight)], start - offset, stop - start, part, start - low)

    def refresh_weights(self) -> None:
        """Round this rank's part and gather the others'."""
        self._wrapper.update_lp_params()

    def loss_scale(self) -> LossScale:
        """The scale and the updates since the last overflow."""
        return _loss_scale(self._wrapper.loss_scaler)

    def set_loss_scale(self, scale: LossScale) -> None:
        """Go on with a loss scale."""
        _set_loss_scale(self._wrapper.loss_scaler, scale)


class Bf16Layout(FlatLayout):
    """Stage 1 in bf16 (BF16_Optimizer), which keeps the same under other names, and is taught to update in one pass."""

    def __init__(self, wrapper: Any, names: dict[int, str], ranks: Ranks) -> None:
        super().__init__(wrapper, names, ranks)
        in_one_pass(wrapper)

    def _groups(self) -> Iterator[tuple[list[Tensor], list[int], Tensor]]:
        for weights, part in zip(self._wrapper.bf16_groups, self._wrapper.fp32_groups_flat_partition, strict=True):
            offsets = list(accumulate((weight.numel() for weight in weights[:-1]), initial=0))
            yield weights, offsets, part


class ShardedLayout:
    """Stage 3: every parameter cut into equal parts, one a rank, the last one padded; parts flattened by sub-group.

    With `engine.offload_optimizer: nvme` masters and moments of a sub-group lie on a disk, and their tensors are empty,
    but for sub-groups below 1 MiB.
    """

    def __init__(self, wrapper: Any, names: dict[int, str], ranks: Ranks) -> None:
        self.optimizer = wrapper.optimizer
        self._wrapper = wrapper
        self._names = names
        self._rank = ranks.rank

    def fragments(self, *, to_fill: bool = False) -> Iterator[Fragment]:
        """This rank's part of every parameter, without the padding."""
        wrapper = self._wrapper
        if to_fill and wrapper.swap_optimizer:
            wrapper.optimizer_swapper.purge_state()
        for number, weights in enumerate(wrapper.fp16_groups):
            with self._in_memory(number, changed=to_fill) as flat:
                offset = 0
                for weight in weights:
                    length = weight.ds_tensor.ds_numel
                    start = self._rank * length
                    own = min(length, weight.ds_numel - start)
                    if own > 0:
                        yield Fragment(self._names[id(weight)], start, own, flat, offset)
                    offset += length

    @contextmanager
    def _in_memory(self, number: int, *, changed: bool = False) -> Iterator[Tensor]:
        """The masters of a sub-group, and the moments of the optimizer, in memory; then back to where they belong."""
        wrapper = self._wrapper
        swapped = wrapper._swappable_optimizer_subgroup(number)
        if swapped:
            wrapper._optimizer_states_and_gradient_swap_in(number)
        try:
            yield wrapper.fp32_partitioned_groups_flat[number]
        finally:
            if swapped and changed:
                wrapper._optimizer_states_and_gradient_swap_out(number)
            elif swapped:
                wrapper._release_swap_buffers(number)

    def refresh_weights(self) -> None:
        """Round the masters into the parts, and gather again what DeepSpeed keeps gathered."""
        wrapper = self._wrapper
        wrapper._partition_all_parameters()
        for number in range(len(wrapper.fp16_groups)):
            with self._in_memory(number):
                wrapper._reassign_or_swap_out_partitioned_parameters(number)
        if wrapper.persistent_parameters:
            wrapper.persistent_parameters[0].all_gather(wrapper.persistent_parameters)

    def loss_scale(self) -> LossScale:
        """The scale and the updates since the last overflow."""
        return _loss_scale(self._wrapper.loss_scaler)

    def set_loss_scale(self, scale: LossScale) -> None:
        """Go on with a loss scale."""
        _set_loss_scale(self._wrapper.loss_scaler, scale)


def layout_of(wrapper: Any, stage: int, weights: Mapping[str, Tensor], ranks: Ranks) -> Layout:
    """The layout of a DeepSpeed optimizer, told by what it keeps."""
    names = {id(p): name for name, p in weights.items()}
    if stage == 3:
        return ShardedLayout(wrapper, names, ranks)
    if hasattr(wrapper, "bf16_groups"):
        return Bf16Layout(wrapper, names, ranks)
    if stage in (1, 2):
        return FlatLayout(wrapper, names, ranks)
    if isinstance(wrapper, torch.optim.Optimizer):
        return PlainLayout(wrapper, weights, ranks)
    return ReplicatedLayout(wrapper, names, ranks)


def _loss_scale(scaler: Any) -> LossScale:
    return LossScale(float(scaler.cur_scale), scaler.cur_iter - scaler.last_overflow_iter - 1)


def _set_loss_scale(scaler: Any, scale: LossScale) -> None:
    scaler.cur_scale, scaler.last_overflow_iter = scale.scale, scaler.cur_iter - scale.clean - 1


def _deals(number: int, ranks: Ranks) -> bool:
    return number % ranks.world_size == ranks.rank
