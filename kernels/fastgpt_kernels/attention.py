"""Causal self-attention over a packed projection, forward and backward, without the (T, T) weights in memory.

For each batch entry and head, with q_i, k_j, v_j in R^D read in place from qkv (B, T, 3, H, D):

    s_ij = scale q_i . k_j    for j <= i
    p_ij = exp(s_ij) / sum_j' exp(s_ij')
    o_i  = sum_j z_ij p_ij v_j        z_ij = 1 / (1 - dropout_p) where kept, else 0; 1 without dropout

The forward visits the keys in tiles with a running maximum m_i and sum l_i, and keeps m_i + log2(l_i) for the backward:

    dv_j  = sum_i z_ij p_ij do_i
    dp_ij = z_ij do_i . v_j
    ds_ij = p_ij (dp_ij - delta_i)    delta_i = sum_j p_ij dp_ij = do_i . o_i
    dq_i  = scale sum_j ds_ij k_j
    dk_j  = scale sum_i ds_ij q_i

One kernel computes dq (and delta) for a tile of queries, another dk and dv for a tile of keys: each output has one
writer, so that nothing is added atomically and a repeat gives the same bits. Tiles wholly in the future are never
visited, and only those that the diagonal cuts are masked.

The dropout mask comes from Philox 4x32-10 with the seed as key and (head, i, j) as counter: it is the same in the
forward and the backward and does not depend on the tile sizes, and no mask is stored.

Limits: head sizes 16 to 256, float32, float16, bfloat16; any T >= 1, any strides. A head size between powers of two is
split into two pieces (80 = 64 + 16, 96 = 64 + 32, 160 = 128 + 32) rather than padded. One that 8 does not divide is
copied into one that it does: its rows start where the hardware cannot load 16 bytes.

Numerics: products in the input's dtype with float32 sums (float32 input: full precision, no tf32); softmax in float32
in base 2; the weights and ds are rounded to the input's dtype before their products.

Source: Dao, "FlashAttention-2" (2023), sections 3.1 and 3.2, algorithms 1 and 2. Salmon et al., "Parallel random
numbers: as easy as 1, 2, 3" (2011), section 3.3 (Philox).
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from fastgpt_kernels import checks, launch
from fastgpt_kernels.attention_kernels import (
    backward_keys_kernel,
    backward_queries_kernel,
    documents_kernel,
    forward_kernel,
)
from fastgpt_kernels.checks import Seed
from fastgpt_kernels.seeds import seed_tensor
from fastgpt_kernels.tiles import Tiles, tiles_for

MIN_HEAD_SIZE, MAX_HEAD_SIZE = 16, 256
MOST_ROWS = 256  # of any tile
DOCUMENTS_BLOCK = 64  # positions of a tile where the ids of documents are compared


def launch_documents(ids: Tensor) -> Tensor:
    """(2, B, T) int32: where in its row the document of each position starts, and the last position that is in it."""
    B, T = ids.shape
    documents = torch.empty((2, B, T), dtype=torch.int32, device=ids.device)
    with launch.on_device_of(ids):
        documents_kernel[(triton.cdiv(T, DOCUMENTS_BLOCK) * B,)](
            ids, documents, *ids.stride(), B, T, DOCUMENTS_BLOCK, **launch.OPTIONS
        )
    return documents


def launch_forward(
    qkv: Tensor,
    scale: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    window: int | None = None,
    documents: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The output (B, T, H, D) and, for the backward, the logarithms of its sums, (B, H, T) in float32."""
    B, T, _, H, D = qkv.shape
    out = torch.empty((B, T, H, D), dtype=qkv.dtype, device=qkv.device)
    lse = torch.empty((B, H, T), dtype=torch.float32, device=qkv.device)
    tiles = _tiles_of("forward", qkv, seed, window, documents)
    unit, strides = _strides(qkv)
    with launch.on_device_of(qkv):
        forward_kernel[(triton.cdiv(T, tiles.BLOCK_M) * B * H,)](
            qkv, out, lse, seed, documents, *strides, B, T, H, window, scale, dropout_p, unit, D, *pieces(D),
            **tiles._asdict(), **_options(qkv),
        )  # fmt: skip
    return out, lse


