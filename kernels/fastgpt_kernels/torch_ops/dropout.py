"""Dropout from a seed, alone and added to a residual, by PyTorch."""

from torch import Tensor

from fastgpt_kernels import checks
from fastgpt_kernels.checks import REMEDY, Seed
from fastgpt_kernels.errors import raise_if_any
from fastgpt_kernels.seeds import seed_tensor, seeded_dropout


def dropout(x: Tensor, p: float, seed: Seed | None) -> Tensor:
    """x / (1 - p) for the elements that the seed keeps, each with probability 1 - p, and 0 for the others.

    The mask depends on the seed, the shape and the device alone, and leaves PyTorch's global generators untouched.
    """
    raise_if_any(checks.against_dropout(p, seed), "dropout", "torch", REMEDY)
    return x if p == 0.0 or seed is None else seeded_dropout(x, p, seed_tensor(seed, x.device))


def dropout_add(x: Tensor, residual: Tensor, p: float, seed: Seed | None) -> Tensor:
    """residual + dropout(x), in the dtype of residual."""
    reasons = checks.against_dropout(p, seed) + checks.against_residual(x, residual)
    raise_if_any(reasons, "dropout_add", "torch", REMEDY)
    return residual + dropout(x, p, seed)
