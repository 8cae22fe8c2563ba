import pytest
import torch
from fastgpt_kernels import Ops, UnsupportedInput, layernorm
from fastgpt_kernels.testing import assert_as_close_as_torch, output_and_gradients
from torch import Tensor

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1, 1), (3, 7), (9, 768), (2, 1023), (5, 1600), (2, 3, 64), (70, 130)]
WIDE = [(3, 4097), (2, 16384)]  # parameter gradients by a kernel of their own
GPU_SHAPES = [(300, 1600), (8192, 768), (4099, 1025), (2050, 12288)]


def normalise(ops: Ops, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return ops.layer_norm(x, weight, bias)


def inputs(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> list[Tensor]:
    N = shape[-1]
    return [x.to(device, dtype) for x in (torch.randn(shape), 1.0 + 0.1 * torch.randn(N), torch.randn(N))]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES + WIDE)
def test_it_is_as_close_to_the_mathematics_as_torch(shape, dtype, device, triton_ops):
    assert_as_close_as_torch(normalise, *inputs(shape, dtype, device), ops=triton_ops)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", GPU_SHAPES)
def test_it_is_as_close_with_many_rows(shape, dtype, device, triton_ops):
    assert_as_close_as_torch(normalise, *inputs(shape, dtype, device), ops=triton_ops)


def test_a_mean_far_from_zero_leaves_the_variance_exact(device, triton_ops):
    x, weight, bias = inputs((4, 300), torch.float32, device)
    assert_as_close_as_torch(normalise, x + 1000.0, weight, bias, ops=triton_ops)


def test_half_precision_rows_take_float32_parameters(device, triton_ops):
    x, weight, bias = inputs((4, 300), torch.float32, device)
    out, dx, dweight, dbias = output_and_gradients(triton_ops.layer_norm, [x.half(), weight, bias])
    exact = output_and_gradients(triton_ops.layer_norm, [x.half().float(), weight, bias])
    assert torch.equal(out, exact[0].half().double()) and torch.equal(dx, exact[1].half().double())
    assert torch.equal(dweight, exact[2]) and torch.equal(dbias, exact[3])


def test_views_are_taken(device, triton_ops):
    x, weight, bias = inputs((5, 4, 66), torch.float32, device)
    assert_as_close_as_torch(normalise, x.transpose(0, 1)[..., ::2], weight[::2], bias[::2], ops=triton_ops)


def test_eps_is_a_choice(device, triton_ops):
    tensors = inputs((3, 40), torch.float32, device)
    assert_as_close_as_torch(lambda ops, *xs: ops.layer_norm(*xs, eps=0.5), *tensors, ops=triton_ops)


def test_a_row_of_equal_numbers_becomes_the_bias(device, triton_ops):
    x, weight, bias = inputs((2, 33), torch.float32, device)
    out = triton_ops.layer_norm(torch.full_like(x, 3.0), weight, bias)
    assert torch.equal(out, bias.expand(2, 33))


@pytest.mark.parametrize("shape", [(70, 130), (70, 4097)])
def test_a_repeat_gives_the_same_bits(shape, device, triton_ops):
    tensors = inputs(shape, torch.float16, device)
    first, second = (output_and_gradients(triton_ops.layer_norm, tensors) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.usefixtures("triton_ops")
def test_torch_library_finds_the_op_well_formed(device):
    tensors = [x.requires_grad_() for x in inputs((3, 40), torch.float32, device)]
    torch.library.opcheck(layernorm._layer_norm, (*tensors, 1e-5))


def test_every_reason_against_an_input_is_given(device, triton_ops):
    x = torch.zeros(2, 20000, dtype=torch.float64, device=device)
    with pytest.raises(UnsupportedInput) as error:
        triton_ops.layer_norm(x, x[0].float(), x[0].float())
    assert str(error.value) == (
        "layer_norm (triton) cannot take this input:\n"
        "  - x has 20000 columns; at most 16384 fit in registers\n"
        "  - x is torch.float64; supported: float32, float16, bfloat16\n"
        "Set kernels.backend to 'torch' to run it without Triton."
    )


def test_parameters_of_the_wrong_size_are_named(device, triton_ops):
    x = torch.zeros(2, 8, device=device)
    with pytest.raises(UnsupportedInput, match=r"weight has shape \(7,\); x \(..., 8\) needs \(8,\)"):
        triton_ops.layer_norm(x, x[0, :7], x[0])
