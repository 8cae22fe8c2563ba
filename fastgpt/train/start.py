"""What a process of training sets up for itself before it builds a model."""

import os

import torch
from fastgpt_kernels import load_ops

from fastgpt.config import Config
from fastgpt.engine.precision import resolve_precision


def set_up(config: Config, device: torch.device, *, threads: int | None = None, local_world_size: int = 1) -> Config:
    """Set PyTorch up as the settings say.

    Args:
        config: the settings.
        device: what `engine.device` came to.
        threads: how many the user asks for now; a number in `config` may be that of a run which is gone on with.
        local_world_size: ranks on this host, which share its cores.

    Returns:
        The settings with nothing left on `auto` that decides the numbers.

    Raises:
        UserError: a precision that the device does not have.
    """
    backend = load_ops(config.kernels.backend).name
    precision = resolve_precision(config.engine.precision, device)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = max(1, cores // local_world_size)
    chosen = threads or share
    if not threads and config.engine.threads and config.engine.threads <= share:
        chosen = config.engine.threads  # as the run was started; with more ranks on a host the cores are shared anew
    torch.set_num_threads(chosen)
    tree = config.model_dump()
    tree["kernels"]["backend"] = backend
    tree["engine"] |= {"precision": precision, "threads": chosen}
    return Config.model_validate(tree)
