"""What an update tells, and what reading it costs."""

from typing import Any

import numpy as np
import pytest
import torch
from fastgpt_kernels import load_ops
from torch.utils._python_dispatch import TorchDispatchMode

from fastgpt.config import Config
from fastgpt.data.source import RandomSource
from fastgpt.engine.host import to_host
from fastgpt.engine.single import SingleProcess
from fastgpt.model.gpt import GPT

SETTINGS: dict[str, Any] = {
    "out": "unused",
    "model": {"n_layer": 1, "n_head": 2, "n_embd": 16, "context": 8, "vocab_size": 50},
    "data": {"path": "unused"},
    "train": {"steps": 3, "batch_tokens": 32, "micro_batch_size": 2, "lr": 1e-2},
}


class Operations(TorchDispatchMode):
    """Counts what PyTorch is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def engine() -> SingleProcess:
    config = Config.model_validate(SETTINGS)
    return SingleProcess(lambda: GPT(config.model, load_ops("torch")), config, "fp32", torch.device("cpu"))


def test_to_read_an_update_asks_nothing_of_a_device_that_is_at_work_on_the_next_one() -> None:
    """On a GPU each operation would come after those of the next update, which are in the queue before it."""
    one, batches = engine(), RandomSource(50, 8, 2, 2, seed=0).batches(0)
    first, second = one.update(next(batches)), one.update(next(batches))
    with Operations() as asked:
        updates = [first.update, second.update]
    assert [update.step for update in updates] == [1, 2]
    assert all(np.isfinite([update.loss, update.grad_norm]).all() for update in updates)
    assert not asked.names


@pytest.mark.gpu
def test_a_copy_to_the_host_waits_for_no_work_that_is_asked_for_after_it() -> None:
    read = to_host(torch.full((3,), 7.0, device="cuda"))
    torch.cuda._sleep(4_000_000_000)  # clock cycles: seconds
    later = torch.cuda.Event()
    later.record()
    assert read().tolist() == [7.0, 7.0, 7.0] and not later.query()
    torch.cuda.synchronize()
    assert later.query()


def test_an_update_tells_that_a_rank_was_asked_to_stop_before_it_was_begun() -> None:
    one, batches = engine(), RandomSource(50, 8, 2, 2, seed=0).batches(0)
    before = one.update(next(batches))
    one.ranks.stop_asked = True
    after = one.update(next(batches))
    assert (before.update.stop, after.update.stop) == (False, True)
