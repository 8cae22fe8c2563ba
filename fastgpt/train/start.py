"""What a process of training sets up for itself before it builds a model."""

import logging
from typing import TypeVar

import torch

from fastgpt.config import Config
from fastgpt.engine.backend import ops_for
from fastgpt.engine.compiler import prepare_compiler
from fastgpt.engine.host import available_cores, prepare_host
from fastgpt.engine.precision import DTYPES, resolve_precision
from fastgpt.engine.ranks import Ranks
from fastgpt.finetune_config import FinetuneConfig

log = logging.getLogger(__name__)

C = TypeVar("C", Config, FinetuneConfig)


def set_up(config: C, device: torch.device, ranks: Ranks | None = None, *, threads: int | None = None) -> C:
    """Set the process up as the settings say.

    Args:
        config: the settings.
        device: what `engine.device` came to.
        ranks: of the run; None where there is one.
        threads: how many the user asks for now; a number in `config` may be that of a run which is gone on with.

    Returns:
        The settings with nothing left on `auto` that decides the numbers.

    Raises:
        UserError: a precision that the device does not have; blocks that cannot be compiled here.
    """
    ranks = ranks or Ranks()
    ops_for(config.kernels.backend, device)  # refused before anything that takes time
    share = max(1, len(available_cores()) // ranks.local_world_size)
    if not threads and config.engine.threads and config.engine.threads <= share:
        threads = config.engine.threads  # as the run was started; with more ranks on a host the cores are shared anew
    threads = prepare_host(device, threads, local_rank=ranks.local_rank, local_world_size=ranks.local_world_size)
    if config.engine.compile:
        prepare_compiler(device, ranks)
    # timed with these threads, and by one rank for all
    precision = ranks.on_first(lambda: resolve_precision(config.engine.precision, device))
    backend = _agreed(ops_for(config.kernels.backend, device, DTYPES[precision]).name, ranks)
    if backend == "native" and precision != "bf16":
        log.info("kernels.backend: native is for bf16 on a CPU; in %s its operations are those of torch", precision)
    tree = config.model_dump()
    tree["kernels"]["backend"] = backend
    tree["engine"] |= {"precision": precision, "threads": threads}
    return type(config).model_validate(tree)


def _agreed(backend: str, ranks: Ranks) -> str:
    """The backend of all ranks, whose hosts may differ in what they can run."""
    found = sorted(set(ranks.gather(backend)))
    if len(found) == 1:
        return backend
    log.info("kernels.backend: torch, because the hosts of the ranks run different kernels: %s", ", ".join(found))
    return "torch"
