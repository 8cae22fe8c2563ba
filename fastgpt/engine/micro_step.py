"""Forward and backward of one micro-batch: what an update is made of."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from fastgpt.data.source import MicroBatch
from fastgpt.engine.host import to_device
from fastgpt.engine.main_gradients import MainGradients
from fastgpt.engine.phases import Phases, unobserved
from fastgpt.model.language_model import LanguageModel


class MicroStep:
    """Adds the gradient of one micro-batch to the main gradients."""

    def __init__(
        self, model: LanguageModel, gradients: MainGradients, device: torch.device, *, checkpoint_activations: bool
    ) -> None:
        """Differentiate a model on its device; with `checkpoint_activations` it recomputes them."""
        self.phases: Phases = unobserved
        self.model = model
        self.gradients = gradients
        self.device = device
        self.frozen_levels = 0  # of the coming update
        self._checkpoint_activations = checkpoint_activations

    def start_update(self) -> None:
        """Is called before the first micro-batch of an update."""

    def __call__(self, part: MicroBatch, seed: int, factor: float) -> Tensor:
        """The mean loss of a micro-batch, a scalar on the device, which may still be computing it.

        Args:
            part: the micro-batch.
            seed: of the dropout masks.
            factor: what the loss counts for: a loss scale, over the number of micro-batches.
        """
        with self.phases("data"):
            arguments = arguments_of(part, self.device)
        return self.differentiate(arguments, seed, factor)

    def differentiate(self, arguments: Mapping[str, Tensor], seed: int | Tensor, factor: float | Tensor) -> Tensor:
        """The same, of arguments on the device; seed may be the model's table of seeds, factor one float32, there."""
        self.model.train()
        with self.phases("forward"):
            loss: Tensor = self.model(
                **arguments,
                dropout_seed=seed,
                checkpoint_activations=self._checkpoint_activations,
                loss_gradient=factor,
                frozen_levels=self.frozen_levels,
            )
        with self.phases("backward"):
            (loss * factor).backward()  # type: ignore[no-untyped-call]
            self.gradients.move()
        return loss.detach()


def arguments_of(part: MicroBatch, device: torch.device) -> dict[str, Tensor]:
    """What the model's `forward` takes of a micro-batch, on the device."""
    if isinstance(part, np.ndarray):
        return foretold(to_device(part, device))
    return {name: to_device(values, device) for name, values in part.items()}


def foretold(windows: Tensor) -> dict[str, Tensor]:
    """Windows (B, T + 1) of a text as arguments: each token is to foretell the next."""
    return {"tokens": windows[:, :-1], "targets": windows[:, 1:]}
