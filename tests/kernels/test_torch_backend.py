"""The torch backend against the mathematics, where it goes ways of its own; its losses, decode attention, embedding and
masks are tested beside Triton's."""

import math

import pytest
import torch
from fastgpt_kernels import load_ops
from fastgpt_kernels.reference import visible
from fastgpt_kernels.seeds import keep_mask, seed_tensor
from fastgpt_kernels.testing import assert_as_close_as_torch, output_and_gradients
from fastgpt_kernels.torch_ops import attention
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.attention_options import OPTIONS, SEED, P

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LENGTHS = [1, 2, 17, 127, 128, 129, 300]
HEAD_SIZES = [16, 40, 64, 80, 96, 128, 256]
COLUMNS = [1, 7, 768, 1023, 1600, 12288]
TORCH, REFERENCE = load_ops("torch"), load_ops("reference")


def assert_attention_is_close(qkv, **options):
    assert_as_close_as_torch(lambda ops, x: ops.causal_attention(x, **options), qkv, ops=TORCH)


@pytest.fixture(params=[2**20, 1], ids=["heads together", "each head alone"])
def scores(request, monkeypatch):
    """How many scores go together; of one head there are more than one."""
    monkeypatch.setattr(attention, "SCORES", request.param)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("T", LENGTHS)
def test_attention_of_any_length_is_as_close_as_pytorch(T, name, dtype, scores):
    assert_attention_is_close(torch.randn(2, T, 3, 2, 16).to(dtype), **OPTIONS[name](2, T))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", HEAD_SIZES)
def test_attention_of_any_head_size_is_as_close_as_pytorch(D, dtype):
    assert_attention_is_close(torch.randn(1, 150, 3, 2, D).to(dtype), **OPTIONS["all"](1, 150))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [1, 2, 127, 128, 129, 299, 300, 1000])
def test_a_window_of_any_size_is_as_close_as_pytorch(window, dtype):
    assert_attention_is_close(torch.randn(1, 300, 3, 1, 16).to(dtype), window=window)


