"""Gradients of masters on a disk are views of the buffer of their sums, whatever their size and place."""

from types import SimpleNamespace

import torch

from fastgpt.engine.swapped_gradients import keep_gradients_in_memory


def test_each_gradient_is_taken_from_its_place_in_the_buffer() -> None:
    # two sub-groups of 5 and 7 elements; the second has gradients at 0 and 3
    masters = [torch.empty(0), torch.empty(0)]
    for number, master in enumerate(masters):
        master.ds_id = f"group{number}"  # type: ignore[attr-defined]
    infos = {f"group{number}": SimpleNamespace(unswapped_gradients={}) for number in range(2)}
    swapper = SimpleNamespace(swap_params_info=infos)
    buffer = torch.arange(12.0)
    wrapper = SimpleNamespace(
        optimizer_swapper=swapper,
        fp16_partitioned_groups_flat_numel=[5, 7],
        fp32_partitioned_groups_flat=masters,
        grad_partitions_flat_buffer=buffer,
    )
    keep_gradients_in_memory(wrapper)
    swapper.swap_out_gradients(masters[1], [0, 3], [torch.zeros(3), torch.zeros(4)])
    swapper.swap_out_gradients(masters[0], [2], [torch.zeros(3)])
    assert {offset: x.tolist() for offset, x in infos["group1"].unswapped_gradients.items()} == {
        0: [5.0, 6.0, 7.0],
        3: [8.0, 9.0, 10.0, 11.0],
    }
    (first,) = infos["group0"].unswapped_gradients.values()
    assert first.tolist() == [2.0, 3.0, 4.0]
    buffer.zero_()  # the next update's
    assert first.tolist() == [0.0, 0.0, 0.0]
