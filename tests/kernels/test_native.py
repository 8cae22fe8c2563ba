"""The native backend against the mathematics and beside the torch backend, whose masks it draws."""

import importlib
import math
from typing import Any

import pytest
import torch
from fastgpt_kernels import load_ops
from fastgpt_kernels.native.library import reasons_against
from fastgpt_kernels.reference import visible
from fastgpt_kernels.seeds import keep_mask, seed_tensor
from fastgpt_kernels.testing import assert_as_close_as_torch, output_and_gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.attention_options import OPTIONS, SEED, P

if reasons_against():
    pytest.skip("; ".join(reasons_against()), allow_module_level=True)

NATIVE, TORCH = load_ops("native"), load_ops("torch")
linear = importlib.import_module("fastgpt_kernels.native.linear")  # of this name the package holds the function
BF16 = torch.bfloat16
LENGTHS = [1, 2, 17, 63, 64, 65, 96, 97, 129, 300]
HEAD_SIZES = [1, 7, 16, 20, 40, 64, 80, 96, 128, 256]
COLUMNS = [1, 3, 4, 15, 16, 17, 33, 768, 1023, 1600, 12288]


VIEWS: dict[str, Any] = {
    "time first": lambda: torch.randn(70, 2, 3, 2, 24).transpose(0, 1),
    "heads before positions": lambda: torch.randn(3, 2, 2, 70, 24).permute(1, 3, 0, 2, 4),
    "the parts inside each head": lambda: torch.randn(2, 70, 2, 3, 24).transpose(2, 3),
    "a part of a larger tensor": lambda: torch.randn(2, 140, 3, 3, 32)[:, ::2, :, 1:, 8:],
    "odd strides": lambda: torch.randn(2, 70, 3, 2, 27)[..., 1:25],
    "columns far apart": lambda: torch.randn(2, 70, 3, 24, 2).transpose(3, 4),
    "one head for all": lambda: torch.randn(2, 70, 3, 1, 24).expand(2, 70, 3, 2, 24),
}


def normal(*shape: int, by: float = 1.0) -> Tensor:
    return (by * torch.randn(shape)).to(BF16)


def assert_attention_is_close(qkv: Tensor, **options: Any) -> None:
    assert_as_close_as_torch(lambda ops, x: ops.causal_attention(x, **options), qkv, ops=NATIVE)


def attention_and_gradient(qkv: Tensor, **options: Any) -> list[Tensor]:
    return output_and_gradients(lambda x: NATIVE.causal_attention(x, **options), [qkv])