@settings(max_examples=60, deadline=None)
@given(
    B=st.integers(1, 3),
    T=st.integers(1, 300),
    H=st.integers(1, 3),
    D=st.sampled_from([16, 24, 64]),
    window=st.none() | st.integers(1, 310),
    documents=st.none() | st.integers(1, 60),
    dropout_p=st.sampled_from([0.0, P]),
    rows=st.sampled_from([16, 50, 128]),
)
def test_blocks_of_any_size_make_the_whole_of_attention(B, T, H, D, window, documents, dropout_p, rows):
    """In float64, where a difference is more than a rounding."""
    ids = None if documents is None else (torch.arange(T) // documents).expand(B, T)
    options = {"window": window, "document_ids": ids, "dropout_p": dropout_p, "seed": SEED}
    qkv = torch.randn(B, T, 3, H, D, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "MOST_ROWS", rows)
        patch.setattr(attention, "SCORES", 2**14)
        ours = output_and_gradients(lambda x: TORCH.causal_attention(x, **options), [qkv])
    for our, exact in zip(
        ours, output_and_gradients(lambda x: REFERENCE.causal_attention(x, **options), [qkv]), strict=True
    ):
        torch.testing.assert_close(our, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_scores_lose_nothing(dtype):
    assert_attention_is_close((20.0 * torch.randn(1, 140, 3, 2, 64)).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_takes_views_and_its_gradient_lies_as_they_do(dtype):
    by_head = torch.randn(2, 3, 4, 70, 32).to(dtype)  # (B, 3, H, T, D)
    qkv = by_head.permute(0, 3, 1, 2, 4)
    assert_attention_is_close(qkv)
    leaf = qkv.detach().requires_grad_()
    out = TORCH.causal_attention(leaf)
    (gradient,) = torch.autograd.grad(out, leaf, torch.ones_like(out))
    assert out.is_contiguous() and gradient.stride() == qkv.stride()
    part = torch.randn(2, 70, 3, 4, 48).to(dtype)[:, 3:, :, ::2, :32]
    assert_attention_is_close(part)


def test_the_mask_of_the_weights_is_the_seed_s_mask_of_their_shape():
    B, T, H = 2, 150, 3
    qkv = torch.zeros(B, T, 3, H, 256)
    qkv[:, torch.arange(T), 2, :, torch.arange(T)] = 1.0
    # q and k are zero and v is a unit matrix: the output is the weights
    kept = TORCH.causal_attention(qkv, dropout_p=P, seed=SEED)[..., :T].transpose(1, 2) != 0
    drawn = keep_mask(torch.empty(B, H, T, T), seed_tensor(SEED, torch.device("cpu")), P)
    assert torch.equal(kept, drawn & visible(qkv, None, None))
    rate = 1.0 - drawn.double().mean().item()
    assert abs(rate - P) < 4 * math.sqrt(P * (1 - P) / drawn.numel())


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_repeats_bit_for_bit(dtype, name):
    qkv, options = torch.randn(2, 300, 3, 3, 64).to(dtype), OPTIONS[name](2, 300)
    first, second = (output_and_gradients(lambda x: TORCH.causal_attention(x, **options), [qkv]) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@settings(max_examples=20, deadline=None)
@given(T=st.integers(2, 200), at=st.floats(0, 1), window=st.none() | st.integers(1, 80), documents=st.integers(1, 100))
def test_nobody_sees_the_future_beyond_the_window_or_another_document(T, at, window, documents):
    j = min(T - 1, int(at * T))
    qkv, ids = torch.randn(1, T, 3, 1, 16), torch.arange(T)[None] // documents
    changed = qkv.clone()
    changed[:, j, 1:] += 100.0
    options = {"window": window, "document_ids": ids}
    same = (TORCH.causal_attention(qkv, **options) == TORCH.causal_attention(changed, **options)).all(-1).view(-1)
    sees_j = visible(qkv, window, ids).view(T, T)[:, j]
    assert torch.equal(~same, sees_j)


def test_attention_is_what_compiled_and_autocast_code_calls_as_well():
    qkv = torch.randn(2, 60, 3, 2, 16, dtype=torch.bfloat16)
    call = torch.compile(lambda x: TORCH.causal_attention(x, window=30), fullgraph=True, backend="aot_eager")
    plain = output_and_gradients(lambda x: TORCH.causal_attention(x, window=30), [qkv])
    for ours, theirs in zip(output_and_gradients(call, [qkv]), plain, strict=True):
        assert torch.equal(ours, theirs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert TORCH.causal_attention(qkv.float()).dtype == torch.float32


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N", COLUMNS)
def test_layer_norms_are_as_close_as_pytorch(N, dtype):
    x, residual, weight, bias = (torch.randn(shape).to(dtype) for shape in ((5, N), (5, N), (N,), (N,)))
    assert_as_close_as_torch(lambda ops, *xs: ops.layer_norm(*xs), x, weight, bias, ops=TORCH)
    for options in ({}, {"dropout_p": P, "seed": SEED}):
        inputs = (x, residual, weight, bias)
        assert_as_close_as_torch(lambda ops, *xs, o=options: ops.add_layer_norm(*xs, **o), *inputs, ops=TORCH)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_wider_residual_is_as_close_as_pytorch(dtype):
    x, residual = torch.randn(3, 768).to(dtype), torch.randn(3, 768)
    weight, bias = torch.randn(768).to(dtype), torch.randn(768).to(dtype)
    assert_as_close_as_torch(lambda ops, *xs: ops.add_layer_norm(*xs), x, residual, weight, bias, ops=TORCH)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("approximate", ["tanh", "none"])
@pytest.mark.parametrize("N", COLUMNS)
def test_gelu_alone_after_a_bias_and_after_a_product_is_as_close_as_pytorch(N, approximate, dtype):
    x, bias = 3.0 * torch.randn(4, N, dtype=torch.float64), torch.randn(N, dtype=torch.float64)
    x, bias = x.to(dtype), bias.to(dtype)
    assert_as_close_as_torch(lambda ops, *xs: ops.gelu(*xs, approximate), x, ops=TORCH)
    assert_as_close_as_torch(lambda ops, *xs: ops.bias_gelu(*xs, approximate), x, bias, ops=TORCH)
    inner, weight = torch.randn(4, 33).to(dtype), torch.randn(N, 33).to(dtype)
    assert_as_close_as_torch(lambda ops, *xs: ops.linear_gelu(*xs, approximate), inner, weight, bias, ops=TORCH)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 3e38])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("hidden", ["future", "window", "documents"])
def test_no_key_that_is_hidden_reaches_a_row_whatever_it_holds(hidden, dtype, value):
    """3e38 is finite, and its scores are not, but in float64."""
    T, cut = 200, 150
    qkv = torch.randn(1, T, 3, 2, 16, dtype=dtype)
    changed = qkv.clone()
    if hidden == "future":
        rows, options = slice(0, cut), {}
        changed[:, cut:, 1] = value
    elif hidden == "window":
        rows, options = slice(cut, T), {"window": 30}
        changed[:, : cut - 30, 1] = value
    else:
        rows, options = slice(cut, T), {"document_ids": (torch.arange(T)[None] >= cut).long()}
        changed[:, :cut, 1] = value
    expected, ours = (TORCH.causal_attention(x, **options)[:, rows] for x in (qkv, changed))
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("shape", [(0, 4, 3, 2, 16), (2, 0, 3, 2, 16), (2, 4, 3, 0, 16)])
@pytest.mark.parametrize("name", OPTIONS)
def test_attention_of_nothing_is_nothing(name, shape):
    B, T, _, H, D = shape
    qkv = torch.zeros(shape, requires_grad=True)
    out = TORCH.causal_attention(qkv, **OPTIONS[name](B, T))
    assert out.shape == (B, T, H, D)
    (gradient,) = torch.autograd.grad(out.sum(), qkv)
    assert gradient.shape == shape
