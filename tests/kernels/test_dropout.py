import pytest
import torch
from fastgpt_kernels import Ops, UnsupportedInput, dropout, load_ops
from fastgpt_kernels.builtin import BUILTIN
from fastgpt_kernels.testing import assert_as_close_as_torch, assert_close, output_and_gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GPU = pytest.mark.gpu
BACKENDS = ["triton", "torch", "reference"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# of x and the residual
PAIRS = [
    (torch.float32, torch.float32),
    (torch.float16, torch.float16),
    (torch.float16, torch.float32),
    pytest.param((torch.bfloat16, torch.bfloat16), marks=GPU),
    pytest.param((torch.bfloat16, torch.float32), marks=GPU),
]
SHAPES = [(), (1,), (3, 7), (2, 768), (2, 1023), (3, 1600), (2, 12288), pytest.param((8192, 3072), marks=GPU)]
P, SEED = 0.25, 2**62 + 12345


def kept_elements(ops: Ops, shape: tuple[int, ...], p: float = P, seed: int = SEED) -> Tensor:
    return ops.dropout(torch.ones(shape, device=DEVICE), p, seed) != 0


def philox(key: int, counter: tuple[int, int, int, int]) -> list[int]:
    """Salmon et al. 2011, section 3.3: four words of 32 bits, in ten rounds."""
    k0, k1 = key & 0xFFFFFFFF, key >> 32
    c0, c1, c2, c3 = counter
    for _ in range(10):
        low, high = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = high >> 32 ^ c1 ^ k0, high & 0xFFFFFFFF, low >> 32 ^ c3 ^ k1, low & 0xFFFFFFFF
        k0, k1 = k0 + 0x9E3779B9 & 0xFFFFFFFF, k1 + 0xBB67AE85 & 0xFFFFFFFF
    return [c0, c1, c2, c3]


def test_philox_here_is_that_of_its_authors():
    # the known answers that come with their library, Random123
    assert philox(0, (0, 0, 0, 0)) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    ones = 0xFFFFFFFF
    assert philox(2**64 - 1, (ones, ones, ones, ones)) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


def test_the_mask_is_philox_of_the_seed_and_the_place(device, triton_ops):
    words = [word for call in range(10) for word in philox(SEED, (call, 0, 0, 0))]
    # 31 bits: words whose high bit is set count down
    uniform = [(2**32 - 1 - word if word >= 2**31 else word) / 2**31 for word in words]
    expected = torch.tensor([u >= P for u in uniform], device=device)
    assert torch.equal(kept_elements(triton_ops, (39,)), expected[:39])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_and_backward_use_one_mask(backend, dtype, device):
    x = (1.0 + torch.rand(3, 5000, device=device)).to(dtype).requires_grad_()
    out = load_ops(backend).dropout(x, 0.25, SEED)
    dout = (1.0 + torch.rand(3, 5000, device=device)).to(dtype)
    (dx,) = torch.autograd.grad(out, x, dout)
    kept = out != 0
    scaled = torch.where(kept, x.detach().double() / 0.75, 0.0)
    one_rounding = torch.finfo(dtype).eps * scaled.abs()
    assert ((out.double() - scaled).abs() <= one_rounding).all()
    assert torch.equal(dx != 0, kept)
    assert ((dx.double() - torch.where(kept, dout.double() / 0.75, 0.0)).abs() <= one_rounding.max()).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=GPU)])
@pytest.mark.parametrize("shape", SHAPES)
def test_dropout_is_as_close_as_a_product_with_its_mask(shape, dtype, device, triton_ops):
    x = torch.randn(shape).to(device, dtype)
    z = kept_elements(triton_ops, shape) / (1.0 - P)
    assert_close(
        ours=output_and_gradients(lambda x: triton_ops.dropout(x, P, SEED), [x]),
        theirs=output_and_gradients(lambda x: x * z.to(dtype), [x]),
        oracle=output_and_gradients(lambda x: x * z.double(), [x.double()]),
        dtypes=[dtype, dtype],
    )


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("shape", SHAPES)
def test_added_to_a_residual_it_is_as_close_with_the_same_mask(shape, pair, device, triton_ops):
    x, residual = (torch.randn(shape).to(device, dtype) for dtype in pair)
    z = kept_elements(triton_ops, shape) / (1.0 - P)
    assert_close(
        ours=output_and_gradients(lambda x, r: triton_ops.dropout_add(x, r, P, SEED), [x, residual]),
        theirs=output_and_gradients(lambda x, r: r + x * z.to(x.dtype), [x, residual]),
        oracle=output_and_gradients(lambda x, r: r + x * z.double(), [x.double(), residual.double()]),
        dtypes=[residual.dtype, x.dtype, residual.dtype],
    )
    assert torch.equal(triton_ops.dropout_add(x, torch.zeros_like(x), P, SEED), triton_ops.dropout(x, P, SEED))


