"""Forward and backward of one micro-batch: what an update is made of."""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastgpt.engine.host import to_device
from fastgpt.engine.main_gradients import MainGradients
from fastgpt.engine.phases import Phases, unobserved
from fastgpt.model.gpt import GPT


class MicroStep:
    """Adds the gradient of one micro-batch to the main gradients."""

    def __init__(
        self, model: GPT, gradients: MainGradients, device: torch.device, *, checkpoint_activations: bool
    ) -> None:
        """Differentiate a model on its device; with `checkpoint_activations` it recomputes them."""
        self.phases: Phases = unobserved
        self.model = model
        self.gradients = gradients
        self.device = device
        self._checkpoint_activations = checkpoint_activations

    def start_update(self) -> None:
        """Is called before the first micro-batch of an update."""

    def __call__(self, tokens: npt.NDArray[np.int64], seed: int, factor: float) -> Tensor:
        """The mean loss of a micro-batch, a scalar on the device, which may still be computing it.

        Args:
            tokens: (B, T + 1).
            seed: of the dropout masks.
            factor: what the loss counts for: a loss scale, over the number of micro-batches.
        """
        with self.phases("data"):
            x = to_device(tokens, self.device)
        return self.differentiate(x, seed, factor)

    def differentiate(self, x: Tensor, seed: int | Tensor, factor: float | Tensor) -> Tensor:
        """The same, of tokens on the device; seed may be the model's table of seeds, factor one float32, there too."""
        self.model.train()
        with self.phases("forward"):
            loss: Tensor = self.model(
                x[:, :-1],
                targets=x[:, 1:],
                dropout_seed=seed,
                checkpoint_activations=self._checkpoint_activations,
                loss_gradient=factor,
            )
        with self.phases("backward"):
            (loss * factor).backward()  # type: ignore[no-untyped-call]
            self.gradients.move()
        return loss.detach()
