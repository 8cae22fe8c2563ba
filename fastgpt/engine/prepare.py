"""The choice of an engine."""

from collections.abc import Callable
from typing import Literal

import torch

from fastgpt.config import Config
from fastgpt.engine.base import Engine
from fastgpt.engine.ranks import Ranks
from fastgpt.model.gpt import GPT


def prepare(
    build: Callable[[], GPT],
    config: Config,
    *,
    kind: Literal["single", "deepspeed"],
    precision: str,
    device: torch.device,
    ranks: Ranks,
) -> Engine:
    """An engine with a freshly initialised model.

    Args:
        build: makes the model; a function, so that ZeRO-3 can shard each module as it is made.
        config: the run's settings.
        kind: `single` imports no DeepSpeed.
        precision: fp32, bf16 or fp16.
        device: this rank's device.
        ranks: the run's processes.
    """
    if kind == "single":
        from fastgpt.engine.single import SingleProcess

        return SingleProcess(build, config, precision, device)
    from fastgpt.engine.zero import DeepSpeedZero

    return DeepSpeedZero(build, config, precision, device, ranks)
