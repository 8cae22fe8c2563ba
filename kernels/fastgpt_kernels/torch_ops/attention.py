"""Causal attention by PyTorch: `scaled_dot_product_attention`, and on a CPU blocks of queries over batched products.

    s_ij = scale q_i . k_j over the j that i sees    p_i = softmax(s_i)          o_i = sum_j z_ij p_ij v_j
    dv_j = sum_i z_ij p_ij do_i                      ds_ij = p_ij (z_ij do_i . v_j - sum_j p_ij z_ij do_i . v_j)
    dq_i = scale sum_j ds_ij k_j                     dk_j = scale sum_i ds_ij q_i

z is 1, or with dropout kept / (1 - p), with the p of `fastgpt_kernels.seeds.rate`.

Nothing is kept for the backward but qkv: PyTorch's softmax, all of a row in one go, takes less time than the passes
that a kept log(sum exp) would leave.

What is hidden becomes -inf whatever it was: bits are cleared and set, because -inf added to inf or NaN is NaN, and
PyTorch's `masked_fill_` takes many times as long on a CPU.
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
from fastgpt_kernels.seeds import GAMMA, LANES, lanes_, origin, rate, seed_tensor, seeded_dropout
from fastgpt_kernels.torch_ops.dropout import BITS

# Queries of a block. At least four blocks share a sequence: sums over queries that are long round more.
MOST_ROWS, FEWEST_ROWS = 128, 32
SCORES = 2**20  # of a block in all heads that go together, for each thread


class _Group(NamedTuple):
    """Sequences and heads that go together."""

    sequences: slice
    heads: slice


class _Block(NamedTuple):
    """Queries `first` to `stop` of each sequence; the keys that they may see begin at `start`, a multiple of LANES."""

    first: int
    stop: int
    start: int


class _Plan:
    """What both directions share: groups, their blocks, scores with what is hidden, the dropout mask, memory."""

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
        self.rows = min(max(1, self.T), MOST_ROWS, max(FEWEST_ROWS, self.T // 4 // FEWEST_ROWS * FEWEST_ROWS))
        together = max(1, SCORES * torch.get_num_threads() // max(1, self.rows * self.T))
        # at least one of each, for the sake of the loops over none
        self.heads = max(1, min(self.H, together))
        self.sequences = max(1, min(self.B, together // max(1, self.H)))
        self.elements = self.sequences * self.heads * self.rows * self.T
        self.bits_of_scores = BITS[self.wide.itemsize]
        self.infinity = int(torch.tensor(-math.inf, dtype=self.wide).view(self.bits_of_scores))
        self.past = self.masks(torch.ones((self.rows, self.rows), dtype=torch.bool).tril())
        self.documents = None if document_ids is None else numbered_documents(document_ids)
        self.keep = 1.0 if seed is None else 1.0 / (1.0 - rate(dropout_p))
        if seed is not None:
            words = -(-self.T // LANES)  # numbers for a row of the mask (B, H, T, T), as `mask_parts` has them
            numbers = torch.arange(self.B * self.H * self.T).mul_(words).mul_(GAMMA).add_(origin(seed))
            self.row_numbers = numbers.view(self.B, self.H, self.T, 1)
            self.word_numbers = torch.arange(words).mul_(GAMMA)
            drawn = self.sequences * self.heads * self.rows * words
            self.z, self.spare = torch.empty((2, drawn), dtype=torch.int64).unbind()
            bits = 0 if self.narrow == torch.bfloat16 else self.elements
            self.bits = torch.empty(bits, dtype=self.bits_of_scores)

    def masks(self, seen: Tensor) -> tuple[Tensor, Tensor]:
        """What of the bits of a score to keep, all or none, and what to set: none, or those of -inf."""
        keep = seen.to(self.bits_of_scores).neg_()
        return keep, keep.bitwise_not().bitwise_and_(self.infinity)

    def groups(self) -> Iterator[_Group]:
        """All of B and H, in the parts that go together."""
        for b in range(0, self.B, self.sequences):
            for head in range(0, self.H, self.heads):
                yield _Group(slice(b, min(b + self.sequences, self.B)), slice(head, min(head + self.heads, self.H)))

    def blocks(self, group: _Group) -> Iterator[_Block]:
        """The blocks of a group."""
        for first in range(0, self.T, self.rows):
            stop = min(first + self.rows, self.T)
            start = 0 if self.window is None else max(0, first - self.window + 1)
            if self.documents is not None:
                start = max(start, int(self.documents[1][group.sequences, first:stop].min()))
            yield _Block(first, stop, start // LANES * LANES)

    def scores(self, q: Tensor, k: Tensor, group: _Group, block: _Block, memory: Tensor) -> Tensor:
        """Those of a block in `memory`, (sequences, heads, rows, keys); -inf where they are hidden.

        q (sequences, heads, rows, D); k (sequences, heads, T, D).
        """
        first, stop, start = block
        rows, keys = stop - first, stop - start
        s = take(memory, *q.shape[:3], keys)
        flat = s.flatten(0, 1)
        torch.baddbmm(flat, q.flatten(0, 1), k.flatten(0, 1)[:, start:stop].mT, beta=0, alpha=self.scale, out=flat)
        hide_(s[..., keys - rows :], *(mask[:rows, :rows] for mask in self.past))
        if self.window is not None and stop - self.window > start:
            i = torch.arange(first, stop)[:, None]
            j = torch.arange(start, stop - self.window)
            hide_(s[..., : len(j)], *self.masks(j > i - self.window))
        if self.documents is not None:
            number = self.documents[0][group.sequences, None]
            hide_(s, *self.masks(number[..., first:stop, None] == number[..., None, start:stop]))
        return s

    def kept(self, group: _Group, block: _Block) -> Tensor:
        """The dropout mask of a block, (sequences, heads, rows, keys): all bits of a narrow number, or none."""
        first, stop, start = block
        row_numbers = self.row_numbers[group.sequences, group.heads, first:stop]
        word_numbers = self.word_numbers[start // LANES : -(-stop // LANES)]
        z = take(self.z, *row_numbers.shape[:3], len(word_numbers))
        torch.add(row_numbers, word_numbers, out=z)
        kept = lanes_(z, take(self.spare, *z.shape), self.p)[..., : stop - start]
        return kept if self.narrow == torch.bfloat16 else copy(kept, self.bits)

    def sequence(self, dtype: torch.dtype) -> Tensor:
        """Memory for all rows of a group's heads."""
        return torch.empty(self.sequences * self.heads * self.T * self.D, dtype=dtype)

    def queries(self, dtype: torch.dtype) -> Tensor:
        """Memory for the rows of a block."""
        return torch.empty(self.sequences * self.heads * self.rows * self.D, dtype=dtype)

    def operand(self, x: Tensor, block: _Block, memory: Tensor) -> Tensor:
        """A block's keys of x (sequences, heads, T, D) for a product; in bfloat16 dense, or it would copy them itself.

        It would take fresh memory for that, each time.
        """
        keys = x.flatten(0, 1)[:, block.start : block.stop]
        return keys if self.narrow == self.wide or keys.is_contiguous() else copy(keys, memory)


