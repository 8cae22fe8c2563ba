"""From tensors to the C++ of `src`: pointers, structures, and which tensors it takes."""

import ctypes
from typing import TypeAlias

import torch
from torch import Tensor

from fastgpt_kernels.native.library import library
from fastgpt_kernels.seeds import origin, rate

Argument: TypeAlias = Tensor | int | float | ctypes.Structure | ctypes.Array[ctypes.c_int64] | None


class Mask(ctypes.Structure):
    """A dropout mask, as `Mask` in vectors.h."""

    _fields_ = (("origin", ctypes.c_int64), ("bound", ctypes.c_int32), ("keep", ctypes.c_float))


class Attention(ctypes.Structure):
    """A problem of attention, as `Attention` in attention.cpp."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("B", "T", "H", "D", "window")),
        ("strides", ctypes.c_int64 * 5),
        ("scale", ctypes.c_float),
        ("mask", Mask),
        *((name, ctypes.c_void_p) for name in ("qkv", "documents", "firsts")),
    )


def mask_of(seed: Tensor | None, p: float) -> Mask:
    """The mask of a seed, int64 (1,), that drops at the `rate` of p; without a seed it keeps all."""
    if seed is None:
        return Mask(0, -32768, 1.0)
    return Mask(int(origin(seed)), int(65536 * rate(p)) - 32768, 1.0 / (1.0 - rate(p)))


def call(name: str, *arguments: Argument) -> None:
    """Call a function with the addresses of tensors and structures, 64-bit integers, float32, and the threads."""
    getattr(library(), name)(*map(_argument, arguments), ctypes.c_int(torch.get_num_threads()))


def _argument(x: Argument) -> object:
    if isinstance(x, Tensor):
        return ctypes.c_void_p(x.data_ptr())
    if isinstance(x, ctypes.Structure | ctypes.Array):
        return ctypes.byref(x)
    if isinstance(x, float):
        return ctypes.c_float(x)
    return ctypes.c_void_p() if x is None else ctypes.c_int64(x)


def takes(*tensors: Tensor) -> bool:
    """Whether all lie on a CPU in bfloat16, and the first has elements."""
    return tensors[0].numel() > 0 and all(x.device.type == "cpu" and x.dtype == torch.bfloat16 for x in tensors)
