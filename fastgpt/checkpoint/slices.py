"""Training state without a layout: fp32 slices of named tensors, whoever holds them.

Every rank writes the slices that it owns into one safetensors file, beside a JSON index that says which elements
of which parameter (flattened) each tensor is. A reader at any world size or ZeRO stage asks for the elements that
IT owns, and they are put together from whichever files hold them. No pickle.

    state-00000.safetensors   tensors "0", "1", ...   (length,) float32
    state-00000.json          [{"tensor": "0", "parameter": ..., "kind": "master", "start": 0, "stop": 768}, ...]
"""

import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastgpt.errors import UserError
from fastgpt.files import open_to_readers

KINDS = ("master", "exp_avg", "exp_avg_sq")


class Slice(NamedTuple):
    """Elements [start, start + len(values)) of one flattened state tensor of one parameter."""

    parameter: str
    kind: str
    start: int
    values: Tensor  # (length,) float32


def write_slices(folder: Path, rank: int, slices: Iterable[Slice]) -> None:
    """Write what this rank owns: one safetensors file and its index."""
    tensors: dict[str, Tensor] = {}
    index = []
    for number, piece in enumerate(slices):
        key = str(number)
        # a copy, because safetensors refuses tensors that share memory, as views of one flat partition do
        tensors[key] = piece.values.detach().to("cpu", torch.float32, copy=True).contiguous()
        stop = piece.start + piece.values.numel()
        index.append(
            {"tensor": key, "parameter": piece.parameter, "kind": piece.kind, "start": piece.start, "stop": stop}
        )
    path = folder / f"state-{rank:05d}.safetensors"
    save_file(tensors, path)
    open_to_readers(path)
    (folder / f"state-{rank:05d}.json").write_text(json.dumps(index))


class _Entry(NamedTuple):
    start: int
    stop: int
    file: Path
    tensor: str


class SliceReader:
    """Reads any elements of any state tensor from the files that `write_slices` made."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._entries: dict[tuple[str, str], list[_Entry]] = defaultdict(list)
        indexes = sorted(folder.glob("state-*.json"))
        if not indexes:
            raise UserError(f"{folder}: holds no training state (state-*.json)")
        for path in indexes:
            try:
                for row in json.loads(path.read_text()):
                    entry = _Entry(row["start"], row["stop"], path.with_suffix(".safetensors"), row["tensor"])
                    self._entries[row["parameter"], row["kind"]].append(entry)
            except (json.JSONDecodeError, KeyError, TypeError) as problem:
                raise UserError(f"{path}: not a training state's index: {problem}") from None
        for entries in self._entries.values():
            entries.sort()

    def parameters(self) -> set[str]:
        """Names of all parameters in the files."""
        return {parameter for parameter, _ in self._entries}

    def read_into(self, target: Tensor, parameter: str, kind: str, start: int) -> None:
        """Fill `target` (length,) with elements [start, start + length) of a state tensor.

        Raises:
            UserError: some of the elements are in no file, or a file is damaged.
        """
        stop = start + target.numel()
        position = start
        for entry in self._entries.get((parameter, kind), ()):
            low, high = max(position, entry.start), min(stop, entry.stop)
            if low != position or low >= high:
                continue
            try:
                with safe_open(entry.file, framework="pt") as file:
                    values = file.get_slice(entry.tensor)[low - entry.start : high - entry.start]
            except (OSError, SafetensorError) as problem:
                raise UserError(f"{entry.file}: cannot be read: {problem}") from None
            target[low - start : high - start].copy_(values)
            position = high
        if position < stop:
            raise UserError(
                f"{self._folder}: elements {position} to {stop} of {parameter} ({kind}) are in none of its files"
            )
