import importlib

import pytest
import torch
from fastgpt_kernels import UnsupportedInput, gelu, load_ops
from fastgpt_kernels.testing import assert_as_close_as_torch, output_and_gradients
from hypothesis import given, settings
from hypothesis import strategies as st

# of this name the package holds the function
torch_gelu = importlib.import_module("fastgpt_kernels.torch_ops.gelu")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1, 1), (3, 7), (2, 1023), (2, 3, 64), (70, 300)]
FORMS = ["tanh", "none"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (), pytest.param((8192, 3072), marks=pytest.mark.gpu)])
def test_gelu_is_as_close_to_the_mathematics_as_torch(shape, dtype, form, device, triton_ops):
    x = (3.0 * torch.randn(shape)).to(device, dtype)
    assert_as_close_as_torch(lambda ops, x: ops.gelu(x, form), x, ops=triton_ops)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, pytest.param((8192, 3072), marks=pytest.mark.gpu)])
def test_bias_gelu_is_as_close_to_the_mathematics_as_torch(shape, dtype, form, device, triton_ops):
    x, bias = ((3.0 * torch.randn(s)).to(device, dtype) for s in (shape, shape[-1:]))
    assert_as_close_as_torch(lambda ops, x, bias: ops.bias_gelu(x, bias, form), x, bias, ops=triton_ops)


@pytest.mark.parametrize("form", FORMS)
def test_far_from_zero_it_is_the_identity_or_zero(form, device, triton_ops):
    x = torch.tensor([-1e12, -1e4, -40.0, 40.0, 1e4, 1e12], device=device)
    assert torch.equal(triton_ops.gelu(x, form), x.clamp(min=0.0))


@settings(max_examples=20, deadline=None)
@given(x=st.floats(-20.0, 20.0, width=32))
def test_gelu_of_x_less_gelu_of_minus_x_is_x(x):
    both = torch.tensor([x, -x], device="cuda" if torch.cuda.is_available() else "cpu")
    y = load_ops("triton").gelu(both)
    torch.testing.assert_close(y[0] - y[1], both[0])


def test_the_bias_gradient_is_summed_before_rounding(device, triton_ops):
    x, bias = torch.randn(9, 40, device=device).half(), torch.randn(40, device=device)
    out, dx, dbias = output_and_gradients(triton_ops.bias_gelu, [x, bias])
    exact = output_and_gradients(triton_ops.bias_gelu, [x.float(), bias])
    assert torch.equal(out, exact[0].half().double()) and torch.equal(dx, exact[1].half().double())
    assert torch.equal(dbias, exact[2])


def test_views_are_taken(device, triton_ops):
    x, bias = torch.randn(6, 5, 40, device=device), torch.randn(80, device=device)
    assert_as_close_as_torch(lambda ops, x: ops.gelu(x), x.transpose(0, 2), ops=triton_ops)
    assert_as_close_as_torch(lambda ops, x, b: ops.bias_gelu(x, b), x.transpose(0, 1), bias[::2], ops=triton_ops)


def test_a_repeat_gives_the_same_bits(device, triton_ops):
    tensors = [torch.randn(shape, device=device).half() for shape in ((300, 300), (300,))]
    first, second = (output_and_gradients(triton_ops.bias_gelu, tensors) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.usefixtures("triton_ops")
def test_torch_library_finds_the_ops_well_formed(device):
    x, bias = (torch.randn(shape, device=device, requires_grad=True) for shape in ((3, 40), (40,)))
    torch.library.opcheck(gelu._gelu, (x, "tanh"))
    torch.library.opcheck(gelu._bias_gelu, (x, bias, "none"))


def test_every_reason_against_an_input_is_given(device, triton_ops):
    x = torch.zeros(0, 4, dtype=torch.float64, device=device)
    with pytest.raises(UnsupportedInput) as error:
        triton_ops.gelu(x)
    assert error.value.reasons == (
        "x is torch.float64; supported: float32, float16, bfloat16",
        "x has shape (0, 4); it needs at least one element",
    )
    with pytest.raises(UnsupportedInput, match="approximate is 'erf'; it must be 'tanh' or 'none'"):
        triton_ops.gelu(x, "erf")
    with pytest.raises(UnsupportedInput, match=r"bias has shape \(3,\)"):
        triton_ops.bias_gelu(x, torch.zeros(3, device=device))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (), (0, 4), (70, 3000)])
def test_the_torch_backend_is_as_close_too(shape, dtype, form):
    if 0 in shape:
        x = torch.zeros(shape, dtype=dtype, requires_grad=True)
        load_ops("torch").gelu(x, form).sum().backward()
        assert x.grad.shape == shape
        return
    x = (3.0 * torch.randn(shape)).to(dtype)
    assert_as_close_as_torch(lambda ops, x: ops.gelu(x, form), x, ops=load_ops("torch"))
    if shape:
        bias = torch.randn(shape[-1]).to(dtype)
        assert_as_close_as_torch(lambda ops, x, bias: ops.bias_gelu(x, bias, form), x, bias, ops=load_ops("torch"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_torch_backend_s_composed_form_is_well_formed(dtype):
    x = torch.randn(3, 40, dtype=dtype)
    torch.library.opcheck(torch_gelu._gelu_tanh_16, (x, False))
    torch.library.opcheck(torch_gelu._gelu_tanh_16, (x.t().requires_grad_(), True))
    ops = load_ops("torch")
    compiled = torch.compile(lambda x: ops.gelu(x * 2.0), fullgraph=True, backend="aot_eager")
    for ours, eager in zip(
        output_and_gradients(compiled, [x]), output_and_gradients(lambda x: ops.gelu(x * 2.0), [x]), strict=True
    ):
        assert torch.equal(ours, eager)


def test_the_torch_backend_s_result_depends_on_neither_chunks_nor_threads(monkeypatch):
    x = torch.randn(1000, dtype=torch.bfloat16)
    whole = output_and_gradients(load_ops("torch").gelu, [x])
    monkeypatch.setattr(torch_gelu, "CHUNK", 64)
    parts = output_and_gradients(load_ops("torch").gelu, [x])
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


def test_the_torch_backend_s_composed_form_is_the_identity_or_zero_far_from_zero():
    x = torch.tensor([-1e12, -1e4, -40.0, 40.0, 1e4, 1e12], dtype=torch.bfloat16)
    y, dx = output_and_gradients(lambda x: load_ops("torch").gelu(x) * torch.ones(6), [x])
    assert torch.equal(y, x.double().clamp(min=0.0))
    assert dx.isfinite().all() and not dx[:3].any()
