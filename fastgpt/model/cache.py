"""What is kept of tokens already read, so that the next token costs one position instead of the whole window."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastgpt.config import ModelConfig

SMALLEST = 64  # positions that a cache of `CachedLogits` starts with at least


class Cache:
    """What a model keeps of the tokens before those that it is given."""

    length: int  # tokens kept


class LayerCache(NamedTuple):
    """One layer's part of a `KeyValueCache` during a forward pass."""

    keys: Tensor  # (B, H, T_max, D)
    values: Tensor  # (B, H, T_max, D)
    lengths: Tensor  # (B,) int64: positions in use once the tokens of this pass are in
    start: int  # positions in use before this pass

    def append(self, qkv: Tensor) -> None:
        """Keep the keys and values of new tokens, qkv (B, T, 3, H, D)."""
        stop = self.start + qkv.shape[1]
        _, k, v = qkv.detach().permute(2, 0, 3, 1, 4).unbind(0)  # each (B, H, T, D)
        self.keys[:, :, self.start : stop] = k
        self.values[:, :, self.start : stop] = v

    def seen(self, window: int | None) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values and lengths that one more token reads, which is appended already: all, or a window's."""
        if window is None or self.start < window:
            return self.keys, self.values, self.lengths
        first = self.start + 1 - window
        return self.keys[:, :, first:], self.values[:, :, first:], self.lengths - first


class KeyValueCache(Cache):
    """Room for the keys and values of `capacity` tokens of each of `batch` texts, in every layer of a model.

    `model(tokens, cache=cache)` reads tokens that follow those of the cache and adds them: any number to an empty
    cache, then one at a time. `length` is how many it holds; lowering it forgets the last ones.
    """

    def __init__(
        self, config: ModelConfig, batch: int, capacity: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        size = config.n_embd // config.heads
        # zeros: a masked product over positions not in use must not meet NaN
        self._kept = torch.zeros((config.n_layer, 2, batch, config.heads, capacity, size), dtype=dtype, device=device)
        self._lengths = torch.zeros(batch, dtype=torch.int64, device=device)
        self.capacity = capacity
        self.length = 0

    def layers(self, tokens: int) -> list[LayerCache]:
        """The parts of all layers, for a pass over so many new tokens."""
        self._lengths.fill_(self.length + tokens)
        return [LayerCache(kept[0], kept[1], self._lengths, self.length) for kept in self._kept]

    def take(self, other: "KeyValueCache") -> None:
        """Hold what a smaller cache holds."""
        self._kept[..., : other.length, :] = other._kept[..., : other.length, :]
        self.length = other.length


class LayerState(NamedTuple):
    """The state of one layer of LSTM units, which each pass replaces in place."""

    hidden: Tensor  # (1, B, units)
    cell: Tensor  # (1, B, units)


class LSTMState(Cache):
    """The state of an LSTM after `length` tokens of each of `batch` texts, at first zeros."""

    def __init__(self, config: ModelConfig, batch: int, *, dtype: torch.dtype, device: torch.device) -> None:
        zeros = torch.zeros((config.n_layer, 2, 1, batch, config.units), dtype=dtype, device=device)
        self.layers = [LayerState(hidden, cell) for hidden, cell in zeros]
        self.length = 0


def cached_logits(
    model: Callable[..., Tensor], config: ModelConfig, *, dtype: torch.dtype, device: torch.device
) -> Callable[[Tensor], Tensor]:
    """What `fastgpt.generate` asks for: tokens (B, T) int64 on the CPU to logits (B, V) after the last of them.

    A model of this config, in evaluation mode, is asked, its parameters of this dtype and on this device. The weights
    must stay as they are between two calls.
    """
    kind = CarriedLogits if config.kind == "lstm" else CachedLogits
    return kind(model, config, dtype=dtype, device=device)


class CarriedLogits:
    """The logits of `cached_logits` from an LSTM: its state is carried on where a text has grown.

    Any other text is read from its beginning, as is each window of one that has outgrown the context.
    """

    def __init__(
        self, model: Callable[..., Tensor], config: ModelConfig, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._model = model
        self._config = config
        self._dtype = dtype
        self._device = device
        self._state: LSTMState | None = None
        self._tokens = torch.empty((0, 0), dtype=torch.int64)  # (B, length of the state)

    @torch.no_grad()
    def __call__(self, tokens: Tensor) -> Tensor:
        """Tokens (B, T) int64 on the CPU, T at most the context, to logits (B, V)."""
        new = tokens[:, -1:]
        if self._state is None or not torch.equal(self._tokens, tokens[:, :-1]):
            self._state = LSTMState(self._config, len(tokens), dtype=self._dtype, device=self._device)
            new = tokens
        logits = self._model(new.to(self._device), cache=self._state, last_only=True)
        self._tokens = tokens
        return logits


class CachedLogits:
    """The logits of `cached_logits` from a GPT, for texts that grow by a token a call.

    Where all tokens but the last are those of an earlier call, or the first of them, the cache has the rest. A text as
    long as the context slides: its tokens change their positions, and each call computes the window anew.
    """

    def __init__(
        self, model: Callable[..., Tensor], config: ModelConfig, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._model = model
        self._config = config
        self._dtype = dtype
        self._device = device
        self._cache: KeyValueCache | None = None
        self._tokens = torch.empty((0, 0), dtype=torch.int64)  # (B, length of the cache)

    @torch.no_grad()
    def __call__(self, tokens: Tensor) -> Tensor:
        """Tokens (B, T) int64 on the CPU, T at most the context, to logits (B, V)."""
        batch, length = tokens.shape
        kept = length - 1
        if batch != len(self._tokens) or not torch.equal(self._tokens[:, :kept], tokens[:, :kept]):
            kept = 0
        if kept == 0 and length == self._config.context:
            return self._model(tokens.to(self._device), last_only=True)
        cache = self._room(batch, kept, length)
        logits = self._model(tokens[:, kept:].to(self._device), cache=cache, last_only=True)
        self._tokens = tokens
        return logits

    def _room(self, batch: int, kept: int, length: int) -> KeyValueCache:
        """The cache with the first `kept` tokens, and room for `length`; it doubles as the text grows."""
        cache = self._cache
        if cache is None or len(self._tokens) != batch or cache.capacity < length:
            capacity = min(max(SMALLEST, 2 * length), self._config.context)
            larger = KeyValueCache(self._config, batch, capacity, dtype=self._dtype, device=self._device)
            if cache is not None and kept:
                larger.take(cache)
            cache = self._cache = larger
        cache.length = kept
        return cache
