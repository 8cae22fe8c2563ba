from collections.abc import Callable

import pytest
import torch
from fastgpt_kernels import Ops, UnsupportedInput, attention, load_ops
from fastgpt_kernels.testing import assert_as_close_as_torch, assert_close, output_and_gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [  # B, T, H, D
    (32, 1, 1, 16),
    (8, 2, 3, 40),
    (1, 17, 2, 64),
    (2, 33, 1, 24),
    (1, 127, 1, 80),
    (1, 129, 1, 96),
    (1, 65, 1, 128),
]
GPU_SHAPES = [(3, 1023, 5, 64), (2, 1024, 12, 64), (2, 515, 3, 80), (2, 515, 3, 96), (2, 777, 2, 128), (1, 2049, 2, 40)]
VIEWS: dict[str, Callable[[], Tensor]] = {
    "time first": lambda: torch.randn(19, 2, 3, 2, 24).transpose(0, 1),
    "the parts inside each head": lambda: torch.randn(2, 19, 2, 3, 24).transpose(2, 3),
    "a part of a larger tensor": lambda: torch.randn(2, 38, 3, 3, 32)[:, ::2, :, 1:, 8:],
    "columns far apart": lambda: torch.randn(2, 19, 3, 24, 2).transpose(3, 4),
}
P, SEED = 0.3, 2**40 + 7


