"""What is compiled ahead of time: each operation's launches, at sizes and dtypes that make different kernels.

The launches are the operations' own, with meta tensors: tile sizes, alignment and every other specialisation are those
of a real run. Attention has a case for each entry of its table of tiles.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastgpt_kernels import attention, dropout, gelu, launch, layernorm, tiles
from fastgpt_kernels.tiles import Entry, Tiles

FP32, FP16, BF16 = launch.DTYPES
INT64 = torch.int64
COLUMNS = (7, 128, 768, 1024, 1600, 4096, 5120, 8192, 12288, 16384)
# what is on in a call that an entry of attention's table is for, by its `extras`; the first in the gate
VARIANTS = {False: ("plain",), True: ("dropout window documents", "dropout", "window", "documents")}
WGMMA_HEAD_SIZE = 128  # largest head size at which Hopper's matrix instructions must appear


class Case(NamedTuple):
    """One operation at one size and dtype, as a call that makes all its launches."""

    operation: str
    size: str
    dtype: torch.dtype
    launches: Callable[[], object]
    gate: bool = True  # compiled in the gate; the others only in the whole sweep
    arch: str | None = None  # None: for every architecture
    kernel: str | None = None  # the only kernel to compile of those that are launched; None: all
    tiles: Tiles | None = None  # other ones for that kernel than the table's
    spill_budget: int | None = 0  # None: without limit
    instruction: str = ""  # must be in the assembly


def cases() -> Iterator[Case]:
    """Everything that is compiled."""
    for entry in tiles.entries():
        yield from attention_cases(entry)
    yield Case("attention", "documents", INT64, lambda: attention.launch_documents(_meta(2, 1024, dtype=INT64)))
    for dtype in launch.DTYPES:
        for N in COLUMNS:
            yield Case("layer_norm", f"N={N}", dtype, _layer_norm(N, dtype), (N, dtype) in {(768, BF16), (16384, FP32)})
            gate = (N, dtype) in {(1600, BF16), (768, FP32)}
            yield Case("add_layer_norm", f"N={N}", dtype, _add_layer_norm(N, dtype), gate)
        for approximate in ("tanh", "none"):
            x, bias = _meta(4096, 3072, dtype=dtype), _meta(3072, dtype=dtype)
            gate = (approximate, dtype) == ("tanh", BF16)
            yield Case("gelu", approximate, dtype, _gelu(x, approximate), gate)
            yield Case("bias_gelu", approximate, dtype, _bias_gelu(x, bias, approximate), gate)
        yield Case("dropout", "", dtype, _dropout(_meta(4096, 768, dtype=dtype)), dtype == BF16)


def attention_cases(entry: Entry) -> Iterator[Case]:
    """What an entry of the table is for.

    In the gate, the chosen tiles at the entry's head size; beyond it, those at every other head size and dtype that
    takes them, and the other candidates, of which only the shared memory is limited.
    """
    alike = (other.head_size for other in tiles.entries() if other[:3] == entry[:3] and other[4:6] == entry[4:6])
    smaller = max((head_size for head_size in alike if head_size < entry.head_size), default=0)
    dtypes = (FP32,) if entry.bits == 32 else (BF16, FP16)
    sizes = [D for D in range(16, entry.head_size + 1, 8) if D > smaller and (D % 16 == 0) == entry.aligned]
    for D in sizes:
        for dtype in dtypes:
            for variant in VARIANTS[entry.extras]:
                gate = (D, dtype, variant) == (sizes[-1], dtypes[0], VARIANTS[entry.extras][0])
                yield attention_case(entry, D, dtype, variant, gate=gate)
    for candidate in entry.candidates:
        if candidate != entry.tiles:
            yield attention_case(entry, sizes[-1], dtypes[0], VARIANTS[entry.extras][0], candidate, gate=False)


def attention_case(
    entry: Entry, D: int, dtype: torch.dtype, variant: str, candidate: Tiles | None = None, *, gate: bool
) -> Case:
    """An entry's kernel with the chosen tiles or another candidate; the variant names what is on."""
    wgmma = entry.arch == "sm_90" and entry.bits == 16 and D <= WGMMA_HEAD_SIZE
    return Case(
        operation="attention",
        size=f"D={D} {variant}",
        dtype=dtype,
        launches=_attention(entry.kernel, D, dtype, variant),
        gate=gate,
        arch=entry.arch,
        kernel=entry.kernel,
        tiles=candidate,
        spill_budget=entry.spill_budget if candidate is None else None,
        instruction="wgmma" if wgmma else "",
    )


def _meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _attention(kernel: str, D: int, dtype: torch.dtype, variant: str) -> Callable[[], object]:
    def launches() -> None:
        qkv, out = _meta(2, 1024, 3, 12, D, dtype=dtype), _meta(2, 1024, 12, D, dtype=dtype)
        seed = _meta(1, dtype=INT64) if "dropout" in variant else None
        window = 256 if "window" in variant else None
        documents = _meta(2, 2, 1024, dtype=torch.int32) if "documents" in variant else None
        options = (0.125, 0.1 if seed is not None else 0.0, seed, window, documents)
        if kernel == "forward":
            attention.launch_forward(qkv, *options)
        else:
            attention.launch_backward(qkv, out, _meta(2, 12, 1024, dtype=FP32), out, *options)

    return launches


def _layer_norm(N: int, dtype: torch.dtype) -> Callable[[], object]:
    def launches() -> None:
        x, weight, mean = _meta(4096, N, dtype=dtype), _meta(N, dtype=dtype), _meta(4096, dtype=FP32)
        layernorm.launch_forward(x, weight, weight, 1e-5)
        layernorm.launch_backward(x, weight, weight, mean, mean, x)

    return launches


def _add_layer_norm(N: int, dtype: torch.dtype) -> Callable[[], object]:
    def launches() -> None:
        x, weight, mean = _meta(4096, N, dtype=dtype), _meta(N, dtype=dtype), _meta(4096, dtype=FP32)
        for p, seed in ((0.0, None), (0.1, _meta(1, dtype=INT64))):
            layernorm.launch_forward(x, weight, weight, 1e-5, x, p, seed)
            layernorm.launch_backward(x, weight, weight, mean, mean, x, x, p, seed)

    return launches


def _gelu(x: Tensor, approximate: str) -> Callable[[], object]:
    def launches() -> None:
        gelu.launch_gelu_forward(x, approximate)
        gelu.launch_gelu_backward(x, x, approximate)

    return launches


def _bias_gelu(x: Tensor, bias: Tensor, approximate: str) -> Callable[[], object]:
    def launches() -> None:
        gelu.launch_bias_gelu_forward(x, bias, approximate)
        gelu.launch_bias_gelu_backward(x, bias, x, approximate)

    return launches


def _dropout(x: Tensor) -> Callable[[], object]:
    def launches() -> None:
        dropout.launch_dropout(x, 0.1, _meta(1, dtype=INT64))
        dropout.launch_dropout_add(x, x, 0.1, _meta(1, dtype=INT64))

    return launches
