"""Training states on disk, as the programs of these tests write and compare them."""

import itertools
from pathlib import Path

import torch
from torch import Tensor

from fastgpt.checkpoint.slices import KINDS, SliceReader
from fastgpt.engine.base import Engine
from fastgpt.engine.ranks import Ranks

Shapes = dict[str, tuple[int, ...]]


def put(engine: Engine, folder: Path, ranks: Ranks) -> None:
    """Every rank's part of the state, whole when this returns."""
    folder.mkdir(parents=True, exist_ok=True)
    ranks.barrier()
    engine.write(folder)
    ranks.barrier()


def state_in(folder: Path, shapes: Shapes, kinds: tuple[str, ...] = KINDS) -> dict[str, Tensor]:
    """Masters and moments, put together; what a file lacks raises."""
    reader, found = SliceReader(folder), {}
    for (name, shape), kind in itertools.product(shapes.items(), kinds):
        found[f"{kind} of {name}"] = torch.full(shape, torch.nan)
        reader.read_into(found[f"{kind} of {name}"].view(-1), name, kind, 0)
    return found


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    """What is not the same in every bit."""
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name].view(torch.uint8), other[name].view(torch.uint8))]