def launch_backward(
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    scale: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    window: int | None = None,
    documents: Tensor | None = None,
) -> Tensor:
    """The gradient of qkv from that of the output, contiguous (B, T, H, D); in memory it lies as qkv does."""
    B, T, _, H, D = qkv.shape
    dqkv = torch.empty_like(qkv)
    delta = torch.empty_like(lse)
    query_tiles = _tiles_of("backward_queries", qkv, seed, window, documents)
    key_tiles = _tiles_of("backward_keys", qkv, seed, window, documents)
    unit, strides = _strides(qkv, dqkv)
    shape = (B, T, H, window, scale, dropout_p, unit, D, *pieces(D))
    with launch.on_device_of(qkv):
        # in this order: the kernel for queries leaves delta for the kernel for keys
        backward_queries_kernel[(triton.cdiv(T, query_tiles.BLOCK_M) * B * H,)](
            qkv, out, dout, lse, delta, dqkv, seed, documents, *strides, *shape,
            **query_tiles._asdict(), **_options(qkv),
        )  # fmt: skip
        backward_keys_kernel[(triton.cdiv(T, key_tiles.BLOCK_N) * B * H,)](
            qkv, dout, lse, delta, dqkv, seed, documents, *strides, *shape, **key_tiles._asdict(), **_options(qkv)
        )
    return dqkv


