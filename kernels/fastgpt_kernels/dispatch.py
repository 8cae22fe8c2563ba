"""From the name of a backend to its functions."""

import difflib
import functools
import importlib
import importlib.util
import logging
from types import ModuleType
from typing import Literal, TypeAlias, get_args

import torch

from fastgpt_kernels import reference, torch_ops
from fastgpt_kernels.compiler import leave_unloaded
from fastgpt_kernels.errors import UnsupportedInput
from fastgpt_kernels.ops import Ops

Backend: TypeAlias = Literal["auto", "triton", "native", "torch", "reference"]

# the file of each operation
TRITON_FILES = {
    "causal_attention": "attention",
    "decode_attention": "decode",
    "layer_norm": "layernorm",
    "add_layer_norm": "layernorm",
    "gelu": "gelu",
    "bias_gelu": "gelu",
    "linear": "torch_ops.linear",  # cuBLAS multiplies
    "linear_gelu": "linear_gelu",
    "embedding": "embedding",
    "dropout": "dropout",
    "dropout_add": "dropout",
    "logits": "torch_ops.logits",  # and here
    "cross_entropy": "cross_entropy",
    "linear_cross_entropy": "linear_cross_entropy",
}

logger = logging.getLogger("fastgpt_kernels")


def load_ops(backend: Backend = "auto") -> Ops:
    """The operations of a backend.

    Args:
        backend: "triton" (a GPU, or the CPU under TRITON_INTERPRET=1), "native" (C++ for bfloat16 on a CPU that
            multiplies it, compiled at first use), "torch" (PyTorch's built-ins, anywhere), "reference" (the mathematics
            written out, slow), or "auto": triton where PyTorch sees a GPU, else torch. What "auto" chose is logged
            once, at level INFO of the logger "fastgpt_kernels".

    Raises:
        UnsupportedInput: the backend is unknown, or cannot run here.
    """
    if backend not in get_args(Backend):
        raise _unknown(backend)
    if backend == "auto":
        backend = _automatic_backend()
    if backend == "triton":
        ops = _triton_ops()
    elif backend == "native":
        ops = _native_ops()
    else:
        ops = _ops_of("torch", torch_ops) if backend == "torch" else _ops_of("reference", reference)
    leave_unloaded()
    return ops


def _ops_of(name: Literal["native", "torch", "reference"], module: ModuleType) -> Ops:
    return Ops(name, *(getattr(module, operation) for operation in Ops._fields[1:]))


@functools.cache
def _automatic_backend() -> Backend:
    if torch.cuda.is_available() and importlib.util.find_spec("triton"):
        logger.info("kernels: triton, because PyTorch sees a GPU (%s)", torch.cuda.get_device_name())
        return "triton"
    missing = "Triton is not installed" if torch.cuda.is_available() else "PyTorch sees no GPU"
    logger.info("kernels: torch, because %s", missing)
    return "torch"


def _native_ops() -> Ops:
    from fastgpt_kernels import native
    from fastgpt_kernels.native.library import library

    library()  # compiled now, not in the first update
    return _ops_of("native", native)


@functools.cache
def _triton_ops() -> Ops:
    remedy = (
        "Set kernels.backend to 'torch' to run without Triton, or the environment variable TRITON_INTERPRET=1 before "
        "the start to run the kernels, slowly, in Triton's interpreter."
    )
    problem = "The backend 'triton' cannot run here"
    if not importlib.util.find_spec("triton"):
        raise UnsupportedInput(problem, ["Triton is not installed"], remedy)

    from fastgpt_kernels import launch

    if not launch.INTERPRETED and not torch.cuda.is_available():
        raise UnsupportedInput(problem, ["PyTorch sees no GPU", "TRITON_INTERPRET=1 was not set"], remedy)
    modules = {file: importlib.import_module(f"fastgpt_kernels.{file}") for file in set(TRITON_FILES.values())}
    return Ops("triton", **{operation: getattr(modules[file], operation) for operation, file in TRITON_FILES.items()})


def _unknown(backend: object) -> UnsupportedInput:
    known = get_args(Backend)
    near = difflib.get_close_matches(backend, known, n=1) if isinstance(backend, str) else []
    remedy = f"Did you mean {near[0]!r}?" if near else "Set kernels.backend to 'auto' to choose by the hardware."
    return UnsupportedInput(f"{backend!r} is not a kernel backend", ["allowed: " + ", ".join(map(repr, known))], remedy)
