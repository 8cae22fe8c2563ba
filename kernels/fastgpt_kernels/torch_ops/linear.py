"""A linear map with a bias, by PyTorch."""

import torch.nn.functional as F
from torch import Tensor

from fastgpt_kernels import checks
from fastgpt_kernels.checks import REMEDY
from fastgpt_kernels.errors import raise_if_any


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x (..., K) weight (N, K)^T + bias (N,), (..., N), by `torch.nn.functional.linear`."""
    raise_if_any(checks.against_linear(x, weight, bias), "linear", "torch", REMEDY)
    return F.linear(x, weight, bias)
