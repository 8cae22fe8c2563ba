"""Causal attention by PyTorch: `scaled_dot_product_attention`, and on a CPU blocks of queries over batched products.

    s_ij = scale q_i . k_j over the j that i sees    p_ij = exp(s_ij - lse_i)    o_i = sum_j z_ij p_ij v_j
    dv_j = sum_i z_ij p_ij do_i                      ds_ij = p_ij (z_ij do_i . v_j - sum_j p_ij z_ij do_i . v_j)
    dq_i = scale sum_j ds_ij k_j                     dk_j = scale sum_i ds_ij q_i

z is 1, or with dropout kept / (1 - p).
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt_kernels import checks
from fastgpt_kernels.checks import REMEDY, Seed
from fastgpt_kernels.errors import raise_if_any
from fastgpt_kernels.reference import visible
from fastgpt_kernels.seeds import GAMMA, LANES, lanes_, origin, seed_tensor, seeded_dropout
from fastgpt_kernels.torch_ops.dropout import BITS

ROWS = 64  # queries of a block
SCORES = 2**19  # of a block in all its heads, at the most

_LOG2E = math.log2(math.e)


class _Block(NamedTuple):
    """Queries `first` to `stop` of a sequence, and the keys from `start` on, a multiple of LANES, that they may see."""

    first: int
    stop: int
    start: int


class _Plan:
    """What both directions share: which heads go together, which blocks a sequence has, what is hidden, which mask."""

    def __init__(
        self,
        qkv: Tensor,
        scale: float,
        dropout_p: float,
        seed: Tensor | None,
        window: int | None,
        document_ids: Tensor | None,
    ) -> None:
        self.B, self.T, _, self.H, self.D = qkv.shape
        self.scale, self.p, self.window = scale, dropout_p, window
        self.wide = torch.float64 if qkv.dtype == torch.float64 else torch.float32
        self.narrow = torch.bfloat16 if qkv.dtype == torch.bfloat16 else self.wide
        self.keep = 1.0 if seed is None else 1.0 / (1.0 - dropout_p)
        self.rows = min(ROWS, self.T)
        self.heads = min(self.H, max(1, SCORES // (self.rows * self.T or 1)))
        self.elements = self.heads * self.rows * self.T
        self.future = torch.full((self.rows, self.rows), -math.inf, dtype=self.wide).triu(1)
        self.documents = None if document_ids is None else self._documents(document_ids)
        self.seed = seed
        if seed is not None:
            self.words = -(-self.T // LANES)  # numbers for a row of the mask (B, H, T, T), as `mask_parts` has them
            self.row_numbers = torch.arange(self.B * self.H * self.T).mul_(self.words).mul_(GAMMA).add_(origin(seed))
            self.row_numbers = self.row_numbers.view(self.B, self.H, self.T, 1)
            self.word_numbers = torch.arange(self.words).mul_(GAMMA)
            self.z, self.spare = torch.empty((2, self.heads * self.rows * self.words), dtype=torch.int64).unbind()
            bits = BITS[self.narrow.itemsize]
            self.bits = None if bits == torch.int16 else torch.empty(self.elements, dtype=bits)

    def _documents(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T): a small number for each document, and the first position of its own."""
        values, numbers = torch.unique(ids, return_inverse=True)
        places = numbers + torch.arange(self.B)[:, None] * len(values)
        firsts = torch.full((self.B * len(values),), self.T)
        positions = torch.arange(self.T).repeat(self.B)
        firsts.scatter_reduce_(0, places.view(-1), positions, "amin")
        return numbers.to(self.wide), firsts[places]

    def heads_of(self) -> Iterator[tuple[int, slice]]:
        """The sequence and the heads that go together."""
        for b in range(self.B):
            for head in range(0, self.H, self.heads):
                yield b, slice(head, min(head + self.heads, self.H))

    def blocks(self, b: int) -> Iterator[_Block]:
        """The blocks of sequence b."""
        for first in range(0, self.T, self.rows):
            stop = min(first + self.rows, self.T)
            start = 0 if self.window is None else max(0, first - self.window + 1)
            if self.documents is not None:
                start = max(start, int(self.documents[1][b, first:stop].min()))
            yield _Block(first, stop, start // LANES * LANES)

    def scores(self, q: Tensor, k: Tensor, b: int, block: _Block, memory: Tensor) -> Tensor:
        """The scores of a block times log2(e), (heads, rows, keys) in `memory`; -inf where they are hidden."""
        first, stop, start = block
        rows, keys = stop - first, stop - start
        s = _take(memory, len(q), rows, keys)
        torch.baddbmm(s, q[:, first:stop], k[:, start:stop].mT, beta=0, alpha=self.scale * _LOG2E, out=s)
        s[..., keys - rows :].add_(self.future[:rows, :rows])
        if self.window is not None and stop - self.window > start:
            i = torch.arange(first, stop)[:, None]
            j = torch.arange(start, stop - self.window)
            s[..., : len(j)].add_(torch.zeros((), dtype=self.wide).where(j > i - self.window, -math.inf))
        if self.documents is not None:
            number = self.documents[0][b]
            same = torch.sub(number[first:stop, None], number[start:stop]).eq_(0)
            s.add_(same.reciprocal_().neg_().add_(1))  # 1 - 1/1 = 0, 1 - 1/0 = -inf
        return s

    def kept(self, b: int, heads: slice, block: _Block) -> Tensor:
        """The dropout mask of a block, (heads, rows, keys): the bits of numbers in the narrow dtype, all or none."""
        first, stop, start = block
        row_numbers = self.row_numbers[b, heads, first:stop]
        word_numbers = self.word_numbers[start // LANES : -(-stop // LANES)]
        shape = (*row_numbers.shape[:2], len(word_numbers))
        z = _take(self.z, *shape)
        torch.add(row_numbers, word_numbers, out=z)
        kept = lanes_(z, _take(self.spare, *shape), self.p)[..., : stop - start]
        return kept if self.bits is None else _take(self.bits, *kept.shape).copy_(kept)


def _take(memory: Tensor, *shape: int) -> Tensor:
    """A contiguous tensor of this shape at the start of some memory."""
    return memory[: math.prod(shape)].view(shape)


def _drop_(x: Tensor, kept: Tensor) -> Tensor:
    x.view(kept.dtype).bitwise_and_(kept)
    return x


@torch.library.custom_op("fastgpt::attention_in_blocks", mutates_args=())
def _attention(
    qkv: Tensor, scale: float, dropout_p: float, seed: Tensor | None, window: int | None, document_ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The output (B, T, H, D) and the log2 of the sums of the exponentials, (B, H, T, 1)."""
    with torch.autocast("cpu", enabled=False):
        plan = _Plan(qkv, scale, dropout_p, seed, window, document_ids)
        B, T, H, D, wide, narrow = plan.B, plan.T, plan.H, plan.D, plan.wide, plan.narrow
        out = qkv.new_empty((B, T, H, D))
        lse = qkv.new_empty((B, H, T, 1), dtype=wide)
        memory = torch.empty(plan.elements, dtype=wide)
        weights = torch.empty(plan.elements if narrow != wide else 0, dtype=narrow)
        for b, heads in plan.heads_of():
            q, k, v = qkv[b, :, :, heads].permute(1, 2, 0, 3)
            q, k, v = _dense(q, wide), _dense(k, wide), _dense(v, narrow)
            for block in plan.blocks(b):
                first, stop, start = block
                s = plan.scores(q, k, b, block, memory)
                top = s.amax(-1, keepdim=True)
                s.sub_(top).exp2_()
                total = s.sum(-1, keepdim=True)
                torch.add(top, total.log2(), out=lse[b, heads, first:stop])
                s.mul_(plan.keep / total)
                p = s if narrow == wide else _take(weights, *s.shape).copy_(s)
                if seed is not None:
                    _drop_(p, plan.kept(b, heads, block))
                o = out[b, first:stop, heads].transpose(0, 1)
                if out.dtype == narrow:
                    torch.bmm(p, v[:, start:stop], out=o)
                else:
                    o.copy_(torch.bmm(p, v[:, start:stop]))
    return out, lse


@_attention.register_fake
def _(
    qkv: Tensor, scale: float, dropout_p: float, seed: Tensor | None, window: int | None, document_ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    B, T, _, H, D = qkv.shape
    wide = torch.float64 if qkv.dtype == torch.float64 else torch.float32
    return qkv.new_empty((B, T, H, D)), qkv.new_empty((B, H, T, 1), dtype=wide)


@torch.library.custom_op("fastgpt::attention_in_blocks_backward", mutates_args=())
def _attention_backward(
    qkv: Tensor,
    lse: Tensor,
    dout: Tensor,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    window: int | None,
    document_ids: Tensor | None,
) -> Tensor:
    """The gradient of qkv, which lies in memory as qkv does."""
    with torch.autocast("cpu", enabled=False):
        plan = _Plan(qkv, scale, dropout_p, seed, window, document_ids)
        T, D, wide, narrow = plan.T, plan.D, plan.wide, plan.narrow
        dqkv = torch.empty_like(qkv)
        memory = torch.empty(plan.elements, dtype=wide)
        weights, products, slopes = torch.empty((3, plan.elements), dtype=narrow).unbind()
        factor = scale * plan.keep
        for b, heads in plan.heads_of():
            q, k, v = (_dense(x, narrow) for x in qkv[b, :, :, heads].permute(1, 2, 0, 3))
            q_wide, k_wide = q.to(wide), k.to(wide)
            do = _dense(dout[b, :, heads].transpose(0, 1), narrow)
            dq, dk, dv = dqkv[b, :, :, heads].permute(1, 2, 0, 3)
            dk_sum, dv_sum = torch.zeros((2, *k.shape), dtype=wide).unbind()
            for block in plan.blocks(b):
                first, stop, start = block
                queries, keys = slice(first, stop), slice(start, stop)
                s = plan.scores(q_wide, k_wide, b, block, memory)
                s.sub_(lse[b, heads, queries]).exp2_()
                p = s if narrow == wide else _take(weights, *s.shape).copy_(s)
                dp, ds = _take(products, *s.shape), _take(slopes, *s.shape)
                torch.bmm(do[:, queries], v[:, keys].mT, out=dp)
                kept = None if seed is None else plan.kept(b, heads, block)
                if kept is not None:
                    _drop_(dp, kept)
                torch.ops.aten._softmax_backward_data.out(dp, p, -1, narrow, grad_input=ds)
                if kept is not None:
                    _drop_(p, kept)
                if narrow == wide:
                    torch.baddbmm(dv_sum[:, keys], p.mT, do[:, queries], out=dv_sum[:, keys])
                    torch.baddbmm(dk_sum[:, keys], ds.mT, q[:, queries], out=dk_sum[:, keys])
                else:
                    dv_sum[:, keys].add_(torch.bmm(p.mT, do[:, queries]))
                    dk_sum[:, keys].add_(torch.bmm(ds.mT, q[:, queries]))
                o = dq[:, queries]
                if o.dtype == narrow:
                    torch.baddbmm(o, ds, k[:, keys], beta=0, alpha=factor, out=o)
                else:
                    o.copy_(torch.bmm(ds, k[:, keys]).mul_(factor))
            torch.mul(dk_sum, factor, out=dk)
            torch.mul(dv_sum, plan.keep, out=dv)
    return dqkv


@_attention_backward.register_fake
def _(
    qkv: Tensor,
    lse: Tensor,
    dout: Tensor,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    window: int | None,
    document_ids: Tensor | None,
) -> Tensor:
    return torch.empty_like(qkv)


def _dense(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype, memory_format=torch.contiguous_format).contiguous()


def _setup_context(
    ctx: Any,
    inputs: tuple[Tensor, float, float, Tensor | None, int | None, Tensor | None],
    output: tuple[Tensor, Tensor],
) -> None:
    qkv, ctx.scale, ctx.dropout_p, seed, ctx.window, document_ids = inputs
    _, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(qkv, lse, seed, document_ids)


def _differentiate(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    qkv, lse, seed, document_ids = ctx.saved_tensors
    dqkv: Tensor = _attention_backward(
        qkv, lse, dout, ctx.scale, ctx.dropout_p, seed, ctx.window, document_ids
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
    """Causal attention over a packed projection.

    Args:
        qkv: (B, T, 3, H, D), any floating-point dtype, any strides.
        scale: factor of the scores before the softmax, positive; 1 / sqrt(D) when None.
        dropout_p: probability, in [0, 1), of dropping an attention weight.
        seed: int in [0, 2^63) or int64 tensor of one element; needed where dropout_p > 0.
        window: position i sees j with i - window < j <= i; all before it when None.
        document_ids: (B, T) integers; i sees j only where their ids are equal.

    Returns:
        (B, T, H, D), contiguous, in the dtype of qkv.

    Raises:
        UnsupportedInput: for arguments outside these.
    """
    reasons = checks.against_attention(qkv, scale, dropout_p, seed, window, document_ids)
    raise_if_any(reasons, "causal_attention", "torch", REMEDY)
    factor = scale or 1.0 / math.sqrt(qkv.shape[-1])
    key = None if dropout_p == 0.0 or seed is None else seed_tensor(seed, qkv.device)
    if qkv.device.type == "cpu":
        band = None if window is None or window >= qkv.shape[1] else window
        out: Tensor = _attention(qkv, factor, dropout_p, key, band, document_ids)[0]
        return out
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # views, each (B, H, T, D)
    if key is not None:
        scores = (q @ k.mT) * factor
        weights = scores.masked_fill(~visible(qkv, window, document_ids), -math.inf).softmax(-1)
        out = seeded_dropout(weights, dropout_p, key) @ v
    elif window is None and document_ids is None:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    else:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible(qkv, window, document_ids), scale=scale)
    return out.transpose(1, 2).contiguous()
