"""The choice of an engine."""

import logging
from collections.abc import Callable
from typing import Literal

import torch

from fastgpt.config import Config
from fastgpt.engine.base import Engine
from fastgpt.engine.ranks import Ranks
from fastgpt.model.init import InitialValues, initial_values
from fastgpt.model.language_model import LanguageModel

log = logging.getLogger(__name__)


def prepare(
    build: Callable[[], LanguageModel],
    config: Config,
    *,
    kind: Literal["single", "deepspeed"],
    precision: str,
    device: torch.device,
    ranks: Ranks,
    values: InitialValues | None = None,
) -> Engine:
    """An engine with a model that has not been updated yet.

    Args:
        build: makes the model; a function, so that ZeRO-3 can shard each module as it is made.
        config: the run's settings.
        kind: `single` imports no DeepSpeed.
        precision: fp32, bf16 or fp16.
        device: this rank's device.
        ranks: the run's processes.
        values: what the parameters start with; by default those of a model that begins to train. Rank 0's count.
    """
    if config.model.kind == "lstm" and (device.type, precision) == ("cpu", "bf16") and not _onednn_has_bf16():
        log.warning(
            "engine.precision: bf16: oneDNN has no bf16 on this CPU, so that PyTorch composes the LSTM of small "
            "operations, many times slower; engine.precision=fp32 is faster"
        )
    values = values or initial_values(config.model, config.train.seed)
    if kind == "single":
        from fastgpt.engine.single import SingleProcess

        return SingleProcess(build, config, precision, device, values=values)
    from fastgpt.engine.zero import DeepSpeedZero

    return DeepSpeedZero(build, config, precision, device, ranks, values)


def _onednn_has_bf16() -> bool:
    """Whether the LSTM of a CPU has bf16 of its own."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
