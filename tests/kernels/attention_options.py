"""What attention may be asked for, for tests of more than one backend."""

from typing import Any

import torch
from torch import Tensor

P, SEED = 0.25, 2**62 + 12345


def ids_of(B: int, T: int) -> Tensor:
    """Documents that come back after others, differently in each sequence."""
    return (torch.arange(T)[None] // 19 + torch.arange(B)[:, None]) % 3


OPTIONS: dict[str, Any] = {
    "plain": lambda B, T: {},
    "scale": lambda B, T: {"scale": 0.3},
    "window": lambda B, T: {"window": 21},
    "documents": lambda B, T: {"document_ids": ids_of(B, T)},
    "dropout": lambda B, T: {"dropout_p": P, "seed": SEED},
    "all": lambda B, T: {"window": 50, "document_ids": ids_of(B, T), "dropout_p": P, "seed": SEED},
}
