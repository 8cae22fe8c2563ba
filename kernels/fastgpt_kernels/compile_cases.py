"""What is compiled ahead of time: each operation's launches, at sizes and dtypes that make different kernels.

The launches are the operations' own, with meta tensors: tile sizes, alignment and every other specialisation are those
of a real run. Attention has a case for each entry of its table of tiles, linear + GELU for each of its tiles. Triton
makes constants of integers that are 1: the sizes "of one" are those of which everything is one.

The gate, which CI compiles for every architecture, has every line of the tables with its chosen tiles, and each kernel
of the other operations at sizes that models have, or that ask the most of the registers. All else is compiled in the
whole sweep only. Neither has linear_cross_entropy, whose kernels are cross_entropy's.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastgpt_kernels import (
    adamw,
    attention,
    checks,
    cross_entropy,
    decode,
    dropout,
    embedding,
    gelu,
    gradient_norm,
    layernorm,
    linear_gelu,
    tiles,
)
from fastgpt_kernels.linear_gelu import Tile
from fastgpt_kernels.optim_arguments import Constants, Form
from fastgpt_kernels.tiles import Entry, Tiles

FP32, FP16, BF16 = checks.DTYPES
INT64 = torch.int64
COLUMNS = (7, 128, 768, 1024, 1600, 4096, 5120, 8192, 12288, 16384)
# what is on in a call that an entry of attention's table is for, by its `extras`; the first in the gate
VARIANTS = {False: ("plain",), True: ("dropout window documents", "dropout", "window", "documents")}
WGMMA_HEAD_SIZE = 128  # largest head size at which Hopper's matrix instructions must appear
VOCABULARIES = (3, 50257, 50304)
WIDTHS = (7, 768, 1600, 12288)
HEAD_SIZES = (16, 40, 64, 80, 96, 128, 160, 256)  # of decode_attention
FORMS: tuple[Form, ...] = ("adamw", "gpt1")
# of the operations without a table: the kernels that CI compiles
GATE = {
    ("layer_norm", "N=768", BF16),
    ("layer_norm", "N=16384", FP32),
    ("add_layer_norm", "N=1600", BF16),
    ("add_layer_norm", "N=768", FP32),
    ("gelu", "tanh", BF16),
    ("bias_gelu", "tanh", BF16),
    ("bias_gelu", "of one", BF16),
    ("cross_entropy", "V=50304", BF16),
    ("cross_entropy", "V=50257", FP32),
    ("embedding", "N=768 dropout", BF16),
    ("embedding", "of one", BF16),
    ("decode_attention", "D=80", BF16),
    ("decode_attention", "D=256", FP32),
    ("decode_attention", "of one", BF16),
    ("dropout", "", BF16),
    ("dropout", "of one", BF16),
    ("grad_norm", "", FP32),
    ("grad_norm", "", BF16),
    ("adamw", "adamw, copies: bfloat16", BF16),
    ("adamw", "gpt1, copies: none", FP32),
}
# Bytes that the layer norms may spill, which hold a row or two in registers. Most spill nothing.
SPILL_BUDGET_OF_NORMS = {
    "N=7": None,  # loaded element by element, which is right and no more
    "N=16384": 128,  # 512 threads, with 128 registers each
}
USUAL_SPILL_BUDGET_OF_NORMS = 32  # under Triton 3.6


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

    @property
    def is_candidate(self) -> bool:
        """Whether these are tiles of attention that its table has beside the chosen ones."""
        return self.operation == "attention" and self.tiles is not None


def cases() -> Iterator[Case]:
    """Everything that is compiled."""
    for entry in tiles.entries():
        yield from attention_cases(entry)
    yield Case("attention", "documents", INT64, lambda: attention.launch_documents(_meta(2, 1024, dtype=INT64)))
    for direction, arch in linear_gelu.CANDIDATES:
        yield from linear_gelu_cases(direction, arch)
    for dtype in checks.DTYPES:
        for operation, size, launches in _by_dtype(dtype):
            gate = (operation, size, dtype) in GATE
            yield Case(operation, size, dtype, launches, gate, spill_budget=_spill_budget(operation, size))


def _spill_budget(operation: str, size: str) -> int | None:
    if operation in ("layer_norm", "add_layer_norm"):
        return SPILL_BUDGET_OF_NORMS.get(size, USUAL_SPILL_BUDGET_OF_NORMS)
    return 0


def _by_dtype(dtype: torch.dtype) -> Iterator[tuple[str, str, Callable[[], object]]]:
    for N in COLUMNS:
        yield "layer_norm", f"N={N}", _layer_norm(N, dtype)
        yield "add_layer_norm", f"N={N}", _add_layer_norm(N, dtype)
    for approximate in ("tanh", "none"):
        yield "gelu", approximate, _gelu(dtype, approximate)
        yield "bias_gelu", approximate, _bias_gelu(dtype, approximate)
    yield "gelu", "of one", _gelu(dtype, "tanh", 1, 1)
    yield "bias_gelu", "of one", _bias_gelu(dtype, "tanh", 1, 1)
    for V in VOCABULARIES:
        yield "cross_entropy", f"V={V}", _cross_entropy(V, dtype)
    for N in WIDTHS:
        yield "embedding", f"N={N}", _embedding(N, dtype, 0.0)
        yield "embedding", f"N={N} dropout", _embedding(N, dtype, 0.1)
    yield "embedding", "of one", _embedding(1, dtype, 0.1, 1, 1, 1)
    for D in HEAD_SIZES:
        yield "decode_attention", f"D={D}", _decode(D, dtype)
    yield "decode_attention", "of one", _decode(64, dtype, 1, 1, 1)
    yield "dropout", "", _dropout(dtype)
    yield "dropout", "N=767", _dropout(dtype, N=767)
    yield "dropout", "of one", _dropout(dtype, 1, 1)
    yield "grad_norm", "", _grad_norm(dtype)
    for copies in (None, FP16, BF16):
        for form in FORMS:
            yield "adamw", f"{form}, copies: {_name(copies)}", _adamw(form, dtype, copies)


def linear_gelu_cases(direction: str, arch: str) -> Iterator[Case]:
    """The tiles that linear + GELU may choose; in the gate those that its table has, or the first one."""
    candidates = linear_gelu.CANDIDATES[direction, arch]
    table = linear_gelu.parse(linear_gelu.PATH.read_text())
    chosen = {getattr(entry, direction) for entry in table if entry.arch == arch} - {None} or {candidates[0]}
    for tile in candidates:
        for dtype in (BF16, FP16):
            for approximate in ("tanh", "none"):
                gate = tile in chosen and (dtype, approximate) == (BF16, "tanh")
                yield linear_gelu_case(direction, arch, tile, dtype, approximate, gate=gate)


def linear_gelu_case(
    direction: str, arch: str, tile: Tile, dtype: torch.dtype, approximate: str, *, gate: bool
) -> Case:
    """One direction with one tile."""
    return Case(
        operation="linear_gelu",
        size=f"K=768 N=3072 {approximate} {tile.rows}x{tile.columns}x{tile.inner}",
        dtype=dtype,
        launches=_linear_gelu(direction, tile, dtype, approximate),
        gate=gate,
        arch=arch,
        instruction="wgmma" if arch == "sm_90" else "",
    )


def attention_cases(entry: Entry) -> Iterator[Case]:
    """What an entry of the table is for.

    In the gate, the chosen tiles at the entry's head size, on Hopper in both 16-bit dtypes; beyond it, those at every
    other head size and dtype that takes them, and the other candidates, of which only the shared memory is limited.
    """
    alike = (other.head_size for other in tiles.entries() if other[:3] == entry[:3] and other.extras == entry.extras)
    smaller = max((head_size for head_size in alike if head_size < entry.head_size), default=0)
    dtypes = (FP32,) if entry.bits == 32 else (BF16, FP16)
    sizes = range(max(16, smaller + 8), entry.head_size + 1, 8)
    for D in sizes:
        for dtype in dtypes:
            for variant in VARIANTS[entry.extras]:
                gate = sizes[-1] == D and variant == VARIANTS[entry.extras][0]
                gate &= dtype == dtypes[0] or _is_plain_wgmma(entry)
                yield attention_case(entry, D, dtype, variant, gate=gate)
    for candidate in entry.candidates:
        if candidate != entry.tiles:
            yield attention_case(entry, sizes[-1], dtypes[0], VARIANTS[entry.extras][0], candidate, gate=False)


def _is_plain_wgmma(entry: Entry) -> bool:
    """Whether the gate has float16 beside bfloat16: Hopper's matrix instructions must be there for both."""
    return entry.arch == "sm_90" and entry.bits == 16 and entry.head_size <= WGMMA_HEAD_SIZE and not entry.extras


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