def packed(B: int, T: int, H: int, D: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.randn(B, T, 3, H, D).to(device, dtype)


def attend(ops: Ops, qkv: Tensor) -> Tensor:
    return ops.causal_attention(qkv)


def kept_weights(ops: Ops, B: int, T: int, H: int, D: int, device: str, seed: int = SEED) -> Tensor:
    """(B, H, T, T) booleans, read off the kernel: with q = k = 0 and v a unit matrix, its output is the weights."""
    kept = []
    for first in range(0, T, D):
        qkv = torch.zeros(B, T, 3, H, D, dtype=torch.float16)
        columns = torch.arange(min(D, T - first))
        qkv[:, first + columns, 2, :, columns] = 1.0
        kept.append(ops.causal_attention(qkv.to(device), dropout_p=P, seed=seed).cpu() != 0)
    return torch.cat(kept, -1)[..., :T].transpose(1, 2)


def attend_with_mask(qkv: Tensor, kept: Tensor) -> Tensor:
    """Attention with a given dropout mask (B, H, T, T), by autograd."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    scores = q @ k.mT / qkv.shape[-1] ** 0.5
    future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=qkv.device).triu(1)
    weights = scores.masked_fill(future, float("-inf")).softmax(-1)
    return (torch.where(kept.to(qkv.device), weights / (1.0 - P), 0.0) @ v).transpose(1, 2)


def assert_dropout_uses(kept: Tensor, qkv: Tensor, ops: Ops) -> None:
    """Output and gradient are those of this mask."""
    assert_close(
        ours=output_and_gradients(lambda x: ops.causal_attention(x, dropout_p=P, seed=SEED), [qkv]),
        theirs=output_and_gradients(lambda x: attend_with_mask(x, kept), [qkv]),
        oracle=output_and_gradients(lambda x: attend_with_mask(x, kept), [qkv.double().cpu()]),
        dtypes=[qkv.dtype, qkv.dtype],
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_as_close_to_the_mathematics_as_torch(shape, dtype, device, triton_ops):
    assert_as_close_as_torch(attend, packed(*shape, dtype, device), ops=triton_ops)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", GPU_SHAPES)
def test_it_is_as_close_at_length(shape, dtype, device, triton_ops):
    assert_as_close_as_torch(attend, packed(*shape, dtype, device), ops=triton_ops)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [16, 40, 64, 80, 96, 128])
@pytest.mark.parametrize("T", [1, 2, 17, 127, 129])
def test_it_is_as_close_for_every_length_and_head_size(T, D, dtype, device, triton_ops):
    # short sequences in large batches: the largest of a few rounding errors says little about either side
    assert_as_close_as_torch(attend, packed(max(2, 64 // T), T, 2, D, dtype, device), ops=triton_ops)


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS.keys())
def test_views_are_read_in_place(view, device, triton_ops):
    qkv = view().to(device)
    assert not qkv.is_contiguous()
    assert_as_close_as_torch(attend, qkv, ops=triton_ops)


def test_the_scale_is_a_choice(device, triton_ops):
    assert_as_close_as_torch(
        lambda ops, qkv: ops.causal_attention(qkv, scale=0.37), packed(2, 18, 2, 32, device=device), ops=triton_ops
    )


def test_output_and_gradient_are_dense(device, triton_ops):
    qkv = packed(2, 5, 3, 16, device=device).requires_grad_()
    out = triton_ops.causal_attention(qkv)
    out.sum().backward()
    assert out.is_contiguous() and qkv.grad.is_contiguous()


def test_scores_far_apart_neither_overflow_nor_lose_digits(device, triton_ops):
    qkv = 30.0 * packed(1, 40, 1, 64, device=device)  # scores in the thousands
    ours, theirs, oracle = (
        output_and_gradients(ops.causal_attention, [x])
        for ops, x in ((triton_ops, qkv), (load_ops("torch"), qkv), (load_ops("reference"), qkv.double().cpu()))
    )
    assert_close(ours[:1], theirs[:1], oracle[:1], [torch.float32])
    assert ours[1].isfinite().all()


@settings(max_examples=8, deadline=None)
@given(T=st.integers(2, 40), D=st.sampled_from([16, 40, 64]), data=st.data())
def test_no_position_sees_its_future(T, D, data):
    now = data.draw(st.integers(0, T - 2))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ops = load_ops("triton")
    qkv = packed(1, T, 1, D, device=device)
    other = qkv.clone()
    other[:, now + 1 :] = torch.randn(1)
    leaf = qkv.clone().requires_grad_()
    out = ops.causal_attention(leaf)
    assert torch.equal(out[:, : now + 1], ops.causal_attention(other)[:, : now + 1])
    (gradient,) = torch.autograd.grad(out[:, now].sum(), leaf)
    assert not gradient[:, now + 1 :].any()


@settings(max_examples=10, deadline=None)
@given(T=st.integers(1, 40), constant=st.floats(-3.0, 3.0))
def test_each_output_is_an_average_of_the_values(T, constant):
    qkv = packed(1, T, 2, 16, device="cuda" if torch.cuda.is_available() else "cpu")
    qkv[:, :, 2] = constant
    out = load_ops("triton").causal_attention(qkv)
    torch.testing.assert_close(out, torch.full_like(out, constant))


def test_a_repeat_gives_the_same_bits(device, triton_ops):
    qkv = packed(2, 129, 2, 64, torch.float16, device)
    call = lambda x: triton_ops.causal_attention(x, dropout_p=P, seed=SEED)  # noqa: E731
    first, second = output_and_gradients(call, [qkv]), output_and_gradients(call, [qkv])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 33, 2, 40), (1, 129, 1, 64), (1, 40, 1, 128)])
def test_dropout_has_one_mask_forward_and_backward(shape, dtype, device, triton_ops):
    kept = kept_weights(triton_ops, *shape, device)
    assert_dropout_uses(kept, packed(*shape, dtype, device), triton_ops)


def test_dropout_drops_at_its_rate_independently_in_each_head(device, triton_ops):
    T = 128
    kept = kept_weights(triton_ops, 2, T, 2, 128, device)[..., torch.ones(T, T, dtype=torch.bool).tril()]
    n = kept.numel()
    assert abs(kept.float().mean().item() - (1 - P)) < 4 * (P * (1 - P) / n) ** 0.5  # four standard deviations
    agreement = (kept[0, 0] == kept[1, 1]).float().mean().item()
    expected = P**2 + (1 - P) ** 2
    assert abs(agreement - expected) < 4 * (expected * (1 - expected) / kept[0, 0].numel()) ** 0.5


def test_the_mask_is_a_function_of_the_seed(device, triton_ops):
    shape = (1, 40, 1, 64, device)
    first = kept_weights(triton_ops, *shape)
    assert torch.equal(first, kept_weights(triton_ops, *shape))
    assert not torch.equal(first, kept_weights(triton_ops, *shape, seed=SEED + 1))
    assert not torch.equal(first, kept_weights(triton_ops, *shape, seed=SEED - 2**40))  # the high word counts


def test_the_mask_does_not_depend_on_the_tiles(device, triton_ops, monkeypatch):
    shape = (1, 70, 1, 32)
    kept = kept_weights(triton_ops, *shape, device)
    monkeypatch.setattr(attention, "tiles_for", lambda *entry: attention.Tiles(16, 32, 4, 1))
    assert torch.equal(kept, kept_weights(triton_ops, *shape, device))
    assert_dropout_uses(kept, packed(*shape, device=device), triton_ops)


def test_a_longer_sequence_keeps_the_mask_of_its_start(device, triton_ops):
    short, long = (kept_weights(triton_ops, 1, T, 2, 64, device) for T in (20, 50))
    assert torch.equal(short, long[..., :20, :20])


@pytest.mark.parametrize("backend", ["triton", "torch", "reference"])
def test_dropout_reads_no_global_generator_and_moves_none(backend, device):
    ops = load_ops(backend)
    qkv = packed(1, 20, 2, 16, device=device)
    outs = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        outs.append(ops.causal_attention(qkv, dropout_p=P, seed=SEED))
        assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(*outs)


@pytest.mark.parametrize("backend", ["triton", "torch", "reference"])
def test_a_seed_is_an_int_or_a_tensor(backend, device):
    ops = load_ops(backend)
    qkv = packed(1, 20, 2, 16, device=device)
    by_int, by_tensor = (
        ops.causal_attention(qkv, dropout_p=P, seed=seed) for seed in (SEED, torch.tensor([SEED], device=device))
    )
    assert torch.equal(by_int, by_tensor)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_checkpointing_recomputes_the_same_mask(backend, device):
    ops = load_ops(backend)
    qkv = packed(2, 20, 2, 16, device=device)
    call = lambda x: ops.causal_attention(x, dropout_p=P, seed=SEED)  # noqa: E731
    plain = output_and_gradients(call, [qkv])
    recomputed = output_and_gradients(lambda x: checkpoint(call, x, use_reentrant=False), [qkv])
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True))


def test_torch_library_finds_the_op_well_formed(device, triton_ops):
    qkv = packed(1, 18, 2, 16, device=device).requires_grad_()
    for seed in (None, torch.tensor([SEED], device=device)):
        torch.library.opcheck(attention._attention, (qkv, 0.25, 0.0 if seed is None else P, seed))


def test_a_compiled_model_has_no_graph_break(device, triton_ops):
    qkv = packed(1, 18, 2, 16, device=device)
    seed = torch.tensor([SEED], device=device)
    call = lambda x: triton_ops.causal_attention(2.0 * x, dropout_p=P, seed=seed)  # noqa: E731
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    results = zip(output_and_gradients(call, [qkv]), output_and_gradients(compiled, [qkv]), strict=True)
    assert all(torch.equal(a, b) for a, b in results)


def test_every_reason_against_an_input_is_given(device, triton_ops):
    with pytest.raises(UnsupportedInput) as error:
        triton_ops.causal_attention(torch.zeros(1, 4, 3, 1, 8, dtype=torch.float64, device=device))
    assert str(error.value) == (
        "causal_attention (triton) cannot take this input:\n"
        "  - qkv is torch.float64; supported: float32, float16, bfloat16\n"
        "  - the head size is 8; it must be between 16 and 128\n"
        "Set kernels.backend to 'torch' to run it without Triton."
    )


@pytest.mark.parametrize("backend", ["triton", "torch", "reference"])
def test_every_mistake_in_a_call_is_named(backend, device):
    with pytest.raises(UnsupportedInput) as error:
        load_ops(backend).causal_attention(torch.zeros(2, 3, 4, device=device), scale=-1.0, dropout_p=1.0)
    assert error.value.reasons == (
        "dropout_p is 1.0; it must be at least 0 and below 1",
        "dropout_p is 1.0 but seed is None; give an int, or an int64 tensor of one element",
        "qkv has shape (2, 3, 4); it must be (B, T, 3, H, D)",
        "scale is -1.0; it must be positive and finite",
    )


@pytest.mark.parametrize(
    ("head_size", "pieces"),
    [(16, (16, 0)), (24, (32, 0)), (40, (32, 16)), (64, (64, 0)), (80, (64, 16)), (96, (64, 32)), (120, (128, 0))],
)
def test_head_sizes_between_powers_of_two_are_split(head_size, pieces):
    assert attention.pieces(head_size) == pieces