def same(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.fixture
def threads():
    """Set their number, for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("T", LENGTHS)
def test_attention_of_any_length_is_as_close_as_pytorch(T, name):
    assert_attention_is_close(normal(2, T, 3, 2, 16), **OPTIONS[name](2, T))


@pytest.mark.parametrize("D", HEAD_SIZES)
def test_attention_of_any_head_size_is_as_close_as_pytorch(D):
    assert_attention_is_close(normal(1, 150, 3, 2, D), **OPTIONS["all"](1, 150))


@pytest.mark.parametrize("window", [1, 2, 63, 64, 65, 96, 127, 299, 300, 1000])
def test_a_window_of_any_size_is_as_close_as_pytorch(window):
    assert_attention_is_close(normal(1, 300, 3, 1, 16), window=window)


@settings(max_examples=40, deadline=None)
@given(
    B=st.integers(1, 3),
    T=st.integers(1, 300),
    H=st.integers(1, 3),
    D=st.sampled_from([16, 24, 64]),
    window=st.none() | st.integers(1, 310),
    documents=st.none() | st.integers(1, 60),
    dropout_p=st.sampled_from([0.0, P]),
)
def test_tiles_make_the_whole_of_attention(B, T, H, D, window, documents, dropout_p):
    ids = None if documents is None else (torch.arange(T) // documents).expand(B, T)
    options = {"window": window, "document_ids": ids, "dropout_p": dropout_p, "seed": SEED}
    assert_attention_is_close(normal(B, T, 3, H, D), **options)


@pytest.mark.parametrize("view", VIEWS)
def test_attention_takes_views_and_its_gradient_lies_as_they_do(view):
    qkv = VIEWS[view]().to(BF16)
    assert_attention_is_close(qkv)
    dense = attention_and_gradient(qkv.contiguous())
    assert same(attention_and_gradient(qkv), dense)
    leaf = qkv.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(NATIVE.causal_attention(leaf).sum(), leaf)  # an expanded number comes in
    assert gradient.stride() == torch.empty_like(qkv).stride()


def test_large_scores_lose_nothing():
    assert_attention_is_close(normal(1, 140, 3, 2, 64, by=20.0))


def test_the_mask_of_the_weights_is_the_seed_s_mask_of_their_shape():
    B, T, H = 2, 150, 3
    qkv = torch.zeros(B, T, 3, H, 256, dtype=BF16)
    qkv[:, torch.arange(T), 2, :, torch.arange(T)] = 1.0
    # q and k are zero and v is a unit matrix: the output is the weights
    kept = NATIVE.causal_attention(qkv, dropout_p=P, seed=SEED)[..., :T].transpose(1, 2) != 0
    drawn = keep_mask(torch.empty(B, H, T, T), seed_tensor(SEED, torch.device("cpu")), P)
    assert torch.equal(kept, drawn & visible(qkv, None, None))


@pytest.mark.parametrize("name", OPTIONS)
def test_attention_repeats_bit_for_bit_with_any_number_of_threads(name, threads):
    qkv, options = normal(2, 300, 3, 3, 64), OPTIONS[name](2, 300)
    first = attention_and_gradient(qkv, **options)
    assert same(attention_and_gradient(qkv, **options), first)
    for number in (1, 3):
        threads(number)
        assert same(attention_and_gradient(qkv, **options), first)


@settings(max_examples=20, deadline=None)
@given(T=st.integers(2, 200), at=st.floats(0, 1), window=st.none() | st.integers(1, 80), documents=st.integers(1, 100))
def test_nobody_sees_the_future_beyond_the_window_or_another_document(T, at, window, documents):
    j = min(T - 1, int(at * T))
    qkv, ids = normal(1, T, 3, 1, 16), torch.arange(T)[None] // documents
    changed = qkv.clone()
    changed[:, j, 1:] += 100.0
    options = {"window": window, "document_ids": ids}
    same = (NATIVE.causal_attention(qkv, **options) == NATIVE.causal_attention(changed, **options)).all(-1).view(-1)
    assert torch.equal(~same, visible(qkv, window, ids).view(T, T)[:, j])


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 3e38])
@pytest.mark.parametrize("hidden", ["future", "window", "documents"])
def test_no_key_that_is_hidden_reaches_a_row_whatever_it_holds(hidden, value):
    T, cut = 200, 150
    qkv = normal(1, T, 3, 2, 16)
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
    expected, ours = (NATIVE.causal_attention(x, **options)[:, rows] for x in (qkv, changed))
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("part", [0, 1, 2])
def test_nan_in_what_is_seen_is_not_hidden(part):
    qkv = normal(1, 70, 3, 1, 16)
    qkv[0, 5, part] = math.nan
    out = NATIVE.causal_attention(qkv)
    assert out[0, 5].isnan().all()
    assert out[0, :5].isfinite().all() or part == 2  # there a weight of 0 meets NaN, as in PyTorch


@pytest.mark.parametrize("shape", [(0, 4, 3, 2, 16), (2, 0, 3, 2, 16), (2, 4, 3, 0, 16)])
@pytest.mark.parametrize("name", OPTIONS)
def test_attention_of_nothing_is_nothing(name, shape):
    B, T, _, H, D = shape
    qkv = torch.zeros(shape, dtype=BF16, requires_grad=True)
    out = NATIVE.causal_attention(qkv, **OPTIONS[name](B, T))
    assert out.shape == (B, T, H, D)
    (gradient,) = torch.autograd.grad(out.sum(), qkv)
    assert gradient.shape == shape


@pytest.mark.parametrize("rows", [1, 5, 200])
@pytest.mark.parametrize("N", COLUMNS)
def test_layer_norms_are_as_close_as_pytorch(N, rows):
    x, residual, weight, bias = normal(rows, N), normal(rows, N), normal(N), normal(N)
    assert_as_close_as_torch(lambda ops, *xs: ops.layer_norm(*xs), x, weight, bias, ops=NATIVE)
    for options in ({}, {"dropout_p": P, "seed": SEED}):
        inputs = (x, residual, weight, bias)
        for part in (slice(None), slice(1), slice(1, 2)):  # a block may use one of the two results
            call = lambda ops, *xs, o=options, part=part: ops.add_layer_norm(*xs, **o)[part]  # noqa: E731
            assert_as_close_as_torch(call, *inputs, ops=NATIVE)


def test_a_layer_norm_far_from_zero_keeps_its_digits():
    x, weight, bias = normal(7, 768) + 50.0, normal(768), normal(768)
    assert_as_close_as_torch(lambda ops, *xs: ops.layer_norm(*xs), x, weight, bias, ops=NATIVE)


def test_sums_over_rows_do_not_depend_on_the_threads(threads):
    inputs = [normal(300, 100), normal(300, 100), normal(100), normal(100)]
    call = lambda *xs: NATIVE.add_layer_norm(*xs, dropout_p=P, seed=SEED)  # noqa: E731
    first = output_and_gradients(call, inputs)
    for number in (1, 3):
        threads(number)
        assert same(output_and_gradients(call, inputs), first)


@pytest.mark.parametrize("shape", [(1,), (7,), (3, 5), (2, 3, 8), (40, 1000), (5, 16384)])
def test_dropout_draws_the_masks_of_the_torch_backend(shape):
    x, residual = normal(*shape), normal(*shape)
    for p in (P, 1e-9, 1 - 1e-6):
        ours, theirs = (output_and_gradients(lambda x, o=o, p=p: o.dropout(x, p, SEED), [x]) for o in (NATIVE, TORCH))
        assert same([y == 0 for y in ours], [y == 0 for y in theirs])
    assert_as_close_as_torch(lambda ops, x: ops.dropout(x, P, SEED), x, ops=NATIVE)
    assert_as_close_as_torch(lambda ops, *xs: ops.dropout_add(*xs, P, SEED), x, residual, ops=NATIVE)


@pytest.fixture(params=[1, linear.FEWEST_ROWS], ids=["any rows", "enough rows"])
def rows_from(request, monkeypatch):
    """From how many rows on a product is ours."""
    monkeypatch.setattr(linear, "FEWEST_ROWS", request.param)


@pytest.mark.parametrize("K", [1, 2, 31, 33, 768, 1665])
@pytest.mark.parametrize(("rows", "N"), [(1, 1), (7, 49), (9, 48), (40, 1023), (129, 65)])
def test_linear_maps_are_as_close_as_pytorch(rows, N, K, rows_from):
    x, weight, bias = normal(rows, K), normal(N, K, by=K**-0.5), normal(N)
    assert_as_close_as_torch(lambda ops, *xs: ops.linear(*xs), x, weight, bias, ops=NATIVE)
    assert_as_close_as_torch(lambda ops, *xs: ops.logits(*xs), x, weight, ops=NATIVE)


@settings(max_examples=60, deadline=None)
@given(
    M=st.integers(1, 150),
    N=st.integers(1, 150),
    K=st.integers(1, 150),
    layout=st.tuples(st.booleans(), st.booleans()),
    far=st.integers(0, 3),
    biased=st.booleans(),
)
def test_a_product_reads_both_operands_either_way_and_writes_nothing_beside(M, N, K, layout, far, biased):
    """Of small integers, whose sums are exact."""
    a, b = (
        torch.randint(-4, 5, (rows, columns + far)).to(BF16)[:, :columns]
        if dense
        else torch.randint(-4, 5, (columns, rows + far)).to(BF16)[:, :rows].t()
        for dense, (rows, columns) in zip(layout, ((M, K), (K, N)), strict=True)
    )
    bias = torch.randint(-4, 5, (N,)).to(BF16) if biased else None
    exact = a.double() @ b.double() + (0.0 if bias is None else bias.double())
    assert torch.equal(linear.product(a, b, bias), exact.to(BF16))


def test_a_product_has_the_same_bits_with_any_number_of_threads(threads):
    a, b, bias = normal(150, 1700), normal(1700, 200), normal(200)
    first = linear.product(a, b, bias)
    for number in (1, 2, 3, 5, 8):
        threads(number)
        assert torch.equal(linear.product(a, b, bias), first)


def test_what_has_few_rows_or_matrix_units_is_pytorch_s(monkeypatch):
    x, weight, bias = normal(linear.FEWEST_ROWS, 8), normal(4, 8), normal(4)
    assert linear.multiplies(x, weight) and not linear.multiplies(x[1:], weight)
    monkeypatch.setattr(linear, "MATRIX_UNITS", True)
    assert not linear.multiplies(x, weight)
    assert torch.equal(NATIVE.linear(x, weight, bias), torch.nn.functional.linear(x, weight, bias))


@pytest.mark.parametrize("shape", [(5,), (2, 20, 5), (1, 1, 40, 5), (0, 5)])
def test_a_linear_map_takes_rows_of_any_shape(shape, rows_from):
    x, weight, bias = normal(*shape), normal(3, 5), normal(3)
    ours = output_and_gradients(NATIVE.linear, [x, weight, bias])
    for our, their in zip(ours, output_and_gradients(TORCH.linear, [x, weight, bias]), strict=True):
        torch.testing.assert_close(our, their, rtol=2**-6, atol=2**-6)


def test_only_the_gradients_that_are_needed_are_computed():
    x, weight, bias = normal(20, 5), normal(3, 5).requires_grad_(), normal(3)
    NATIVE.linear(x, weight, bias).sum().backward()
    assert weight.grad is not None and x.grad is None and bias.grad is None


def test_autocast_casts_what_is_multiplied():
    x, weight, bias = torch.randn(20, 8), torch.randn(4, 8), torch.randn(4)
    with torch.autocast("cpu", BF16):
        ours = NATIVE.linear(x, weight, bias), NATIVE.logits(x, weight)
    assert torch.equal(ours[0], NATIVE.linear(x.to(BF16), weight.to(BF16), bias.to(BF16)))
    assert torch.equal(ours[1], NATIVE.logits(x.to(BF16), weight.to(BF16)))


@pytest.mark.parametrize("approximate", ["tanh", "none"])
@pytest.mark.parametrize("N", COLUMNS)
def test_gelu_alone_after_a_bias_and_after_a_product_is_as_close_as_pytorch(N, approximate):
    x, bias = normal(4, N, by=3.0), normal(N)
    assert_as_close_as_torch(lambda ops, *xs: ops.gelu(*xs, approximate), x, ops=NATIVE)
    assert_as_close_as_torch(lambda ops, *xs: ops.bias_gelu(*xs, approximate), x, bias, ops=NATIVE)
    inner, weight = normal(4, 33), normal(N, 33)
    assert_as_close_as_torch(lambda ops, *xs: ops.linear_gelu(*xs, approximate), inner, weight, bias, ops=NATIVE)


def test_gelu_of_every_number_is_as_close_as_pytorch():
    every = torch.arange(2**16).to(torch.int32).to(torch.int16).view(BF16)
    every = every[every.isfinite() & (every.abs() < 1e18)]  # beyond, the float64 oracle's own cube is no help
    assert_as_close_as_torch(lambda ops, x: ops.gelu(x), every, ops=NATIVE)
    far = torch.tensor([1e30, -1e30, 3e38, -3e38, math.inf, math.nan], dtype=BF16)
    assert NATIVE.gelu(far).tolist()[:5] == [*far[:1].tolist(), 0.0, *far[2:3].tolist(), 0.0, math.inf]
    assert NATIVE.gelu(far)[-1].isnan()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(("rows", "V"), [(1, 1), (3, 7), (5, 16), (2, 1023), (9, 50257)])
def test_cross_entropy_is_as_close_as_pytorch(rows, V, reduction):
    logits, targets = normal(rows, V, by=3.0), torch.randint(0, V, (rows,))
    targets[rows // 2] = -100 if rows > 1 else 0
    calls = [{}, {"consume": True}, {"consume": True, "expected_gradient": 1.0}]
    for options in calls if reduction != "none" else calls[:2]:
        # a copy, because the logits may be destroyed
        call = lambda ops, x, o=options: ops.cross_entropy(x * 1.0, targets, reduction=reduction, **o)  # noqa: E731
        assert_as_close_as_torch(call, logits, ops=NATIVE)


def test_cross_entropy_reads_rows_wherever_they_lie():
    wide, targets = normal(7, 90), torch.randint(0, 41, (7,))
    for view in (wide[:, 3:44], wide[::2, 3:44], wide.t()[3:44, :].t(), wide[:1, :41].expand(7, 41)):
        there = targets[: len(view)]
        ours, dense = (
            output_and_gradients(lambda x, there=there: NATIVE.cross_entropy(x, there), [x])
            for x in (view, view.clone(memory_format=torch.contiguous_format))
        )
        for our, expected in zip(ours, dense, strict=True):
            torch.testing.assert_close(our, expected, rtol=2**-7, atol=0)


def test_a_row_that_overflows_or_holds_nan_says_so():
    logits = normal(3, 50)
    logits[0, 7], logits[1, 7] = math.nan, math.inf
    losses = NATIVE.cross_entropy(logits, torch.tensor([3, 3, 3]), reduction="none")
    assert losses[:2].isfinite().tolist() == [False, False] and losses[2].isfinite()


def test_other_dtypes_are_those_of_the_torch_backend():
    qkv, x = torch.randn(1, 30, 3, 2, 16), torch.randn(5, 32)
    weight, bias, targets = torch.randn(32), torch.randn(32), torch.randint(0, 32, (5,))
    for ours, theirs in (
        (NATIVE.causal_attention(qkv, dropout_p=P, seed=SEED), TORCH.causal_attention(qkv, dropout_p=P, seed=SEED)),
        (NATIVE.layer_norm(x, weight, bias), TORCH.layer_norm(x, weight, bias)),
        (NATIVE.layer_norm(x.to(BF16), weight, bias), TORCH.layer_norm(x.to(BF16), weight, bias)),
        (NATIVE.add_layer_norm(x.half(), x, weight, bias)[0], TORCH.add_layer_norm(x.half(), x, weight, bias)[0]),
        (NATIVE.gelu(x), TORCH.gelu(x)),
        (NATIVE.dropout(x, P, SEED), TORCH.dropout(x, P, SEED)),
        (NATIVE.cross_entropy(x, targets), TORCH.cross_entropy(x, targets)),
    ):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)


@pytest.mark.parametrize("name", OPTIONS)
def test_compiled_code_calls_the_same(name):
    qkv, options = normal(2, 60, 3, 2, 16), OPTIONS[name](2, 60)
    torch._dynamo.reset()
    call = torch.compile(lambda x: NATIVE.causal_attention(x, **options), fullgraph=True, backend="aot_eager")
    assert same(output_and_gradients(call, [qkv]), attention_and_gradient(qkv, **options))


@pytest.mark.parametrize("dropout_p", [0.0, 0.9])
@pytest.mark.parametrize(("T", "D"), [(1, 96), (17, 257), (127, 300)])
def test_what_cancels_in_the_gradient_of_scores_cancels_for_large_numbers_too(T, D, dropout_p):
    """Where one key has all the weight ds is 0, as the difference of numbers that are anything but."""
    qkv = normal(3, T, 3, 3, D, by=5.0)
    assert_attention_is_close(qkv, scale=2.0, dropout_p=dropout_p, seed=SEED)
    assert_attention_is_close(qkv, window=1, dropout_p=dropout_p, seed=SEED)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_block_s_operations_are_compiled_as_one_graph(backend):
    x, weight, bias = normal(20, 32), normal(32, 32, by=0.2), normal(32)

    def block(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        normed, s = NATIVE.add_layer_norm(x, x * 0.5, bias, bias, dropout_p=P, seed=SEED)
        y = NATIVE.linear(NATIVE.linear_gelu(normed, weight, bias), weight, bias)
        return NATIVE.logits(NATIVE.dropout_add(y, s, P, SEED), weight)

    torch._dynamo.reset()
    call = torch.compile(block, fullgraph=True, backend=backend)
    ours, plain = (output_and_gradients(f, [x, weight, bias]) for f in (call, block))
    for our, expected in zip(ours, plain, strict=True):
        torch.testing.assert_close(our, expected, rtol=2**-6, atol=2**-6 * expected.abs().max().item())
