"""An optimizer's fp32 state as fragments of named parameters, and the way of fragments to and from disk.

Every engine keeps its master weights in fp32 tensors that are, or contain, pieces of flattened parameters. Once it
has said which pieces lie where (`Fragment`), saving and loading are the same for all.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastgpt.checkpoint.slices import Slice, SliceReader, write_slices
from fastgpt.engine.precision import LossScale
from fastgpt.errors import UserError

MOMENTS = ("exp_avg", "exp_avg_sq")


class Fragment(NamedTuple):
    """Elements [start, start + length) of a flattened parameter, at [offset, offset + length) of a master tensor."""

    parameter: str
    start: int
    length: int
    master: Tensor  # float32, contiguous; the key of the optimizer's state
    offset: int
    written: bool = True  # False where another rank holds the same elements and writes them


class Progress(NamedTuple):
    """Where an engine stands, beside its tensors."""

    step: int  # updates, skipped ones included
    adam_step: int  # updates applied, Adam's t
    scale: float
    clean: int


def write_state(
    folder: Path, rank: int, fragments: Iterable[Fragment], optimizer: Optimizer, progress: Progress
) -> None:
    """Write this rank's fragments, and on rank 0 where the engine stands."""
    write_slices(folder, rank, _slices(fragments, optimizer, progress))
    if rank == 0:
        (folder / "engine.json").write_text(json.dumps(progress._asdict()))


def _slices(fragments: Iterable[Fragment], optimizer: Optimizer, progress: Progress) -> Iterator[Slice]:
    """Masters and moments, one piece at a time: the next may displace this one in memory."""
    for piece in fragments:
        if not piece.written:
            continue
        tensors = {"master": piece.master.detach()}
        state = optimizer.state.get(piece.master)
        # moments appear at the first applied update; before it there is nothing to write
        if state and progress.adam_step:
            tensors |= {kind: state[kind] for kind in MOMENTS}
        for kind, tensor in tensors.items():
            values = tensor.reshape(-1)[piece.offset : piece.offset + piece.length]
            yield Slice(piece.parameter, kind, piece.start, values)


@torch.no_grad()
def read_state(folder: Path, fragments: Iterable[Fragment], optimizer: Optimizer) -> Progress:
    """Fill masters and moments from a training state, whatever layout wrote it.

    Raises:
        UserError: a parameter that the files do not hold whole, or that the model does not have.
    """
    try:
        progress = Progress(**json.loads((folder / "engine.json").read_text()))
    except (OSError, json.JSONDecodeError, TypeError) as problem:
        raise UserError(f"{folder / 'engine.json'}: not a training state: {problem}") from None
    reader = SliceReader(folder)
    optimizer.state.clear()
    for piece in fragments:
        targets = {"master": piece.master.detach()}
        if progress.adam_step:
            state = optimizer.state[piece.master]
            if not state:
                state["step"] = torch.tensor(float(progress.adam_step), device=_step_device(piece.master, optimizer))
                state |= {kind: torch.zeros_like(piece.master) for kind in MOMENTS}
            targets |= {kind: state[kind] for kind in MOMENTS}
        for kind, tensor in targets.items():
            part = tensor.view(-1)[piece.offset : piece.offset + piece.length]
            reader.read_into(part, piece.parameter, kind, piece.start)
    return progress


def _step_device(master: Tensor, optimizer: Optimizer) -> torch.device:
    """The fused AdamW wants its step count beside the weights, the others on the CPU."""
    return master.device if optimizer.defaults.get("fused") else torch.device("cpu")


def check_parameters(folder: Path, names: Sequence[str]) -> None:
    """Refuse a training state of another model.

    Raises:
        UserError: naming a parameter that only one of the two has.
    """
    stored = SliceReader(folder).parameters()
    for name in sorted(stored ^ set(names)):
        holder = "the checkpoint" if name in stored else "the model"
        raise UserError(f"{folder}: of another model: only {holder} has {name}")


def restored_scale(progress: Progress) -> LossScale:
    """The loss scale that a training state was written with."""
    return LossScale(progress.scale, progress.clean)
