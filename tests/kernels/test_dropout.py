import pytest
import torch
from fastgpt_kernels import UnsupportedInput, dropout, load_ops
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

BACKENDS = ["triton", "torch", "reference"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SEED = 2**62 + 12345


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
    kept = (triton_ops.dropout(torch.ones(2**16, device=device), 0.5, SEED) != 0).float() - 0.5
    for distance in (1, 2, dropout.BLOCK, 2 * dropout.BLOCK, 4 * dropout.BLOCK):
        correlation = 4.0 * (kept[distance:] * kept[:-distance]).mean().item()
        assert abs(correlation) < 4.5 / (2**16 - distance) ** 0.5


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_is_dropped_with_probability_zero(backend, device):
    x = torch.randn(5, device=device)
    assert load_ops(backend).dropout(x, 0.0, None) is x


@settings(max_examples=10, deadline=None)
@given(n=st.integers(1, 9000), p=st.floats(0.0, 0.99), seed=st.integers(0, 2**63 - 1))
def test_every_element_is_dropped_or_scaled(n, p, seed):
    x = torch.ones(n, device="cuda" if torch.cuda.is_available() else "cpu")
    out = load_ops("triton").dropout(x, p, seed).double()
    scaled = (out - 1.0 / (1.0 - p)).abs() <= 2.0 * torch.finfo(torch.float32).eps / (1.0 - p)
    assert ((out == 0.0) | scaled).all()


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_checkpointing_recomputes_the_same_mask(backend, device):
    drop = load_ops(backend).dropout
    x = torch.randn(5000, device=device, requires_grad=True)
    call = lambda x: drop(x * x, 0.5, SEED)  # noqa: E731
    (plain,) = torch.autograd.grad(call(x).sum(), x)
    (recomputed,) = torch.autograd.grad(checkpoint(call, x, use_reentrant=False).sum(), x)
    assert torch.equal(plain, recomputed)


def test_torch_library_finds_the_ops_well_formed(device):
    load_ops("triton")
    x = torch.randn(3, 40, device=device, requires_grad=True)
    torch.library.opcheck(dropout._dropout, (x, 0.5, torch.tensor([SEED], device=device), x.dtype))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_compiled_model_has_no_graph_break(backend, device):
    drop = load_ops(backend).dropout
    seed = torch.tensor([SEED], device=device)
    x = torch.randn(3, 40, device=device)
    compiled = torch.compile(lambda x: drop(x, 0.5, seed), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), drop(x, 0.5, seed))


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
    with pytest.raises(UnsupportedInput) as error:
        load_ops(backend).dropout(torch.ones(3, device=device), p, seed)
    assert error.value.reasons == (reason,)
