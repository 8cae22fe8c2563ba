"""Where a layer's dropout masks come from: a seed handed down with the call, never a global generator.

A recomputed forward (activation checkpointing) and another rank therefore draw the same masks.
"""

from enum import IntEnum
from typing import NamedTuple

from fastgpt.model.seeds import fold


class Site(IntEnum):
    """The places in the model that drop."""

    EMBEDDING = 0
    ATTENTION_WEIGHTS = 1
    ATTENTION_OUTPUT = 2
    MLP_OUTPUT = 3


class Masks(NamedTuple):
    """The dropout of one layer in one forward pass; p = 0 keeps everything."""

    p: float
    seed: int
    layer: int

    def seed_at(self, site: Site) -> int:
        """The seed of the mask at a site, unlike that of any other site or layer."""
        return fold(self.seed, self.layer, site)