def _strides(*packed: Tensor) -> tuple[int, list[int]]:
    """A unit, and the strides of all tensors in it, but for those between columns.

    Triton knows of an integer whether 16 divides it. From the unit it learns that 8 does, and loads 16 bytes at once.
    """
    whole = all(stride % 8 == 0 for x in packed for stride in x.stride()[:4])
    unit = 8 if whole else 1
    return unit, [stride // unit if place < 4 else stride for x in packed for place, stride in enumerate(x.stride())]


def _tiles_of(kernel: str, qkv: Tensor, seed: Tensor | None, window: int | None, documents: Tensor | None) -> Tiles:
    extras = seed is not None or window is not None or documents is not None
    return tiles_for(kernel, launch.architecture(qkv.device), qkv.element_size() * 8, qkv.shape[-1], extras)


def _options(qkv: Tensor) -> dict[str, Any]:
    return launch.with_all_registers(qkv.device) if qkv.dtype == torch.float32 else launch.OPTIONS


def pieces(head_size: int) -> tuple[int, int]:
    """The powers of two that hold a row: 64 and 0 for 64, 64 and 16 for 80, 128 and 0 for 120, 128 and 128 for 256.

    Above 128 always two: a product with all of so wide a row would need more registers than there are.
    """
    whole = triton.next_power_of_2(head_size)
    main = whole // 2
    tail = max(16, triton.next_power_of_2(head_size - main))
    return (whole, 0) if main < 16 or (main + tail >= whole and whole <= 128) else (main, tail)


@torch.library.custom_op("fastgpt::documents", mutates_args=())
def _documents(ids: Tensor) -> Tensor:
    return launch_documents(ids)


@_documents.register_fake
def _(ids: Tensor) -> Tensor:
    return ids.new_empty((2, *ids.shape), dtype=torch.int32)


@torch.library.custom_op("fastgpt::causal_attention", mutates_args=())
def _attention(
    qkv: Tensor, scale: float, dropout_p: float, seed: Tensor | None, window: int | None, documents: Tensor | None
) -> tuple[Tensor, Tensor]:
    return launch_forward(qkv, scale, dropout_p, seed, window, documents)


@_attention.register_fake
def _(
    qkv: Tensor, scale: float, dropout_p: float, seed: Tensor | None, window: int | None, documents: Tensor | None
) -> tuple[Tensor, Tensor]:
    B, T, _, H, D = qkv.shape
    return qkv.new_empty((B, T, H, D)), qkv.new_empty((B, H, T), dtype=torch.float32)


@torch.library.custom_op("fastgpt::causal_attention_backward", mutates_args=())
def _attention_backward(
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    window: int | None,
    documents: Tensor | None,
) -> Tensor:
    return launch_backward(qkv, out, lse, dout, scale, dropout_p, seed, window, documents)


@_attention_backward.register_fake
def _(
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    window: int | None,
    documents: Tensor | None,
) -> Tensor:
    return torch.empty_like(qkv)


def _setup_context(
    ctx: Any,
    inputs: tuple[Tensor, float, float, Tensor | None, int | None, Tensor | None],
    output: tuple[Tensor, Tensor],
) -> None:
    qkv, ctx.scale, ctx.dropout_p, seed, ctx.window, documents = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(qkv, out, lse, seed, documents)


def _differentiate(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    qkv, out, lse, seed, documents = ctx.saved_tensors
    dqkv: Tensor = _attention_backward(
        qkv, out, lse, dout.contiguous(), ctx.scale, ctx.dropout_p, seed, ctx.window, documents
    )
    return dqkv, None, None, None, None, None


_attention.register_autograd(_differentiate, setup_context=_setup_context)


def causal_attention(
    qkv: Tensor,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Seed | None = None,
    window: int | None = None,
    document_ids: Tensor | None = None,
) -> Tensor:
    """Causal attention over a packed projection, in Triton.

    Args:
        qkv: (B, T, 3, H, D), float32, float16 or bfloat16, 16 <= D <= 256, any strides; read in place, unless a
            tile spans 2^31 elements: then it is copied. The gradient
            comes back as one tensor that lies in memory as qkv does: q, k and v with heads before positions, for
            example, are views of a (3, B, H, T, D) tensor, and so are their gradients.
        scale: factor of the scores before the softmax, positive; 1 / sqrt(D) when None.
        dropout_p: probability, in [0, 1), of dropping an attention weight.
        seed: int in [0, 2^63) or int64 tensor of one element; needed where dropout_p > 0.
        window: how many positions, its own included, a position sees at most; all when None.
        document_ids: (B, T) integers, any strides; a position sees only those with its own id. The cost falls with
            the length of the documents where equal ids stand together.

    Returns:
        (B, T, H, D), contiguous, in the dtype of qkv.

    Raises:
        UnsupportedInput: for arguments outside these.
    """
    wrong = checks.against_attention(qkv, scale, dropout_p, seed, window, document_ids)
    launch.refuse("causal_attention", wrong, launch.against(qkv=qkv) + against_head_size(qkv, 5))
    T, D = qkv.shape[1], qkv.shape[-1]
    if D % 8:
        qkv = F.pad(qkv, (0, -D % 8))
    qkv = launch.within_reach(qkv, qkv.stride(1), MOST_ROWS)
    key = None if dropout_p == 0.0 or seed is None else seed_tensor(seed, qkv.device)
    documents = None if document_ids is None else _documents(document_ids)
    band = None if window is None or window >= T else checks.integer(window)
    out: Tensor = _attention(qkv, scale or 1.0 / math.sqrt(D), dropout_p, key, band, documents)[0]
    return out[..., :D].contiguous() if D % 8 else out


def against_head_size(x: Tensor, dimensions: int) -> list[str]:
    """A reason against the last of so many dimensions."""
    if not isinstance(x, Tensor) or x.dim() != dimensions or MIN_HEAD_SIZE <= x.shape[-1] <= MAX_HEAD_SIZE:
        return []
    return [f"the head size is {checks.shape_of(x)[-1]}; it must be between {MIN_HEAD_SIZE} and {MAX_HEAD_SIZE}"]
