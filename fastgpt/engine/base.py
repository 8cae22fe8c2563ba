"""What every engine does: updates from batches, losses for evaluation, logits for samples, state to and from disk."""

import math
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fastgpt.config import Config
from fastgpt.data.source import RankBatch
from fastgpt.engine.host import to_host
from fastgpt.engine.ranks import Ranks
from fastgpt.model.seeds import fold

DROPOUT = 1  # what the run's seed is folded with for dropout masks


class Update(NamedTuple):
    """One update of the weights."""

    step: int  # counting from 1
    loss: float  # mean over the global batch, nats per token
    grad_norm: float  # global L2 norm before clipping; inf where the update was skipped
    learning_rate: float
    applied: bool  # False: gradients overflowed (fp16) or were not finite, the weights are as they were
    stop: bool = False  # a rank had been asked to end the run


class Pending:
    """An update that has been begun. The device may still be computing it: to read it waits."""

    def __init__(self, read: Callable[[], Update], *, done: bool) -> None:
        """Keep what makes the update known; `done` where that waits for nothing."""
        self._read = read
        self.done = done

    @cached_property
    def update(self) -> Update:
        """The update, computed. Every rank reads it, in the order of the updates."""
        return self._read()


class Engine(Protocol):
    """Turns batches into updates. Each method is collective: all ranks call it together."""

    ranks: Ranks
    step: int  # updates so far, skipped ones included

    def update(self, batch: RankBatch) -> Pending:
        """Begin one update from this rank's micro-batches."""

    def outputs(self, arguments: Mapping[str, Tensor], **options: Any) -> Tensor:
        """What the model's `forward` gives for these tensors and options on this rank, dropout off, without gradient.

        It lies on the engine's device, which may still be computing it.
        """

    def last_logits(self, tokens: Tensor) -> Tensor:
        """Logits (B, V) float32 on the CPU after the last of `tokens` (B, T), dropout off."""

    def model_state(self) -> dict[str, Tensor] | None:
        """The working weights by name, on rank 0's CPU; None elsewhere."""

    def write(self, folder: Path) -> None:
        """Write this rank's part of the training state."""

    def read(self, folder: Path) -> None:
        """Take up a training state, whatever engine and world size wrote it."""


def dropout_seed(config: Config, step: int, micro_batch: int) -> int:
    """The seed of one micro-batch's masks: by its place in the run, not by the rank that computes it."""
    return fold(config.train.seed, DROPOUT, step, micro_batch)


def evaluation_loss(engine: Engine, inputs: Tensor, targets: Tensor) -> float:
    """Summed loss (nats) of this rank's batch, dropout off; targets of -100 do not count."""
    return float(engine.outputs({"tokens": inputs, "targets": targets}, reduction="sum"))


def told(
    ranks: Ranks, step: int, losses: list[Tensor], norm: Tensor | float, learning_rate: float
) -> Callable[[], Update]:
    """Begin to bring what an update has to tell to the host; what comes back waits for that, and for nothing later.

    Args:
        ranks: of the run; all of them call this together.
        step: the update's number.
        losses: of this rank's micro-batches, scalars. Told is their mean over the global batch, to the same bits
            whatever the world size.
        norm: of the gradient, the same on all ranks.
        learning_rate: of the update.
    """
    means = torch.stack([loss.detach().double() for loss in losses])
    gathered = ranks.begin_to_gather(torch.cat([means, means.new_full((1,), float(ranks.stop_asked))]))
    size = to_host(torch.as_tensor(norm).reshape(1))

    def read() -> Update:
        table, [found] = gathered().tolist(), size().tolist()
        applied, stop = math.isfinite(found), any(row[-1] for row in table)
        of_all = [loss for row in table for loss in row[:-1]]
        mean = math.fsum(of_all) / len(of_all)  # rounded once: the order does not count
        return Update(step, mean, found if applied else math.inf, learning_rate, applied, stop)

    return read
