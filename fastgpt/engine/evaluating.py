"""What a model gives as it stands, dropout off: the same in every engine."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastgpt.config import ModelConfig
from fastgpt.model.cache import cached_logits


class Evaluating:
    """A model in evaluation mode, for a call at a time."""

    def __init__(self, model: nn.Module, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        """Ask a model of this config, or what wraps it, its parameters of this dtype and on this device."""
        self._model = model
        self._config = config
        self._dtype = dtype
        self._device = device
        self._sampler: Callable[[Tensor], Tensor] | None = None

    def forget(self) -> None:
        """Take note that the weights change: what is kept of a text was computed by those of before."""
        self._sampler = None

    def outputs(self, arguments: Mapping[str, Tensor], **options: Any) -> Tensor:
        """What the model's `forward` gives for tensors and options, without gradient, on the device."""
        with torch.no_grad():
            self._model.eval()
            given: Tensor = self._model(**{name: x.to(self._device) for name, x in arguments.items()}, **options)
            return given

    def last_logits(self, tokens: Tensor) -> Tensor:
        """Logits (B, V) float32 on the CPU after the last of `tokens` (B, T)."""
        self._model.eval()
        if self._sampler is None:
            self._sampler = cached_logits(self._model, self._config, dtype=self._dtype, device=self._device)
        return self._sampler(tokens).float().cpu()