@pytest.mark.parametrize("pair", PAIRS)
def test_without_dropout_a_residual_is_added(pair, device, triton_ops):
    x, residual = (torch.randn(3, 41).to(device, dtype) for dtype in pair)
    for seed in (None, SEED):
        assert_as_close_as_torch(lambda ops, *xs, s=seed: ops.dropout_add(*xs, 0.0, s), x, residual, ops=triton_ops)
        assert triton_ops.dropout_add(x, residual, 0.0, seed).dtype == residual.dtype
    assert torch.equal(triton_ops.dropout_add(x, residual, 0.0, None), BUILTIN.dropout_add(x, residual, 0.0, None))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("backend", BACKENDS)
def test_it_drops_at_its_rate_and_keeps_the_mean(backend, p, device):
    n = 100_000
    out = load_ops(backend).dropout(torch.ones(n, device=device), p, SEED)
    deviation = (p * (1 - p) / n) ** 0.5
    assert abs((out == 0).float().mean().item() - p) < 4 * deviation  # four standard deviations
    assert abs(out.mean().item() - 1.0) < 4 * deviation / (1 - p)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_mask_is_a_function_of_the_seed_alone(backend, device):
    drop = load_ops(backend).dropout
    x = torch.ones(9000, device=device)
    masks = []
    for global_seed in (1, 2):
        torch.manual_seed(global_seed)
        state = torch.get_rng_state()
        masks.append(drop(x, 0.5, SEED))
        assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(*masks)
    assert torch.equal(masks[0], drop(x, 0.5, torch.tensor(SEED, device=device)))
    for other in (SEED + 1, SEED - 2**62, 0):
        agreement = (drop(x, 0.5, other) == masks[0]).float().mean().item()
        assert abs(agreement - 0.5) < 4 * 0.5 / 9000**0.5


def test_the_triton_mask_depends_on_the_element_not_on_the_shape(device, triton_ops):
    long, short = (triton_ops.dropout(torch.ones(n, device=device), 0.5, SEED) for n in (9000, 4097))
    assert torch.equal(long[:4097], short)
    assert torch.equal(long.view(90, 100), triton_ops.dropout(torch.ones(90, 100, device=device), 0.5, SEED))


def test_neighbouring_elements_are_independent(device, triton_ops):
    kept = kept_elements(triton_ops, (2**16,), 0.5).float() - 0.5
    for distance in (1, 2, dropout.BLOCK, 2 * dropout.BLOCK, 4 * dropout.BLOCK):
        correlation = 4.0 * (kept[distance:] * kept[:-distance]).mean().item()
        assert abs(correlation) < 4.5 / (2**16 - distance) ** 0.5


@GPU
def test_elements_beyond_2_to_the_32_have_a_mask_of_their_own(device, triton_ops):
    kept = triton_ops.dropout(torch.ones(2**32 + 2**14, dtype=torch.float16, device=device), 0.5, SEED) != 0
    assert abs(kept[2**32 :].float().mean().item() - 0.5) < 4 * 0.5 / 2**7
    for start in (2**31, 2**32):
        agreement = (kept[: 2**14] == kept[start : start + 2**14]).float().mean().item()
        assert abs(agreement - 0.5) < 4 * 0.5 / 2**7


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_is_dropped_with_probability_zero(backend, device):
    x = torch.randn(5, device=device)
    assert load_ops(backend).dropout(x, 0.0, None) is x


@pytest.mark.usefixtures("device")
@settings(max_examples=10 if DEVICE == "cpu" else 4, deadline=None)
@given(n=st.integers(1, 9000), p=st.floats(0.0, 0.99), seed=st.integers(0, 2**63 - 1))
def test_every_element_is_dropped_or_scaled(n, p, seed):
    out = load_ops("triton").dropout(torch.ones(n, device=DEVICE), p, seed).double()
    scaled = (out - 1.0 / (1.0 - p)).abs() <= 2.0 * torch.finfo(torch.float32).eps / (1.0 - p)
    assert ((out == 0.0) | scaled).all()


