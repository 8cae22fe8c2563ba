"""The L2 norm of many tensors by PyTorch: float32 within chunks, float64 between them."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastgpt_kernels.optim_arguments import WORKING
from fastgpt_kernels.torch_ops.adamw import UPDATE_CHUNK

# so short that float32 sums of squares keep their digits
NORM_CHUNK = 1_024


def norm(xs: Sequence[Tensor]) -> Tensor:
    """The norm of chunks in float32, then of those norms in float64."""
    parts = []
    for x in xs:
        for piece in _widened(x.reshape(-1)):
            whole = piece.numel() // NORM_CHUNK * NORM_CHUNK
            if whole:
                parts.append(torch.linalg.vector_norm(piece[:whole].view(-1, NORM_CHUNK), dim=1).double())
            if whole < piece.numel():
                parts.append(torch.linalg.vector_norm(piece[whole:]).double().view(1))
    if not parts:
        return torch.zeros((), device=xs[0].device)
    norm: Tensor = torch.linalg.vector_norm(torch.cat(parts))
    # squares beyond float32's range: the way to float64 is slow on a CPU, but such gradients are rare
    if not 1e-15 < norm.item() < math.inf:
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(x.double()) for x in xs]))
    return norm.float()


def _widened(flat: Tensor) -> Iterator[Tensor]:
    """All of a tensor in float32 at least; 16 bits piece by piece, each in the cache and overwritten by the next."""
    if flat.dtype not in WORKING:
        yield flat
        return
    size = UPDATE_CHUNK * torch.get_num_threads()
    memory = torch.empty(min(size, flat.numel()), dtype=torch.float32, device=flat.device)
    for start in range(0, flat.numel(), size):
        piece = flat[start : start + size]
        yield memory[: piece.numel()].copy_(piece)
