import pytest
import torch
from fastgpt_kernels import UnsupportedInput, load_ops
from fastgpt_kernels.testing import assert_as_close_as_torch, output_and_gradients
from hypothesis import given, settings
from hypothesis import strategies as st

# of this name the package holds the function

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1, 1), (3, 7), (2, 768), (2, 1023), (3, 1600), (2, 12288), (2, 3, 64), (70, 300)]
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


@pytest.mark.parametrize("pair", [(torch.float16, torch.float32), (torch.float32, torch.float16)])
def test_the_bias_may_have_another_dtype(pair, device, triton_ops):
    x, bias = (torch.randn(s).to(device, dtype) for s, dtype in zip(((9, 40), (40,)), pair, strict=True))
    assert_as_close_as_torch(lambda ops, x, bias: ops.bias_gelu(x, bias), x, bias, ops=triton_ops)


@pytest.mark.parametrize("form", FORMS)
def test_a_zero_bias_changes_nothing(form, device, triton_ops):
    x = (3.0 * torch.randn(9, 300, device=device)).half()
    with_bias = output_and_gradients(lambda x: triton_ops.bias_gelu(x, torch.zeros_like(x[0]), form), [x])
    without = output_and_gradients(lambda x: triton_ops.gelu(x, form), [x])
    assert all(torch.equal(a, b) for a, b in zip(with_bias, without, strict=True))


@pytest.mark.parametrize("form", FORMS)
def test_a_loss_scale_scales_the_gradients(form, device, triton_ops):
    x = (3.0 * torch.randn(5, 300, device=device)).half().requires_grad_()
    bias = torch.randn(300, device=device).half().requires_grad_()
    y = triton_ops.bias_gelu(x, bias, form)
    dy = (torch.randn(5, 300, device=device) * 16).round().half() * 2.0**-9
    plain, scaled = (torch.autograd.grad(y, (x, bias), d, retain_graph=True) for d in (dy, dy * 2.0**12))
    spacing = torch.finfo(torch.float16).smallest_normal * torch.finfo(torch.float16).eps
    for small, large in zip(plain, scaled, strict=True):
        assert (large.float() / 2.0**12 - small.float()).abs().max() <= spacing


@pytest.mark.parametrize("form", FORMS)
def test_far_from_zero_it_is_the_identity_or_zero(form, device, triton_ops):
    x = torch.tensor([-1e12, -1e4, -40.0, 40.0, 1e4, 1e12], device=device)
    assert torch.equal(triton_ops.gelu(x, form), x.clamp(min=0.0))


@pytest.mark.usefixtures("device")
@settings(max_examples=20 if DEVICE == "cpu" else 4, deadline=None)
@given(x=st.floats(-20.0, 20.0, width=32))
def test_gelu_of_x_less_gelu_of_minus_x_is_x(x):
    both = torch.tensor([x, -x], device=DEVICE)
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
    alike = x[:, :1].expand(6, 5, 40)
    assert_as_close_as_torch(lambda ops, x, b: ops.bias_gelu(x, b), alike, bias[:1].expand(40), ops=triton_ops)
    assert triton_ops.gelu(x.transpose(0, 2)).is_contiguous()


def test_incoming_gradients_may_have_any_strides(device, triton_ops):
    x, bias = (torch.randn(s, device=device, requires_grad=True) for s in ((6, 40), (40,)))
    for y in (triton_ops.bias_gelu(x, bias), triton_ops.gelu(x + bias)):
        dy = torch.randn(40, 6, device=device).t()
        for d in (dy, dy[:1].expand(6, 40)):
            strided, dense = (torch.autograd.grad(y, (x, bias), g, retain_graph=True) for g in (d, d.contiguous()))
            assert all(torch.equal(a, b) for a, b in zip(strided, dense, strict=True))


def test_a_repeat_gives_the_same_bits(device, triton_ops):
    tensors = [torch.randn(shape, device=device).half() for shape in ((300, 300), (300,))]
    first, second = (output_and_gradients(triton_ops.bias_gelu, tensors) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_every_reason_against_an_input_is_given(device, triton_ops):
    x = torch.zeros(0, 4, dtype=torch.float64, device=device)
    with pytest.raises(UnsupportedInput) as error:
        triton_ops.gelu(x)
    assert str(error.value) == (
        "gelu (triton) cannot take this input:\n"
        "  - x is torch.float64; supported: float32, float16, bfloat16\n"
        "  - x has shape (0, 4); it needs at least one element\n"
        "Set kernels.backend to 'torch' to run it without Triton."
    )
    with pytest.raises(UnsupportedInput) as error:
        triton_ops.bias_gelu(x, torch.zeros(4, dtype=torch.float64, device=device))
    assert error.value.reasons == (
        "x is torch.float64; supported: float32, float16, bfloat16",
        "x has shape (0, 4); it needs at least one element",
        "bias is torch.float64; supported: float32, float16, bfloat16",
    )


@pytest.mark.parametrize("backend", ["triton", "torch", "reference"])
def test_every_mistake_in_a_call_is_named(backend, device):
    ops = load_ops(backend)
    x = torch.zeros(3, 4, dtype=torch.int64, device=device)
    with pytest.raises(UnsupportedInput) as error:
        ops.bias_gelu(x, torch.zeros(3, device="meta"), "erf")
    assert str(error.value) == (
        f"bias_gelu ({backend}) cannot take this input:\n"
        "  - x is torch.int64; it must be a floating-point tensor\n"
        "  - approximate is 'erf'; it must be 'tanh' or 'none'\n"
        "  - bias has shape (3,); x (..., 4) needs (4,)\n"
        f"  - bias is on meta and x on {x.device}\n"
        "No backend takes these arguments: correct the call."
    )
    with pytest.raises(UnsupportedInput, match="approximate is 'erf'; it must be 'tanh' or 'none'"):
        ops.gelu(x, "erf")
    with pytest.raises(UnsupportedInput, match=r"x has no dimensions; it must be \(..., N\)"):
        ops.bias_gelu(torch.zeros((), device=device), torch.zeros(1, device=device))


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