def numbered_documents(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Of ids (B, T), two (B, T): a small number for each document, int32, and the first position that has it."""
    B, T = ids.shape
    values, numbers = torch.unique(ids, return_inverse=True)
    places = numbers + torch.arange(B)[:, None] * len(values)
    firsts = torch.full((B * len(values),), T)
    firsts.scatter_reduce_(0, places.view(-1), torch.arange(T).repeat(B), "amin")
    return numbers.to(torch.int32), firsts[places]


def take(memory: Tensor, *shape: int) -> Tensor:
    """A dense tensor of this shape at the start of some memory."""
    return memory[: math.prod(shape)].view(shape)


def copy(x: Tensor, memory: Tensor) -> Tensor:
    """x, dense and in the dtype of some memory, there."""
    return take(memory, *x.shape).copy_(x)


def hide_(scores: Tensor, keep: Tensor, infinity: Tensor) -> None:
    """Make -inf of the scores that are hidden, by `_Plan.masks`."""
    scores.view(keep.dtype).bitwise_and_(keep).bitwise_or_(infinity)


def drop_(x: Tensor, kept: Tensor) -> None:
    """Clear the bits of all that is not kept."""
    x.view(kept.dtype).bitwise_and_(kept)


@torch.library.custom_op("fastgpt::attention_in_blocks", mutates_args=())
def _attention(
    qkv: Tensor, scale: float, dropout_p: float, seed: Tensor | None, window: int | None, document_ids: Tensor | None
) -> Tensor:
    """The output (B, T, H, D)."""
    with torch.autocast("cpu", enabled=False):
        plan = _Plan(qkv, scale, dropout_p, seed, window, document_ids)
        B, T, H, D, wide, narrow = plan.B, plan.T, plan.H, plan.D, plan.wide, plan.narrow
        out = qkv.new_empty((B, T, H, D))
        memory = torch.empty(plan.elements, dtype=wide)
        weights = memory if narrow == wide else torch.empty(plan.elements, dtype=narrow)
        k_memory, v_memory, keys_memory = plan.sequence(wide), plan.sequence(narrow), plan.sequence(narrow)
        q_memory, o_memory = plan.queries(wide), plan.queries(narrow)
        for group in plan.groups():
            q, k, v = qkv[group.sequences, :, :, group.heads].permute(2, 0, 3, 1, 4)
            k, v = copy(k, k_memory), copy(v, v_memory)
            for block in plan.blocks(group):
                rows = slice(block.first, block.stop)
                s = plan.scores(copy(q[:, :, rows], q_memory), k, group, block, memory)
                torch.softmax(s, -1, out=s)
                if seed is not None:
                    s.mul_(plan.keep)
                p = s if narrow == wide else copy(s, weights)
                if seed is not None:
                    drop_(p, plan.kept(group, block))
                o = take(o_memory, *p.shape[:3], D)
                torch.bmm(p.flatten(0, 1), plan.operand(v, block, keys_memory), out=o.flatten(0, 1))
                out[group.sequences, rows, group.heads] = o.transpose(1, 2)
    return out


@_attention.register_fake
def _(
    qkv: Tensor, scale: float, dropout_p: float, seed: Tensor | None, window: int | None, document_ids: Tensor | None
) -> Tensor:
    B, T, _, H, D = qkv.shape
    return qkv.new_empty((B, T, H, D))


@torch.library.custom_op("fastgpt::attention_in_blocks_backward", mutates_args=())
def _attention_backward(
    qkv: Tensor,
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
        wide, narrow = plan.wide, plan.narrow
        dqkv = torch.empty_like(qkv)
        memory = torch.empty(plan.elements, dtype=wide)
        weights = torch.empty(plan.elements, dtype=narrow)
        # once the weights are rounded, the memory of their scores is free
        products, slopes = (
            torch.empty((2, plan.elements), dtype=wide) if narrow == wide else memory.view(narrow).view(2, -1)
        ).unbind()
        exact_memory, dk_memory, dv_memory = (plan.sequence(wide) for _ in range(3))
        k_memory, v_memory, keys_memory = (plan.sequence(narrow) for _ in range(3))
        q_exact_memory = plan.queries(wide)
        q_memory, do_memory, dq_memory = (plan.queries(narrow) for _ in range(3))
        factor = scale * plan.keep
        for group in plan.groups():
            q, k, v = qkv[group.sequences, :, :, group.heads].permute(2, 0, 3, 1, 4)
            dq, dk, dv = dqkv[group.sequences, :, :, group.heads].permute(2, 0, 3, 1, 4)
            do = dout[group.sequences, :, group.heads].transpose(1, 2)
            k_exact = copy(k, exact_memory)
            k = k_exact if narrow == wide else copy(k, k_memory)
            v = copy(v, v_memory)
            dk_sum, dv_sum = take(dk_memory, *k.shape).zero_(), take(dv_memory, *k.shape).zero_()
            for block in plan.blocks(group):
                rows = slice(block.first, block.stop)
                q_rows, do_rows = copy(q[:, :, rows], q_memory), copy(do[:, :, rows], do_memory).flatten(0, 1)
                s = plan.scores(
                    q_rows if narrow == wide else copy(q_rows, q_exact_memory), k_exact, group, block, memory
                )
                torch.softmax(s, -1, out=s)
                p = s if narrow == wide else copy(s, weights)
                dp, ds = take(products, *s.shape), take(slopes, *s.shape)
                torch.bmm(do_rows, plan.operand(v, block, keys_memory).mT, out=dp.flatten(0, 1))
                kept = None if seed is None else plan.kept(group, block)
                if kept is not None:
                    drop_(dp, kept)
                torch.ops.aten._softmax_backward_data.out(dp, p, -1, narrow, grad_input=ds)
                if kept is not None:
                    drop_(p, kept)
                p, ds, flat_q = p.flatten(0, 1), ds.flatten(0, 1), q_rows.flatten(0, 1)
                for sums, left, right in ((dv_sum, p, do_rows), (dk_sum, ds, flat_q)):
                    part = sums.flatten(0, 1)[:, block.start : block.stop]
                    if narrow == wide:
                        torch.baddbmm(part, left.mT, right, out=part)
                    else:
                        part.add_(torch.bmm(left.mT, right, out=take(keys_memory, *part.shape)))
                dq_rows = take(dq_memory, *flat_q.shape)
                torch.baddbmm(dq_rows, ds, plan.operand(k, block, keys_memory), beta=0, alpha=factor, out=dq_rows)
                dq[:, :, rows] = dq_rows.view(q_rows.shape)
            torch.mul(dk_sum, factor, out=dk)
            torch.mul(dv_sum, plan.keep, out=dv)
    return dqkv


@_attention_backward.register_fake
def _(
    qkv: Tensor,
    dout: Tensor,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    window: int | None,
    document_ids: Tensor | None,
) -> Tensor:
    return torch.empty_like(qkv)


def _setup_context(
    ctx: Any,
    inputs: tuple[Tensor, float, float, Tensor | None, int | None, Tensor | None],
    output: Tensor,
) -> None:
    qkv, ctx.scale, ctx.dropout_p, seed, ctx.window, document_ids = inputs
    ctx.save_for_backward(qkv, seed, document_ids)


def _differentiate(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    qkv, seed, document_ids = ctx.saved_tensors
    dqkv: Tensor = _attention_backward(qkv, dout, ctx.scale, ctx.dropout_p, seed, ctx.window, document_ids)
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
        band = None if window is None or window >= qkv.shape[1] else checks.integer(window)
        out: Tensor = _attention(qkv, factor, dropout_p, key, band, document_ids)
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
