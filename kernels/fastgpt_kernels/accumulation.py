"""Sums in a wider dtype than their terms: gradients in 16 bits that are added to float32."""

import torch
from torch import Tensor

# elements of a piece, for each thread of a CPU: a piece and its widened copy stay in the cache
PIECE = 2**19


def accumulate(total: Tensor, x: Tensor) -> Tensor:
    """total += x, in the dtype of the total, which is returned.

    The numbers are those of `total.add_(x)`. On a CPU PyTorch takes seven times as long as memory would for large
    tensors of different dtypes, but not for small ones; here a piece of x is widened before it is added.

    Args:
        total: any shape and floating-point dtype; changed in place.
        x: of its shape, on its device.
    """
    size = PIECE * torch.get_num_threads()
    alike = total.dtype == x.dtype or total.device.type != "cpu" or x.numel() <= size
    if alike or total.shape != x.shape or not (total.is_contiguous() and x.is_contiguous()):
        return total.add_(x)
    sums, terms = total.view(-1), x.view(-1)
    buffer = torch.empty(size, dtype=total.dtype)
    for start in range(0, len(terms), size):
        piece = terms[start : start + size]
        sums[start : start + size].add_(buffer[: len(piece)].copy_(piece))
    return total
