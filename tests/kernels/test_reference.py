import torch
from fastgpt_kernels import reference
from torch.autograd import gradcheck


def double(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def test_attention_has_the_gradient_of_its_finite_differences():
    assert gradcheck(reference.causal_attention, double(2, 5, 3, 2, 4))
    assert gradcheck(lambda x: reference.causal_attention(x, scale=0.3, dropout_p=0.4, seed=5), double(1, 6, 3, 2, 3))


def test_layer_norm_has_the_gradient_of_its_finite_differences():
    assert gradcheck(reference.layer_norm, (double(3, 7), double(7), double(7)))


def test_gelu_has_the_gradient_of_its_finite_differences():
    for form in ("tanh", "none"):
        assert gradcheck(lambda x, form=form: reference.gelu(x, form), double(3, 5))
        assert gradcheck(lambda x, b, form=form: reference.bias_gelu(x, b, form), (double(3, 5), double(5)))


def test_dropout_has_the_gradient_of_its_finite_differences():
    assert gradcheck(lambda x: reference.dropout(x, 0.5, 7), double(3, 5))


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
