"""Losses and logits of a model as it stands, dropout off: the same in every engine."""

import torch
from torch import Tensor, nn

from fastgpt.config import ModelConfig
from fastgpt.model.cache import CachedLogits


class Evaluating:
    """A model in evaluation mode, for a call at a time."""

    def __init__(self, model: nn.Module, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        """Ask a GPT of this config, or what wraps it, its parameters of this dtype and on this device."""
        self._model = model
        self._config = config
        self._dtype = dtype
        self._device = device
        self._sampler: CachedLogits | None = None

    def forget(self) -> None:
        """Take note that the weights change: what is kept of a text was computed by those of before."""
        self._sampler = None

    def loss(self, inputs: Tensor, targets: Tensor) -> float:
        """Summed loss (nats) of a batch, inputs and targets (B, T) int64; targets of -100 do not count."""
        with torch.no_grad():
            self._model.eval()
            return float(self._model(inputs.to(self._device), targets=targets.to(self._device), reduction="sum"))

    def last_logits(self, tokens: Tensor) -> Tensor:
        """Logits (B, V) float32 on the CPU after the last of `tokens` (B, T)."""
        self._model.eval()
        if self._sampler is None:
            self._sampler = CachedLogits(self._model, self._config, dtype=self._dtype, device=self._device)
        return self._sampler(tokens).float().cpu()
