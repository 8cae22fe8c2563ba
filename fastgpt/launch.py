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
        world_size = int(os.environ["WORLD_SIZE"])
        return cls(
            rank=int(os.environ["RANK"]),
            world_size=world_size,
            local_rank=int(os.environ.get("LOCAL_RANK", "0")),
            # the `deepspeed` launcher says LOCAL_SIZE, torchrun LOCAL_WORLD_SIZE
            local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", world_size))),
        )


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
    if config.micro_batches % world_size:
        unit = config.train.micro_batch_size * config.model.context * world_size
        nearest = max(1, round(config.train.batch_tokens / unit)) * unit
        raise UserError(
            f"train.batch_tokens: {config.train.batch_tokens} is {config.micro_batches} micro-batches, which cannot be "
            f"dealt evenly to {world_size} ranks; it must be a multiple of {unit}. The nearest is {nearest}"
        )
    if config.engine.kind == "auto":
        return "deepspeed" if launch else "single"
    return config.engine.kind
