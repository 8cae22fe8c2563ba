"""The choice of an engine."""

from collections.abc import Callable
from typing import Literal

import torch

from fastgpt.config import Config
from fastgpt.engine.base import Engine
from fastgpt.engine.ranks import Ranks
from fastgpt.model.init import InitialValues, initial_values
from fastgpt.model.language_model import LanguageModel


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
    values = values or initial_values(config.model, config.train.seed)
    if kind == "single":
        from fastgpt.engine.single import SingleProcess

        return SingleProcess(build, config, precision, device, values=values)
    from fastgpt.engine.zero import DeepSpeedZero

    return DeepSpeedZero(build, config, precision, device, ranks, values)
