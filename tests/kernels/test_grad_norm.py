import math

import pytest
import torch
from fastgpt_kernels import UnsupportedInput, grad_norm, gradient_norm
from hypothesis import given, settings
from hypothesis import strategies as st

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = [(1,), (7,), (0,), (3, 341), (70_001,), (8_192,), (1_024, 3)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def tensors_of(device, dtypes=DTYPES):
    generator = torch.Generator().manual_seed(2)
    return [
        torch.randn(size, generator=generator).to(device, dtypes[place % len(dtypes)])
        for place, size in enumerate(SIZES * 2)
    ]


def exact_norm(tensors):
    return math.sqrt(math.fsum(x.double().square().sum().item() for x in tensors))


@pytest.fixture(params=["public", "triton"])
def norm(request, device):
    """The public function, which is PyTorch's on a CPU, and the kernels."""
    return grad_norm if request.param == "public" else gradient_norm.norm


@pytest.mark.parametrize("dtypes", [DTYPES, *([dtype] for dtype in DTYPES)])
def test_it_is_the_norm_of_all_elements(dtypes, device, norm):
    tensors = tensors_of(device, dtypes)
    found, exact = norm(tensors), exact_norm(tensors)
    assert found.shape == () and found.dtype == torch.float32 and found.device.type == device
    assert abs(found.item() - exact) <= torch.finfo(torch.float32).eps * exact


@pytest.mark.parametrize("value", [1e30, 2.5e38, 1e-30, 1e-42])
def test_squares_neither_overflow_nor_vanish(value, device, norm):
    xs = [torch.zeros(5_000, device=device), torch.full((1,), value, device=device), torch.ones(0, device=device)]
    assert norm(xs).item() == xs[1].item()


def test_small_elements_count_beside_large_ones(device, norm):
    xs = [torch.full((1,), 3e20, device=device), torch.full((1 << 14,), 4e20 / 128, device=device)]
    torch.testing.assert_close(norm(xs), torch.tensor(5e20, device=device))


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")  # the interpreter's
def test_a_norm_beyond_float32_is_infinite(device, norm):
    assert norm([torch.full((4,), 3e38, device=device)]).item() == math.inf


@pytest.mark.parametrize("place", [0, 1_023, 70_000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_elements_that_are_not_finite_show(place, dtype, device, norm):
    for value, shown in ((math.nan, math.isnan), (math.inf, math.isinf), (-math.inf, math.isinf)):
        x = torch.ones(70_001, dtype=dtype, device=device)
        x[place] = value
        assert shown(norm([torch.ones(3, device=device), x]).item())


def test_no_tensors_and_no_elements_have_the_norm_zero(device, norm):
    assert grad_norm([]).item() == 0.0 and grad_norm(iter(())).shape == ()
    assert norm([torch.zeros(0, device=device)]).item() == 0.0
    assert norm([torch.zeros(0, device=device), torch.zeros(9, device=device)]).item() == 0.0


def test_views_are_taken(device, norm):
    x = torch.randn(50, 60, device=device)
    for view in (x.t(), x[:, ::2], x.flatten()[1:], x[0, 0]):
        assert norm([view]).item() == pytest.approx(exact_norm([view]), rel=1e-6)


def test_a_repeat_gives_the_same_bits(device, norm):
    first, second = (norm(tensors_of(device)) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.usefixtures("device")
@settings(max_examples=20 if DEVICE == "cpu" else 4, deadline=None)
@given(
    exponent=st.integers(-60, 60),
    values=st.lists(st.floats(-4.0, 4.0, width=16), min_size=1, max_size=40),
    cut=st.integers(0, 40),
)
def test_it_scales_with_its_elements_and_does_not_care_how_they_are_cut(exponent, values, cut):
    x = torch.tensor(values, device=DEVICE)
    # The torch backend sums n squares in float32, and in float64 where they are too small: each has rounded by at most
    # n / 2 units, of which the root halves the sum. The kernels' float64 leaves the rounding of the norm.
    eps = torch.finfo(torch.float32).eps
    for norm, allowed in ((grad_norm, (len(values) / 4 + 1) * eps), (gradient_norm.norm, eps)):
        whole = norm([x])
        for other in (norm([x * 2.0**exponent]) / 2.0**exponent, norm([x[:cut], x[cut:]])):
            torch.testing.assert_close(other, whole, rtol=allowed, atol=0.0)


def test_float64_is_taken_on_a_cpu():
    x = torch.randn(3_000, dtype=torch.float64)
    assert grad_norm([x, x.float()]).item() == pytest.approx(x.norm().item() * math.sqrt(2.0), rel=1e-6)


def test_every_reason_against_the_tensors_is_given():
    with pytest.raises(UnsupportedInput) as error:
        grad_norm([torch.ones(3), torch.ones(3, dtype=torch.int32), torch.ones(3, device="meta")])
    assert error.value.reasons == (
        "tensor 1 is torch.int32; supported: float32, float16, bfloat16, float64",
        "tensor 2 is on meta and others on cpu",
    )
    with pytest.raises(UnsupportedInput, match=r"tensor 0 has layout torch\.sparse_coo"):
        grad_norm([torch.ones(3).to_sparse()])


@pytest.mark.gpu
def test_the_host_never_waits(device):
    tensors = tensors_of(device)
    gradient_norm.norm(tensors)
    torch.cuda.set_sync_debug_mode("error")
    try:
        grad_norm(tensors)
        grad_norm([x.clone() for x in tensors])
    finally:
        torch.cuda.set_sync_debug_mode("default")
