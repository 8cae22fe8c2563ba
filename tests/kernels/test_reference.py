import pytest
import torch
from fastgpt_kernels import reference
from torch.autograd import gradcheck


def double(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def test_attention_has_the_gradient_of_its_finite_differences():
    assert gradcheck(reference.causal_attention, double(2, 5, 3, 2, 4))
    assert gradcheck(lambda x: reference.causal_attention(x, scale=0.3, dropout_p=0.4, seed=5), double(1, 6, 3, 2, 3))


def test_banded_and_packed_attention_have_the_gradients_of_their_finite_differences():
    ids = torch.tensor([[3, 3, 3, 1, 1, 3], [0, 0, 5, 5, 5, 5]])
    assert gradcheck(lambda x: reference.causal_attention(x, window=2), double(1, 6, 3, 2, 3))
    assert gradcheck(
        lambda x: reference.causal_attention(x, window=3, document_ids=ids, dropout_p=0.2, seed=1),
        double(2, 6, 3, 1, 3),
    )


def test_decoding_has_the_gradient_of_its_finite_differences():
    lengths = torch.tensor([3, 5])
    assert gradcheck(
        lambda q, k, v: reference.decode_attention(q, k, v, lengths),
        (double(2, 2, 3), double(2, 2, 5, 3), double(2, 2, 5, 3)),
    )


def test_layer_norm_has_the_gradient_of_its_finite_differences():
    assert gradcheck(reference.layer_norm, (double(3, 7), double(7), double(7)))


def test_add_layer_norm_has_the_gradient_of_its_finite_differences():
    for p in (0.0, 0.4):
        assert gradcheck(
            lambda *xs, p=p: reference.add_layer_norm(*xs, dropout_p=p, seed=3),
            (double(3, 7), double(3, 7), double(7), double(7)),
        )


def test_gelu_has_the_gradient_of_its_finite_differences():
    for form in ("tanh", "none"):
        assert gradcheck(lambda x, form=form: reference.gelu(x, form), double(3, 5))
        assert gradcheck(lambda x, b, form=form: reference.bias_gelu(x, b, form), (double(3, 5), double(5)))
        assert gradcheck(
            lambda x, w, b, form=form: reference.linear_gelu(x, w, b, form), (double(3, 5), double(4, 5), double(4))
        )


def test_dropout_has_the_gradient_of_its_finite_differences():
    assert gradcheck(lambda x: reference.dropout(x, 0.5, 7), double(3, 5))
    assert gradcheck(lambda x, r: reference.dropout_add(x, r, 0.5, 7), (double(3, 5), double(3, 5)))


def test_embedding_has_the_gradient_of_its_finite_differences():
    tokens = torch.tensor([[0, 2, 2], [1, 2, 0]])
    for p in (0.0, 0.4):
        assert gradcheck(
            lambda *tables, p=p: reference.embedding(tokens, *tables, dropout_p=p, seed=3), (double(4, 3), double(5, 3))
        )


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_cross_entropy_has_the_gradient_of_its_finite_differences(reduction):
    targets = torch.tensor([1, -100, 0, 4])
    assert gradcheck(lambda z: reference.cross_entropy(z, targets, reduction=reduction), double(4, 5))
    assert gradcheck(
        lambda x, w: reference.linear_cross_entropy(x, w, targets, reduction=reduction), (double(4, 3), double(5, 3))
    )


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
