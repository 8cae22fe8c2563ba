"""Causal attention, and attention of one query over a cache."""

import pytest
import torch
from fastgpt_kernels.reference import visible

from benchmarks import masks
from benchmarks.shapes import ATTENTION, DECODE
from benchmarks.work import Work, bytes_of


@pytest.mark.operation("causal_attention", cases=ATTENTION, directions=("forward", "backward", "both"))
def test_causal_attention(case, contender, contender_name, device, draw, check, measure):
    B, T, H, D = case[:4]
    qkv = draw(B, T, 3, H, D)
    ids = None
    if case.documents:
        ids = (torch.arange(T, device=device) * case.documents // T).expand(B, T)

    mask = None
    if hasattr(contender, "masked_attention") and (case.window is not None or ids is not None):
        mask = visible(qkv, case.window, ids).expand(B, 1, T, T)

    def attend(ops, *parts, ids=ids, mask=mask, dropout_p=case.dropout_p):
        if mask is not None and hasattr(ops, "masked_attention"):
            return ops.masked_attention(*parts, mask, dropout_p=dropout_p)
        # a number: ours stays on the host, where no call waits for it
        options = {"window": case.window, "document_ids": ids, "dropout_p": dropout_p, "seed": 1}
        if hasattr(ops, "attend"):
            return ops.attend(*parts, **options)
        return ops.causal_attention(parts[0] if len(parts) == 1 else torch.stack(parts, 2), **options)

    def attend_few(ops, *parts):
        return attend(
            ops, *parts, ids=None if ids is None else ids[:2], mask=None if mask is None else mask[:2], dropout_p=0.0
        )

    def dropout():
        assert_dropout_is_fair(lambda *xs: attend(contender, *xs), parts)
        if contender_name == "triton":
            masks.assert_attention_as_close(
                lambda x: attend(contender, x), few[0], masks.rate_of(contender, case.dropout_p)
            )

    parts = qkv.unbind(2) if hasattr(contender, "attend") else (qkv,)
    heads = 2 if T <= 1024 else 1  # the oracle holds T x T weights in float64
    few = [x[:2, :, ..., :heads, :] for x in parts]
    check(attend_few, *few, also=dropout if case.dropout_p else None)
    pairs = B * visible_pairs(case)
    work = Work(
        "FLOP",
        "4 D H for each pair of positions that see each other, T (T + 1) / 2 of them in a sequence without window and "
        "documents (2 products); backward: 10 D H (5 products)",
        4 * D * H * pairs,
        10 * D * H * pairs,
    )
    measure(attend, *parts, work=work)


def visible_pairs(case):
    """How many positions the positions of a sequence see, in all."""
    i = torch.arange(case.T)
    first = torch.zeros_like(i) if case.window is None else (i - case.window + 1).clamp(min=0)
    if case.documents:
        number = i * case.documents // case.T
        first = torch.maximum(first, (number * case.T + case.documents - 1) // case.documents)
    return (i - first + 1).sum().item()


def assert_dropout_is_fair(call, parts):
    """With values of 1, the output is the sum of the kept weights: 1 on average, and not always."""
    ones = [x.clone() for x in parts]
    (ones[0][:, :, 2] if len(ones) == 1 else ones[2]).fill_(1.0)
    sums = call(*ones).float()
    assert abs(sums.mean().item() - 1.0) < 0.05 and sums.std().item() > 1e-3


@pytest.mark.operation("decode_attention", cases=DECODE, directions=("call",))
def test_decode_attention(case, contender, device, draw, check_output, measure):
    B, T, H, D = case[:4]
    q, k_cache, v_cache = draw(B, H, D), draw(B, H, T, D), draw(B, H, T, D)
    lengths = T - torch.arange(B, device=device) % (T // 4)

    mask = (torch.arange(T, device=device) < lengths[:, None])[:, None, None]

    def attend(ops, q, k_cache, v_cache, lengths):
        if hasattr(ops, "masked_decode_attention"):
            return ops.masked_decode_attention(q, k_cache, v_cache, mask[: len(q)])
        return ops.decode_attention(q, k_cache, v_cache, lengths)

    check_output(attend, q[:2, :2], k_cache[:2, :2], v_cache[:2, :2], lengths[:2])
    used = lengths.sum().item() * H * D * q.element_size()
    work = Work("byte", "read q, and the used keys and values; write the output", 2 * used + 2 * bytes_of(q))
    measure(attend, q, k_cache, v_cache, lengths, work=work)
