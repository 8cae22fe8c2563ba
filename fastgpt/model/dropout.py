"""Where a layer's dropout masks come from: seeds handed down with the call, never a global generator.

A recomputed forward (activation checkpointing) and another rank therefore draw the same masks. The seeds are tensors,
so that a compiled block or a captured graph draws the masks of other seeds without being made anew.
"""

from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from fastgpt.model.seeds import fold


class Site(IntEnum):
    """The places in the model that drop."""

    EMBEDDING = 0
    ATTENTION_WEIGHTS = 1
    ATTENTION_OUTPUT = 2
    MLP_OUTPUT = 3
    LSTM_OUTPUT = 3  # of a layer without an MLP


class Masks(NamedTuple):
    """The dropout of one layer in one forward pass; p = 0 keeps everything."""

    p: float
    seeds: Tensor | None  # (sites,) int64, on the layer's device; None where p is 0
    entering: Tensor | None = None  # the seed at the MLP output of the layer before, whose branch may still be open

    def seed_at(self, site: Site) -> Tensor | None:
        """The seed of the mask at a site, one int64 unlike that of any other site or layer."""
        return None if self.seeds is None else self.seeds[site]


def masks_of_layers(p: float, seeds: Tensor | None, layers: int) -> list[Masks]:
    """The dropout of each layer, by the table of `dropout_seeds` on the layers' device; None where p is 0."""
    if seeds is None:
        return [Masks(p, None)] * layers
    first = Masks(p, seeds[0])
    return [first, *(Masks(p, seeds[i], seeds[i - 1, Site.MLP_OUTPUT]) for i in range(1, layers))]


def dropout_seeds(seed: int, layers: int) -> Tensor:
    """The seeds of all masks of a forward pass: (layers, sites) int64 on the CPU. The embedding drops with layer 0."""
    return torch.tensor([[fold(seed, layer, site) for site in Site] for layer in range(layers)], dtype=torch.int64)
