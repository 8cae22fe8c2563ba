"""Who is measured: our backends, and what else a user could call for the same operation.

A contender has the operations that it offers as attributes, with the signatures of `fastgpt_kernels.ops`:

    triton        ours
    native        ours, C++ for bfloat16: what a CPU runs that multiplies it
    torch         ours, PyTorch's best in the fewest passes: what other CPUs run
    eager         PyTorch's built-ins as a user composes them, with PyTorch's own dropout
    compile       the same under torch.compile
    sdpa-flash    scaled_dot_product_attention by one of its backends, with q, k and v apart: it has no packed
    sdpa-cudnn    projection to split, nor a gradient to put together, as "eager" has
    liger         Liger-Kernel, where it is installed

"eager" and "compile" also have `masked_attention(qkv, mask)` and "eager" `masked_decode_attention(q, k_cache, v_cache,
mask)`: what takes a mask is given one that was made outside the time, as a model makes it once for all its layers.

Those that are ours must be as close to the mathematics as PyTorch; of the others it is recorded whether they are.
"""

import importlib.util
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from fastgpt_kernels import load_ops
from fastgpt_kernels.builtin import BUILTIN
from fastgpt_kernels.checks import Seed
from fastgpt_kernels.native.library import reasons_against
from fastgpt_kernels.ops import Ops
from fastgpt_kernels.reference import visible
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.shapes import Scale

