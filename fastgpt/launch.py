"""The engine that a launch asks for."""

from typing import Literal

from fastgpt.config import Config, EngineConfig
from fastgpt.errors import UserError
from fastgpt.launchers import Launch


def engine_kind(config: Config, launch: Launch | None) -> Literal["single", "deepspeed"]:
    """What `engine.kind` comes to: `auto` is DeepSpeed under a launcher and where anything is offloaded, else `single`.

    Raises:
        UserError: the launch does not fit the settings.
    """
    kind = kind_of(config.engine, launch)
    world_size = launch.world_size if launch else 1
    micro_batch = config.train.micro_batch_size * config.model.context
    # the batches of a ramp are multiples of its first one
    smallest = config.smallest_batch_tokens
    if smallest // micro_batch % world_size:
        unit = micro_batch * world_size
        nearest = max(1, round(smallest / unit)) * unit
        setting = "train.batch_tokens" if config.train.batch_ramp_tokens is None else "train.batch_ramp_start"
        raise UserError(
            f"{setting}: {smallest} is {smallest // micro_batch} micro-batches, which cannot be "
            f"dealt evenly to {world_size} ranks; it must be a multiple of {unit}. The nearest is {nearest}"
        )
    return kind


def kind_of(engine: EngineConfig, launch: Launch | None) -> Literal["single", "deepspeed"]:
    """The same, whatever the batch. Raises UserError where several processes are to be a single one."""
    world_size = launch.world_size if launch else 1
    if engine.kind == "single" and world_size > 1:
        raise UserError(
            f"engine.kind: single runs on one process, and a launcher started {world_size}; use engine.kind=deepspeed"
        )
    if engine.kind == "auto":
        return "deepspeed" if launch or engine.offloads else "single"
    return engine.kind
