"""Many tensors in one launch: tables of their addresses and of their chunks, on their device.

A kernel for one tensor at a time costs a launch for each of hundreds. Instead each program looks up which chunk of
which tensor is its own, and turns the address that it finds into a pointer. A table is copied to the device once for
each set of tensors, from pinned memory and without waiting for the device.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache
from typing import Generic, TypeVar

import torch
from torch import Tensor

CHUNK = 8_192  # elements of a program
KEPT = 16  # sets of tensors whose tables are kept

Tables = TypeVar("Tables")


class TableCache(Generic[Tables]):
    """The tables of the sets of tensors that were used last.

    A table that a CUDA graph was captured with is kept for good: its replays read it.
    """

    def __init__(self) -> None:
        self._recent: OrderedDict[Hashable, Tables] = OrderedDict()
        self._captured: dict[Hashable, Tables] = {}

    def get(self, key: Hashable, build: Callable[[], Tables]) -> Tables:
        """The tables of a key, which names all that is in them.

        Raises:
            RuntimeError: they would have to be copied to the device while a CUDA graph is being captured.
        """
        capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
        tables = self._captured.get(key) or self._recent.get(key)
        if tables is None:
            if capturing:
                raise RuntimeError(
                    "these tensors are new, and their addresses cannot be copied to the device during the capture of a "
                    "CUDA graph: make the same call once with the same tensors before the capture (a gradient that is "
                    "not contiguous is copied, and new, in every call)"
                )
            tables = build()
        if capturing:
            self._captured[key] = tables
        self._recent[key] = tables
        self._recent.move_to_end(key)
        if len(self._recent) > KEPT:
            self._recent.popitem(last=False)
        return tables


def to_device(table: Tensor, device: torch.device) -> Tensor:
    """A table on a device, without waiting for it."""
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table.to(device)


@lru_cache(maxsize=KEPT)
def chunk_table(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """(chunks, 2) int32: the tensor that each chunk is of, and its number there; in the order of the tensors."""
    counts = torch.tensor([-(-size // CHUNK) for size in sizes], dtype=torch.int64, device="cpu")
    tensor = torch.repeat_interleave(torch.arange(len(sizes), device="cpu"), counts)
    first = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    return to_device(torch.stack([tensor, torch.arange(len(tensor), device="cpu") - first], 1).int(), device)


def aligned(addresses: Sequence[int]) -> bool:
    """Whether all tensors start where sixteen bytes can be loaded at once."""
    return all(address % 16 == 0 for address in addresses)
