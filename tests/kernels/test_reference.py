from collections.abc import Callable
from typing import Any

import pytest
import torch
from fastgpt_kernels import Ops, reference
from torch.autograd import gradcheck


def double(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


IDS = torch.tensor([[3, 3, 3, 1, 1, 3], [0, 0, 5, 5, 5, 5]])
LENGTHS = torch.tensor([3, 5])
TOKENS = torch.tensor([[0, 2, 2], [1, 2, 0]])
TARGETS = torch.tensor([1, -100, 0, 4])
Arguments = tuple[tuple[int, ...], ...]  # shapes
CALLS: dict[str, list[tuple[Callable[..., Any], Arguments]]] = {
    "causal_attention": [
        (reference.causal_attention, ((2, 5, 3, 2, 4),)),
        (lambda x: reference.causal_attention(x, scale=0.3, dropout_p=0.4, seed=5), ((1, 6, 3, 2, 3),)),
        (lambda x: reference.causal_attention(x, window=2), ((1, 6, 3, 2, 3),)),
        (lambda x: reference.causal_attention(x, document_ids=IDS), ((2, 6, 3, 1, 3),)),
        (
            lambda x: reference.causal_attention(x, window=3, document_ids=IDS, dropout_p=0.2, seed=1),
            ((2, 6, 3, 1, 3),),
        ),
    ],
    "decode_attention": [
        (lambda *xs: reference.decode_attention(*xs, LENGTHS), ((2, 2, 3), (2, 2, 5, 3), (2, 2, 5, 3))),
        (lambda *xs: reference.decode_attention(*xs, LENGTHS, scale=0.3), ((2, 1, 3), (2, 1, 5, 3), (2, 1, 5, 3))),
    ],
    "layer_norm": [
        (reference.layer_norm, ((3, 7), (7,), (7,))),
        (lambda *xs: reference.layer_norm(*xs, eps=0.5), ((2, 1), (1,), (1,))),
    ],
    "add_layer_norm": [
        (reference.add_layer_norm, ((3, 7), (3, 7), (7,), (7,))),
        (lambda *xs: reference.add_layer_norm(*xs, 0.5, dropout_p=0.4, seed=3), ((3, 7), (3, 7), (7,), (7,))),
    ],
    "gelu": [(lambda x, form=form: reference.gelu(x, form), ((3, 5),)) for form in ("tanh", "none")],
    "bias_gelu": [(lambda *xs, form=form: reference.bias_gelu(*xs, form), ((3, 5), (5,))) for form in ("tanh", "none")],
    "linear": [(reference.linear, ((3, 5), (4, 5), (4,)))],
    "linear_gelu": [
        (lambda *xs, form=form: reference.linear_gelu(*xs, form), ((3, 5), (4, 5), (4,))) for form in ("tanh", "none")
    ],
    "embedding": [
        (lambda *xs: reference.embedding(TOKENS, *xs), ((4, 3), (5, 3))),
        (lambda *xs: reference.embedding(TOKENS, *xs, dropout_p=0.4, seed=3), ((4, 3), (5, 3))),
    ],
    "dropout": [
        (lambda x: reference.dropout(x, 0.5, 7), ((3, 5),)),
        (lambda x: reference.dropout(x * 1.0, 0.0, None), ((3, 5),)),
    ],
    "dropout_add": [
        (lambda *xs: reference.dropout_add(*xs, 0.5, 7), ((3, 5), (3, 5))),
        (lambda *xs: reference.dropout_add(*xs, 0.0, None), ((3, 5), (3, 5))),
    ],
    "logits": [(reference.logits, ((2, 4, 3), (5, 3)))],
    "cross_entropy": [
        (lambda z, how=how: reference.cross_entropy(z, TARGETS, reduction=how), ((4, 5),))
        for how in ("mean", "sum", "none")
    ],
    "linear_cross_entropy": [
        (lambda *xs, how=how: reference.linear_cross_entropy(*xs, TARGETS, reduction=how), ((4, 3), (5, 3)))
        for how in ("mean", "sum", "none")
    ],
}


@pytest.mark.parametrize("operation", Ops._fields[1:])
def test_each_operation_has_the_gradient_of_its_finite_differences(operation):
    for call, shapes in CALLS[operation]:
        assert gradcheck(call, tuple(double(*shape) for shape in shapes))


def test_attention_agrees_with_a_loop_over_positions():
    qkv = double(1, 4, 3, 1, 2).detach()
    q, k, v = qkv[0, :, :, 0].unbind(1)
    for i in range(4):
        weights = torch.exp(k[: i + 1] @ q[i] / 2**0.5)
        expected = (weights / weights.sum()) @ v[: i + 1]
        torch.testing.assert_close(reference.causal_attention(qkv)[0, i, 0], expected)


def test_the_two_forms_of_gelu_are_near_each_other():
    x = torch.linspace(-5, 5, 1001, dtype=torch.float64)
    difference = (reference.gelu(x, "tanh") - reference.gelu(x, "none")).abs().max().item()
    assert 1e-4 < difference < 1e-3


def test_a_band_and_documents_hide_what_they_should():
    qkv = torch.zeros(1, 5, 3, 1, 2)
    ids = torch.tensor([[0, 0, 1, 1, 0]])
    seen = reference.visible(qkv, window=3, document_ids=ids)[0, 0]
    pairs = {(i, j) for i in range(5) for j in range(5) if i - 3 < j <= i and ids[0, i] == ids[0, j]}
    assert {tuple(pair) for pair in seen.nonzero().tolist()} == pairs


def test_decoding_is_the_last_row_of_attention():
    qkv = double(2, 6, 3, 2, 4).detach()
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    for length in range(1, 7):
        lengths = torch.full((2,), length)
        expected = reference.causal_attention(qkv[:, :length])[:, -1]
        torch.testing.assert_close(reference.decode_attention(q[:, :, length - 1], k, v, lengths), expected)


def test_decoding_of_nothing_is_zero_and_unused_places_do_not_count():
    cache = torch.full((1, 1, 3, 4), torch.nan, dtype=torch.float64)
    out = reference.decode_attention(double(1, 1, 4).detach(), cache, cache, torch.tensor([0]))
    assert torch.equal(out, torch.zeros_like(out))


def test_cross_entropy_agrees_with_torch():
    logits, targets = double(6, 5).detach(), torch.tensor([0, 4, -1, 2, 2, -1])
    for reduction in ("mean", "sum", "none"):
        ours = reference.cross_entropy(logits, targets, ignore_index=-1, reduction=reduction)
        theirs = torch.nn.functional.cross_entropy(logits, targets, ignore_index=-1, reduction=reduction)
        torch.testing.assert_close(ours, theirs)


def test_layer_norm_and_gelu_agree_with_torch():
    x, weight, bias = double(4, 7).detach(), double(7).detach(), double(7).detach()
    expected = torch.nn.functional.layer_norm(x, (7,), weight, bias, 0.1)
    torch.testing.assert_close(reference.layer_norm(x, weight, bias, 0.1), expected)
    for form in ("tanh", "none"):
        expected = torch.nn.functional.gelu(x + bias, approximate=form)
        torch.testing.assert_close(reference.bias_gelu(x, bias, form), expected)


def test_dropout_and_a_norm_act_on_the_sum_that_is_returned():
    x, residual, weight, bias = (double(*shape).detach() for shape in ((4, 7), (4, 7), (7,), (7,)))
    normed, total = reference.add_layer_norm(x, residual, weight, bias, dropout_p=0.4, seed=3)
    torch.testing.assert_close(total, residual + reference.dropout(x, 0.4, 3))
    torch.testing.assert_close(normed, reference.layer_norm(total, weight, bias))
