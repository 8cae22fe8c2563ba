"""What an engine keeps from one update to the next, and what its process takes of the machine."""

import os
import resource
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor


def resident_bytes(engine: Any) -> dict[str, int]:
    """Bytes of this rank's weights, and of its masters and moments: of either engine, at any ZeRO stage.

    In fp32 weights can be the masters themselves: they count as weights.
    """
    weights = [p.data for p in engine._weights.values()]
    # of a parameter that ZeRO-3 has sharded, this rank's part; gathered, it has the whole as well
    weights += [p.ds_tensor.data for p in engine._weights.values() if hasattr(p, "ds_tensor")]
    layout = getattr(engine, "_layout", None)
    fragments = layout.fragments() if layout else engine._fragments()
    optimizer = layout.optimizer if layout else engine._optimizer
    masters = {id(piece.master): piece.master for piece in fragments}.values()
    moments = [value for master in masters for value in optimizer.state[master].values() if isinstance(value, Tensor)]
    held = storages(weights)
    others = storages([*masters, *moments])
    return {
        "weights": sum(held.values()),
        "optimizer": sum(size for address, size in others.items() if address not in held),
    }


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Bytes by address: views of one tensor have it in common."""
    found = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    found.pop(0, None)  # what was freed
    return found


def resident_set() -> tuple[int, int]:
    """Bytes of this process in the machine's memory: now, and at most so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    try:
        now = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # not Linux
        now = most
    return now, max(now, most)  # the system adds up the two at different moments