def _linear_gelu(direction: str, tile: Tile, dtype: torch.dtype, approximate: str) -> Callable[[], object]:
    def launches() -> None:
        x, y, weight = _meta(4096, 768, dtype=dtype), _meta(4096, 3072, dtype=dtype), _meta(3072, 768, dtype=dtype)
        if direction == "forward":
            linear_gelu.launch_forward(x, weight, _meta(3072, dtype=dtype), approximate, tile)
        else:
            linear_gelu.launch_backward(weight, y, y, approximate, tile)

    return launches


def _cross_entropy(V: int, dtype: torch.dtype) -> Callable[[], object]:
    def launches() -> None:
        logits, targets = _meta(4096, V, dtype=dtype), _meta(4096, dtype=INT64)
        losses, statistics = cross_entropy.launch_forward(logits, targets, -100)
        cross_entropy.launch_backward(logits, targets, statistics, losses, -100, logits)
        number = _meta(1, dtype=FP32)
        cross_entropy.launch_one_pass(logits, targets, number, -100)
        # the gradient of a mean, and those of the rows
        cross_entropy.launch_rescale(logits, targets, number.view(()), number, -100)
        cross_entropy.launch_rescale(logits, targets, losses, number, -100)

    return launches


def _embedding(N: int, dtype: torch.dtype, p: float, B: int = 8, T: int = 1024, V: int = 50257) -> Callable[[], object]:
    def launches() -> None:
        tokens, seed = _meta(B, T, dtype=INT64), _meta(1, dtype=INT64) if p else None
        dy = embedding.launch_forward(tokens, _meta(V, N, dtype=dtype), _meta(T, N, dtype=dtype), p, seed)
        embedding.launch_token_gradient(tokens, dy, V, p, seed)
        embedding.launch_position_gradient(dy, T, p, seed)

    return launches