OURS = ("triton", "native", "torch")
OPTIMIZER = ("adamw", "grad_norm")
SDPA = {"sdpa-flash": SDPBackend.FLASH_ATTENTION, "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION}
LIGER = ("layer_norm", "cross_entropy", "linear_cross_entropy")
# In the order of their turns. On a GPU our torch backend is nearly "eager" and leaves its time to others; on a CPU
# torch.compile takes too long to compile. Any choice can be asked for.
BY_SCALE: dict[Scale, tuple[str, ...]] = {
    "gpu": ("triton", "eager", "sdpa-flash", "sdpa-cudnn", "liger", "compile"),
    "cpu": ("native", "torch", "eager"),
    "toy": ("triton", "torch", "eager", "sdpa-flash", "sdpa-cudnn", "liger"),
}
NAMES = ("triton", "native", "torch", "eager", "sdpa-flash", "sdpa-cudnn", "liger", "compile")


class Unavailable(Exception):  # noqa: N818 - no error: a reason for an empty cell of a table
    """A contender cannot take part here."""


def offers(name: str, operation: str) -> bool:
    """Whether a contender has an operation at all."""
    if name in SDPA:
        return operation == "causal_attention"
    if name == "liger":
        return operation in LIGER
    if name == "native":
        return operation not in OPTIMIZER  # which is the torch backend's
    return name != "compile" or operation not in (*OPTIMIZER, "decode_attention")


def load(name: str, device: str) -> Any:
    """The operations of a contender.

    Raises:
        Unavailable: it cannot run on this device, or is not installed.
    """
    if name == "torch":
        return load_ops("torch")
    if name == "eager":
        return SimpleNamespace(
            **EAGER._asdict(), masked_attention=masked_attention, masked_decode_attention=masked_decode_attention
        )
    if name == "compile":
        return compiled()
    if name == "native":
        return native(device)
    if device == "cpu":
        raise Unavailable("on a CPU its kernels run in the interpreter" if name == "triton" else "it needs a GPU")
    if name == "triton":
        return load_ops("triton")
    return liger() if name == "liger" else sdpa(SDPA[name])


def native(device: str) -> Ops:
    """Ours for a CPU."""
    if device != "cpu":
        raise Unavailable("it needs a CPU")
    if reasons_against():
        raise Unavailable("; ".join(reasons_against()))
    return load_ops("native")


def eager_attention(
    qkv: Tensor,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Seed | None = None,
    window: int | None = None,
    document_ids: Tensor | None = None,
) -> Tensor:
    """`scaled_dot_product_attention`, with its own dropout."""
    mask = visible(qkv, window, document_ids) if window is not None or document_ids is not None else None
    return masked_attention(qkv, mask, scale=scale, dropout_p=dropout_p)


def masked_attention(qkv: Tensor, mask: Tensor | None, *, scale: float | None = None, dropout_p: float = 0.0) -> Tensor:
    """The same with a mask that says who sees whom, (T, T) or (B, 1, T, T)."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    out = F.scaled_dot_product_attention(q, k, v, mask, dropout_p, is_causal=mask is None, scale=scale)
    return out.transpose(1, 2).contiguous()


def masked_decode_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, mask: Tensor) -> Tensor:
    """One query over a cache of which the mask (B, 1, 1, T_max) shows the places in use."""
    return F.scaled_dot_product_attention(q[:, :, None], k_cache, v_cache, attn_mask=mask).squeeze(2)


def eager_add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    *,
    dropout_p: float = 0.0,
    seed: Seed | None = None,
) -> tuple[Tensor, Tensor]:
    """Dropout, a sum, a layer norm."""
    new_residual = eager_dropout_add(x, residual, dropout_p, seed)
    return F.layer_norm(new_residual, weight.shape, weight, bias, eps), new_residual


def eager_embedding(
    tokens: Tensor,
    token_table: Tensor,
    position_table: Tensor,
    *,
    dropout_p: float = 0.0,
    seed: Seed | None = None,
) -> Tensor:
    """Two look-ups, a sum, dropout."""
    return F.dropout(F.embedding(tokens, token_table) + position_table[: tokens.shape[1]], dropout_p)


def eager_dropout(x: Tensor, p: float, seed: Seed | None) -> Tensor:
    """PyTorch's own, which takes no seed and stores its mask."""
    return F.dropout(x, p)


def eager_dropout_add(x: Tensor, residual: Tensor, p: float, seed: Seed | None) -> Tensor:
    """Dropout, then a sum."""
    return residual + F.dropout(x, p)


EAGER = BUILTIN._replace(
    causal_attention=eager_attention,
    add_layer_norm=eager_add_layer_norm,
    embedding=eager_embedding,
    dropout=eager_dropout,
    dropout_add=eager_dropout_add,
)


def compiled() -> SimpleNamespace:
    """Every operation of "eager" under torch.compile; nothing is compiled before it is called."""
    import torch._functorch.config as compiler_config  # PyTorch's own import leaves it out

    # a compiled backward would otherwise refuse to run twice on what one forward kept
    compiler_config.donated_buffer = False
    torch.compiler.reset()
    operations = {operation: getattr(EAGER, operation) for operation in EAGER._fields[1:]}
    operations["masked_attention"] = masked_attention
    return SimpleNamespace(
        **{name: torch.compile(operation, fullgraph=True, dynamic=False) for name, operation in operations.items()}
    )


def sdpa(backend: SDPBackend) -> SimpleNamespace:
    """One backend of SDPA: `attend` takes q, k and v, each (B, T, H, D)."""

    def attend(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        dropout_p: float = 0.0,
        seed: Seed | None = None,
        window: int | None = None,
        document_ids: Tensor | None = None,
    ) -> Tensor:
        if window is not None or document_ids is not None:
            raise Unavailable("this backend takes no mask of windows or documents")
        with sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(
                q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), dropout_p=dropout_p, is_causal=True
            )
        return out.transpose(1, 2)

    return SimpleNamespace(attend=attend)


def liger() -> SimpleNamespace:
    """Liger-Kernel's functions; its GELU is always gated and its fused residual norm an RMS norm: no peers of ours."""
    if not importlib.util.find_spec("liger_kernel"):
        raise Unavailable("liger-kernel is not installed")
    from liger_kernel.transformers import functional

    def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
        return functional.liger_layer_norm(x, weight, bias, eps)

    def cross_entropy(logits: Tensor, targets: Tensor, *, consume: bool = False) -> Tensor:
        return functional.liger_cross_entropy(logits, targets)

    def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return functional.liger_fused_linear_cross_entropy(x, weight, targets)

    return SimpleNamespace(
        layer_norm=layer_norm, cross_entropy=cross_entropy, linear_cross_entropy=linear_cross_entropy
    )
