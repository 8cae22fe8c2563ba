"""One process among those of a run: its device, its place among the ranks, and what it is told when one is lost."""

import logging
from collections.abc import Callable
from typing import Literal, TypeVar

import torch
from fastgpt_kernels import UnsupportedInput

from fastgpt.config import Config, EngineConfig
from fastgpt.engine.lost import told_of_lost_ranks
from fastgpt.engine.precision import resolve_device
from fastgpt.engine.ranks import Ranks, join, leave
from fastgpt.errors import SharedError, UserError
from fastgpt.launchers import ALONE, Launch
from fastgpt.train.runner import follow_runner
from fastgpt.wording import Places

log = logging.getLogger(__name__)

T = TypeVar("T")


def as_rank(
    engine: EngineConfig,
    kind: Literal["single", "deepspeed"],
    launch: Launch | None,
    work: Callable[[torch.device, Ranks], T],
    *,
    check: Callable[[torch.device, Launch], None] | None = None,
) -> T:
    """What `work` gives, done as one of the run's ranks on this process's device.

    `check` is called before the ranks meet.

    Raises:
        UserError: the device or the kernels cannot be used; the ranks do not find each other.
        RankLost: another rank is gone.
    """
    launch = launch or ALONE
    if ":" in engine.device and launch.local_world_size > 1:
        raise SharedError(
            f"engine.device: {engine.device} would put all {launch.local_world_size} ranks on one GPU; use cuda"
        )
    device = resolve_device(engine.device, launch.gpu)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # Triton launches on the current device
    if check:
        check(device, launch)
    if launch.launcher == "deepspeed":
        follow_runner()
    ranks = join(launch, device, engine.timeout_minutes) if kind == "deepspeed" else Ranks()
    try:
        with told_of_lost_ranks():
            return work(device, ranks)
    except UnsupportedInput as problem:
        raise UserError(f"kernels.backend: {' '.join(str(problem).split())}") from problem
    finally:
        leave()


def check_deepspeed_keys(
    config: Config, kind: Literal["single", "deepspeed"], device: torch.device, local_rank: int, places: Places
) -> None:
    """Check `engine.deepspeed` where it counts; every rank finds the same."""
    if kind == "single":
        if config.engine.deepspeed:
            log.warning("engine.deepspeed is not used: this run is a single process without DeepSpeed")
        return
    from fastgpt.engine.zero import check_deepspeed

    try:
        check_deepspeed(config, device, local_rank, places.of)
    except UserError as problem:
        raise SharedError(str(problem)) from None