@pytest.mark.usefixtures("device")
@settings(max_examples=10 if DEVICE == "cpu" else 4, deadline=None)
@given(n=st.integers(1, 500), few=st.floats(0.0, 0.99), more=st.floats(0.0, 0.99))
def test_a_higher_probability_drops_the_same_elements_and_others(n, few, more):
    few, more = sorted((few, more))
    kept, kept_of_more = (kept_elements(load_ops("triton"), (n,), p) for p in (few, more))
    assert not (kept_of_more & ~kept).any()


def test_views_are_taken_in_their_order(device, triton_ops):
    x = torch.randn(6, 5, 40, device=device).transpose(0, 2)
    residual = torch.randn(1, 5, 6, device=device).expand(40, 5, 6)
    dense = [x.contiguous(), residual.contiguous()]
    for call in (lambda x, r: triton_ops.dropout(x, P, SEED) + r, lambda x, r: triton_ops.dropout_add(x, r, P, SEED)):
        results = zip(output_and_gradients(call, [x, residual]), output_and_gradients(call, dense), strict=True)
        assert all(torch.equal(a, b) for a, b in results)
    assert triton_ops.dropout(x, P, SEED).is_contiguous() and triton_ops.dropout_add(x, x, P, SEED).is_contiguous()


def test_a_repeat_gives_the_same_bits(device, triton_ops):
    x, residual = torch.randn(3, 1023, device=device).half(), torch.randn(3, 1023, device=device)
    call = lambda x, r: triton_ops.dropout_add(x, r, P, SEED)  # noqa: E731
    first, second = (output_and_gradients(call, [x, residual]) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("p", "seed", "reason"),
    [
        (0.5, None, "p is 0.5 but seed is None; give an int, or an int64 tensor of one element"),
        (1.0, 1, "p is 1.0; it must be at least 0 and below 1"),
        (-0.1, 1, "p is -0.1; it must be at least 0 and below 1"),
        (0.5, -1, "seed is -1; it must be at least 0 and below 2^63"),
        (0.5, 2**63, "seed is 9223372036854775808; it must be at least 0 and below 2^63"),
        (0.5, torch.zeros(2), "seed is a tensor of 2 x torch.float32; it must be one int64"),
    ],
)
def test_mistakes_in_a_call_are_named(backend, p, seed, reason, device):
    x = torch.ones(3, device=device)
    for call in (lambda ops: ops.dropout(x, p, seed), lambda ops: ops.dropout_add(x, x, p, seed)):
        with pytest.raises(UnsupportedInput) as error:
            call(load_ops(backend))
        assert error.value.reasons == (reason,)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_mistake_in_a_sum_is_named(backend, device):
    x = torch.ones(3, dtype=torch.float16, device=device)
    with pytest.raises(UnsupportedInput) as error:
        load_ops(backend).dropout_add(x, torch.ones(1, 3, dtype=torch.bfloat16, device="meta"), 1.5, -1)
    assert str(error.value) == (
        f"dropout_add ({backend}) cannot take this input:\n"
        "  - p is 1.5; it must be at least 0 and below 1\n"
        "  - seed is -1; it must be at least 0 and below 2^63\n"
        "  - residual has shape (1, 3) and x (3,)\n"
        f"  - residual is on meta and x on {x.device}\n"
        "  - residual is torch.bfloat16 and x torch.float16; it must be of the same dtype, or float32\n"
        "No backend takes these arguments: correct the call."
    )


def test_every_reason_against_an_input_is_given(device, triton_ops):
    x = torch.zeros(0, 4, dtype=torch.float64, device=device)
    with pytest.raises(UnsupportedInput) as error:
        triton_ops.dropout(x, P, SEED)
    assert str(error.value) == (
        "dropout (triton) cannot take this input:\n"
        "  - x is torch.float64; supported: float32, float16, bfloat16\n"
        "  - x has shape (0, 4); it needs at least one element\n"
        "Set kernels.backend to 'torch' to run it without Triton."
    )
    with pytest.raises(UnsupportedInput) as error:
        triton_ops.dropout_add(x, x, P, SEED)
    assert error.value.reasons == tuple(
        f"{name} {reason}"
        for name in ("x", "residual")
        for reason in (
            "is torch.float64; supported: float32, float16, bfloat16",
            "has shape (0, 4); it needs at least one element",
        )
    )
