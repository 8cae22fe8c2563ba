"""From the name of a backend to its functions."""

import difflib
import functools
import importlib.util
import logging
from types import ModuleType
from typing import Literal, NamedTuple, Protocol, TypeAlias, get_args

import torch
from torch import Tensor

from fastgpt_kernels import reference, torch_ops
from fastgpt_kernels.checks import Approximate, Seed
from fastgpt_kernels.errors import UnsupportedInput

Backend: TypeAlias = Literal["auto", "triton", "torch", "reference"]

logger = logging.getLogger("fastgpt_kernels")


class CausalAttention(Protocol):
    """qkv (B, T, 3, H, D) -> (B, T, H, D): softmax(scale Q K^T) V, position i over positions j <= i."""

    def __call__(  # noqa: D102
        self, qkv: Tensor, *, scale: float | None = None, dropout_p: float = 0.0, seed: Seed | None = None
    ) -> Tensor: ...


class LayerNorm(Protocol):
    """x (..., N), weight (N,), bias (N,) -> (..., N)."""

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor: ...  # noqa: D102


class Gelu(Protocol):
    """x (any shape) -> x Phi(x), or its tanh form."""

    def __call__(self, x: Tensor, approximate: Approximate = "tanh") -> Tensor: ...  # noqa: D102


class BiasGelu(Protocol):
    """x (..., N), bias (N,) -> GELU(x + bias)."""

    def __call__(self, x: Tensor, bias: Tensor, approximate: Approximate = "tanh") -> Tensor: ...  # noqa: D102


class Dropout(Protocol):
    """x (any shape) -> x / (1 - p) with probability 1 - p, else 0; the same seed keeps the same elements."""

    def __call__(self, x: Tensor, p: float, seed: Seed | None) -> Tensor: ...  # noqa: D102


class Ops(NamedTuple):
    """The operations of one backend: plain differentiable functions of tensors."""

    name: str  # the backend: "triton", "torch" or "reference"
    causal_attention: CausalAttention
    layer_norm: LayerNorm
    gelu: Gelu
    bias_gelu: BiasGelu
    dropout: Dropout


def load_ops(backend: Backend = "auto") -> Ops:
    """The operations of a backend.

    Args:
        backend: "triton" (a GPU, or the CPU under TRITON_INTERPRET=1), "torch" (PyTorch's built-ins, anywhere),
            "reference" (the mathematics written out, slow), or "auto": triton where PyTorch sees a GPU, else torch.
            What "auto" chose is logged once, at level INFO of the logger "fastgpt_kernels".

    Raises:
        UnsupportedInput: the backend is unknown, or cannot run here.
    """
    if backend not in get_args(Backend):
        raise _unknown(backend)
    if backend == "auto":
        backend = _automatic_backend()
    if backend == "triton":
        return _triton_ops()
    return _ops_of(backend, torch_ops if backend == "torch" else reference)


def _ops_of(name: str, module: ModuleType) -> Ops:
    return Ops(name, *(getattr(module, operation) for operation in Ops._fields[1:]))


@functools.cache
def _automatic_backend() -> Backend:
    if torch.cuda.is_available() and importlib.util.find_spec("triton"):
        logger.info("kernels: triton, because PyTorch sees a GPU (%s)", torch.cuda.get_device_name())
        return "triton"
    missing = "Triton is not installed" if torch.cuda.is_available() else "PyTorch sees no GPU"
    logger.info("kernels: torch, because %s", missing)
    return "torch"


@functools.cache
def _triton_ops() -> Ops:
    remedy = (
        "Set kernels.backend to 'torch' to run without Triton, or the environment variable TRITON_INTERPRET=1 before "
        "the start to run the kernels, slowly, in Triton's interpreter."
    )
    problem = "The backend 'triton' cannot run here"
    if not importlib.util.find_spec("triton"):
        raise UnsupportedInput(problem, ["Triton is not installed"], remedy)

    from fastgpt_kernels import attention, dropout, gelu, launch, layernorm

    if not launch.INTERPRETED and not torch.cuda.is_available():
        raise UnsupportedInput(problem, ["PyTorch sees no GPU", "TRITON_INTERPRET=1 was not set"], remedy)
    return Ops(
        "triton",
        causal_attention=attention.causal_attention,
        layer_norm=layernorm.layer_norm,
        gelu=gelu.gelu,
        bias_gelu=gelu.bias_gelu,
        dropout=dropout.dropout,
    )


def _unknown(backend: str) -> UnsupportedInput:
    known = get_args(Backend)
    near = difflib.get_close_matches(backend, known, n=1)
    remedy = f"Did you mean {near[0]!r}?" if near else "Set kernels.backend to 'auto' to choose by the hardware."
    return UnsupportedInput(f"{backend!r} is not a kernel backend", ["allowed: " + ", ".join(map(repr, known))], remedy)
