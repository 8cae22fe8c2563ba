"""What a training step needs of a GPU's memory, counted without one: the real engine over fake tensors.

The single engine runs two whole updates with the Triton operations. Tensors have shapes and dtypes but no content
(`FakeTensorMode`), so that a model of billions of parameters takes seconds on any machine. Without a GPU they are fakes
of a CPU's; what the operations return, and keep for the backward, is the same. Not counted is what a kernel takes for
itself within a call: partial sums, and cuBLAS's workspace.
"""

import contextlib
import importlib
import os
from collections.abc import Iterator
from typing import NamedTuple
from unittest import mock

import numpy as np
import numpy.typing as npt
import torch

# before any kernel is defined: the operations then take tensors that lie on no GPU
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from fastgpt_kernels import adamw, load_ops
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.live_bytes import LiveBytes
from fastgpt.config import Config
from fastgpt.data.source import Batch
from fastgpt.engine import micro_step, single
from fastgpt.engine.precision import DTYPES
from fastgpt.model.gpt import GPT

# of this name the package holds the function
logits = importlib.import_module("fastgpt_kernels.torch_ops.logits")

# autograd cannot go through fakes of a GPU where there is none
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MICRO_BATCHES = 2  # of an update that accumulates: all after the second are like it


class Traced(NamedTuple):
    """Bytes of a step."""

    peak: int
    between: int  # that stay from update to update


def trace_step(config: Config) -> Traced:
    """The memory of an update of the single engine, as it is from the second update on.

    Args:
        config: the settings; `engine.precision` must be fp32, bf16 or fp16, and fp16 counts as bf16 does.
    """
    precision = "bf16" if config.engine.precision == "fp16" else config.engine.precision
    micro_batches = min(MICRO_BATCHES, config.micro_batches)
    tree = config.model_dump()
    tree["train"]["batch_ramp_tokens"] = None
    tree["train"]["batch_tokens"] = micro_batches * config.train.micro_batch_size * config.model.context
    config = Config.model_validate(tree)
    shape = (micro_batches, config.train.micro_batch_size, config.model.context + 1)
    tokens = np.broadcast_to(np.int64(0), shape)
    with _on_fakes(), FakeTensorMode(), LiveBytes() as count:
        engine = single.SingleProcess(lambda: _fake_model(config, DTYPES[precision]), config, precision, DEVICE)
        engine._optimizer.backend = "triton"
        engine.update(Batch(1, tokens[:1], (0,)))  # makes the moments
        count.peak = count.live
        engine.update(Batch(2, tokens, tuple(range(micro_batches))))
        return Traced(count.peak, count.live)


def _fake_model(config: Config, dtype: torch.dtype) -> GPT:
    """The model, born in its dtype: PyTorch does not convert a module of fakes."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with DEVICE:
            model = GPT(config.model, load_ops("triton"))
    finally:
        torch.set_default_dtype(default)
    model.to = lambda *_: model  # type: ignore[method-assign]
    return model


def _fake_tokens(tokens: npt.NDArray[np.int64], device: torch.device) -> Tensor:
    return torch.empty(tokens.shape, dtype=torch.int64, device=device)


def _is_padded_on_a_gpu(x: Tensor, weight: Tensor) -> bool:
    return x.dtype.itemsize == 2 and weight.shape[0] % logits.MULTIPLE != 0


@contextlib.contextmanager
def _on_fakes() -> Iterator[None]:
    """What reads numbers or addresses, which fakes do not have, gives way; none of it keeps memory on a GPU."""
    with (
        mock.patch.object(single, "initialise", lambda *_: None),
        mock.patch.object(micro_step, "to_device", _fake_tokens),
        mock.patch.object(logits, "is_padded", _is_padded_on_a_gpu),
        mock.patch.object(single, "grad_norm", lambda *_, **__: torch.empty((), device=DEVICE)),
        mock.patch.object(single, "gradient_factor", lambda *_: 1.0),
        mock.patch.object(adamw, "update", lambda *_: None),
    ):
        yield
