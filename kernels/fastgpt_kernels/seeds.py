"""Seeds, and the dropout masks that PyTorch draws from them without touching its global generators."""

import torch
from torch import Tensor

from fastgpt_kernels.checks import Seed


def seed_tensor(seed: Seed, device: torch.device) -> Tensor:
    """The seed as an int64 tensor of one element on a device; written there by a fill, with no copy from the host."""
    if isinstance(seed, Tensor):
        return seed.detach().reshape(1).to(device)
    return torch.full((1,), seed, dtype=torch.int64, device=device)


@torch.library.custom_op("fastgpt::keep_mask", mutates_args=())
def keep_mask(like: Tensor, seed: Tensor, p: float) -> Tensor:
    """A boolean mask in the shape of `like`, each element true with probability 1 - p, from the seed alone.

    The same seed, shape and device give the same mask. Reading the seed waits for the device.
    """
    # PyTorch's generator for CPUs takes 32 bits of a seed: let all 64 decide them (Fibonacci hashing, Knuth 3, 6.4)
    hashed = int(seed.item()) * 0x9E3779B97F4A7C15 % 2**64 >> 32
    generator = torch.Generator(device=like.device).manual_seed(hashed)
    mask = torch.empty(like.shape, dtype=torch.bool, device=like.device)
    return mask.bernoulli_(1.0 - p, generator=generator)


@keep_mask.register_fake
def _(like: Tensor, seed: Tensor, p: float) -> Tensor:
    return torch.empty(like.shape, dtype=torch.bool, device=like.device)


def seeded_dropout(x: Tensor, p: float, seed: Tensor) -> Tensor:
    """x / (1 - p) where the seed's mask keeps it, 0 elsewhere; autograd keeps the mask, one byte an element."""
    return torch.where(keep_mask(x.detach(), seed, p), x / (1.0 - p), 0.0)
