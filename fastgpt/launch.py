"""How this process was started: by itself, or as one of several by torchrun or the `deepspeed` launcher."""

import os
from typing import Literal, NamedTuple

from fastgpt.config import Config
from fastgpt.errors import UserError


class Launch(NamedTuple):
    """Who this process is, as its launcher says in the environment (torchrun and `deepspeed` set the same names)."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int

    @classmethod
    def from_environment(cls) -> "Launch | None":
        """What the launcher said, or None where no launcher started this process."""
        if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
            return None
        world_size = _number("WORLD_SIZE", least=1)
        # the `deepspeed` launcher says LOCAL_SIZE, torchrun LOCAL_WORLD_SIZE
        local = next((name for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE") if name in os.environ), None)
        return cls(
            rank=_number("RANK"),
            world_size=world_size,
            local_rank=_number("LOCAL_RANK") if "LOCAL_RANK" in os.environ else 0,
            local_world_size=_number(local, least=1) if local else world_size,
        )


def _number(variable: str, least: int = 0) -> int:
    """An environment variable that a launcher sets."""
    text = os.environ[variable]
    if not text.isdecimal() or int(text) < least:
        raise UserError(f"the environment variable {variable} must be an integer of at least {least}, not '{text}'")
    return int(text)


ALONE = Launch(rank=0, world_size=1, local_rank=0, local_world_size=1)


def engine_kind(config: Config, launch: Launch | None) -> Literal["single", "deepspeed"]:
    """What `engine.kind` comes to: `auto` is DeepSpeed under a launcher, else a single process.

    Raises:
        UserError: the launch does not fit the settings.
    """
    world_size = launch.world_size if launch else 1
    if config.engine.kind == "single" and world_size > 1:
        raise UserError(
            f"engine.kind: single runs on one process, and a launcher started {world_size}; use engine.kind=deepspeed"
        )
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
    if config.engine.kind == "auto":
        return "deepspeed" if launch else "single"
    return config.engine.kind