def _decode(D: int, dtype: torch.dtype, B: int = 8, H: int = 12, T: int = 1024) -> Callable[[], object]:
    def launches() -> None:
        cache = _meta(B, H, T, D, dtype=dtype)
        decode.launch_decode(_meta(B, H, D, dtype=dtype), cache, cache, _meta(B, dtype=INT64), 0.125)

    return launches


def _grad_norm(dtype: torch.dtype) -> Callable[[], object]:
    def launches() -> None:
        tables = _meta(2, 100, dtype=INT64), _meta(1000, 2, dtype=torch.int32)
        for aligned in (True, False):
            gradient_norm.launch_norm([gradient_norm.Tables(*tables, dtype, aligned)])

    return launches


def _adamw(form: Form, gradient: torch.dtype, copies: torch.dtype | None) -> Callable[[], object]:
    constants = Constants(form, (0.9, 0.95), 1e-8, 0.1)

    def launches() -> None:
        tensors, coefficients = _meta(7, 100, dtype=INT64), _meta(3, 100, dtype=FP32)
        chunks, number = _meta(1000, 2, dtype=torch.int32), _meta(1, dtype=FP32)
        # learning rate and scale as a CUDA graph has them, and as numbers
        for lr, scale, aligned in ((number, number, True), (1e-4, 1.0, True), (1e-4, 1.0, False)):
            tables = adamw.Tables(tensors, chunks, coefficients, gradient, copies, aligned)
            adamw.launch_update(tables, constants, lr, scale)

    return launches


def _name(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.").lower()


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


def _gelu(dtype: torch.dtype, approximate: str, rows: int = 4096, N: int = 3072) -> Callable[[], object]:
    def launches() -> None:
        x = _meta(rows, N, dtype=dtype)
        gelu.launch_gelu_forward(x, approximate)
        gelu.launch_gelu_backward(x, x, approximate)

    return launches


def _bias_gelu(dtype: torch.dtype, approximate: str, rows: int = 4096, N: int = 3072) -> Callable[[], object]:
    def launches() -> None:
        x, bias = _meta(rows, N, dtype=dtype), _meta(N, dtype=dtype)
        gelu.launch_bias_gelu_forward(x, bias, approximate)
        gelu.launch_bias_gelu_backward(x, bias, x, approximate)

    return launches


def _dropout(dtype: torch.dtype, rows: int = 4096, N: int = 768) -> Callable[[], object]:
    def launches() -> None:
        x, seed = _meta(rows, N, dtype=dtype), _meta(1, dtype=INT64)
        dropout.launch_dropout(x, 0.1, seed)
        dropout.launch_dropout_add(x, x, 0.1, seed)

    return launches
