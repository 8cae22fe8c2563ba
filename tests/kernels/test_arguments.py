"""What the operations say of arguments that they cannot take, in every backend."""

import math
import mmap
import pickle
import sys

import numpy as np
import pytest
import torch
from fastgpt_kernels import UnsupportedInput, load_ops
from torch.autograd import forward_ad

BACKENDS = ["triton", "torch", "reference"]
P, SEED = 0.25, 5

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the tensors of these tests are on the CPU")


def calls_of(ops):
    """Every differentiable operation as a function of its first tensor, and that tensor."""
    ids, targets = torch.tensor([[0, 1, 0]]), torch.tensor([0, 1])
    x, vector, square = torch.randn(2, 16), torch.ones(16), torch.eye(16)
    return {
        "causal_attention": (ops.causal_attention, torch.randn(1, 4, 3, 1, 16)),
        "layer_norm": (lambda x: ops.layer_norm(x, vector, vector), x),
        "add_layer_norm": (lambda x: ops.add_layer_norm(square[:2], x, vector, vector), x),
        "gelu": (ops.gelu, x),
        "gelu in 16 bits": (ops.gelu, x.half()),
        "bias_gelu": (lambda bias: ops.bias_gelu(x, bias), vector),
        "linear": (lambda weight: ops.linear(x, weight, vector), square),
        "linear_gelu": (lambda weight: ops.linear_gelu(x, weight, vector), square),
        "embedding": (lambda table: ops.embedding(ids, square, table), square),
        "dropout": (lambda x: ops.dropout(x, P, SEED), x),
        "dropout_add": (lambda x: ops.dropout_add(x, x, P, SEED), x),
        "logits": (lambda weight: ops.logits(x, weight), square),
        "cross_entropy": (lambda x: ops.cross_entropy(x, targets), x),
        "linear_cross_entropy": (lambda weight: ops.linear_cross_entropy(x, weight, targets), square),
    }


OPERATIONS = list(calls_of(load_ops("torch")))


def reasons_of(call, *args, **kwargs):
    with pytest.raises(UnsupportedInput) as error:
        call(*args, **kwargs)
    return error.value.reasons


def test_what_no_backend_and_what_triton_cannot_take_is_said_at_once(triton_ops):
    with pytest.raises(UnsupportedInput) as error:
        triton_ops.layer_norm(torch.zeros(1, 20000, dtype=torch.float64), torch.ones(3), torch.ones(20000))
    assert str(error.value) == (
        "layer_norm (triton) cannot take this input:\n"
        "  - weight has shape (3,); x (..., 20000) needs (20000,)\n"
        "  - x has 20000 columns; at most 16384 fit in registers\n"
        "  - x is torch.float64; supported: float32, float16, bfloat16\n"
        "No backend takes these arguments: correct the call."
    )
    assert reasons_of(triton_ops.causal_attention, torch.zeros(1, 2, 3, 1, 8, dtype=torch.float64), window=0) == (
        "window is 0; it must be None or an integer of at least 1",
        "qkv is torch.float64; supported: float32, float16, bfloat16",
        "the head size is 8; it must be between 16 and 256",
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_reason_is_given_once(backend):
    one = torch.tensor(1.0)
    assert reasons_of(load_ops(backend).layer_norm, one, one, one) == ("x has no dimensions; it must be (..., N)",)


@pytest.mark.parametrize("backend", BACKENDS)
def test_faults_of_the_documents_are_named_beside_those_of_qkv(backend):
    call, qkv = load_ops(backend).causal_attention, torch.zeros(1, 2, 2, 1, 16)
    assert reasons_of(call, qkv, document_ids=torch.zeros(9, dtype=torch.float32)) == (
        "qkv has shape (1, 2, 2, 1, 16); it must be (B, T, 3, H, D)",
        "document_ids is torch.float32; it must be a tensor of integers",
        "document_ids has shape (9,); it must be (B, T)",
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_no_tensor_is_named(backend):
    ops, x = load_ops(backend), torch.ones(2, 16)
    assert reasons_of(ops.layer_norm, x, x[0], None, -1.0) == (
        "bias is None; it must be a tensor",
        "eps is -1.0; it must be at least 0 and finite",
    )
    for operation in (ops.linear, ops.linear_gelu):
        assert reasons_of(operation, x, None, None) == (
            "weight is None; it must be a tensor",
            "bias is None; it must be a tensor",
        )
    nothing = "{} is None; it must be a tensor"
    assert reasons_of(ops.bias_gelu, x, None) == (nothing.format("bias"),)
    assert reasons_of(ops.gelu, [1.0]) == ("x is of type list; it must be a tensor",)
    assert reasons_of(ops.add_layer_norm, x, None, x[0], x[0]) == (nothing.format("residual"),)
    assert reasons_of(ops.dropout, None, P, SEED) == (nothing.format("x"),)
    assert reasons_of(ops.dropout_add, x, None, P, SEED) == (nothing.format("residual"),)
    assert reasons_of(ops.embedding, None, x, x) == (nothing.format("tokens"),)
    assert reasons_of(ops.causal_attention, None) == (nothing.format("qkv"),)
    assert reasons_of(ops.decode_attention, x, None, x, x) == (nothing.format("k_cache"),)
    assert reasons_of(ops.logits, x, None) == (nothing.format("weight"),)
    assert reasons_of(ops.logits, x, x[:, :3]) == (
        f"weight has shape {(len(x), 3)}; x (..., {x.shape[1]}) needs (V, {x.shape[1]})",
    )
    assert reasons_of(ops.cross_entropy, x, None) == (nothing.format("targets"),)
    assert reasons_of(ops.linear_cross_entropy, x, x, None) == (nothing.format("targets"),)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_norm_needs_a_sensible_eps_and_parameters_that_are_numbers(backend):
    ops, x = load_ops(backend), torch.ones(2, 16)
    for eps in (-5.0, math.nan, math.inf):
        expected = (f"eps is {eps}; it must be at least 0 and finite",)
        assert reasons_of(ops.layer_norm, x, x[0], x[0], eps) == expected
        assert reasons_of(ops.add_layer_norm, x, x, x[0], x[0], eps) == expected
    whole = x[0].long()
    expected = ("bias is torch.int64; it must be a floating-point tensor",)
    assert reasons_of(ops.layer_norm, x, x[0], whole) == expected == reasons_of(ops.bias_gelu, x, whole)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", [1.9, True, "1", np.float64(1.0), np.bool_(True)])
def test_a_seed_is_an_integer(seed, backend):
    ops, x = load_ops(backend), torch.ones(4, 16)
    expected = (f"seed is {seed!r}; it must be an int, or an int64 tensor of one element",)
    assert reasons_of(ops.dropout, x, P, seed) == expected
    assert reasons_of(ops.causal_attention, x.view(1, 1, 1, 4, 16).repeat(1, 1, 3, 1, 1), seed=seed) == expected


@pytest.mark.parametrize("backend", BACKENDS)
def test_integers_of_other_kinds_are_integers(backend):
    ops, x, qkv = load_ops(backend), torch.ones(4, 16), torch.randn(1, 5, 3, 1, 16)
    assert torch.equal(ops.dropout(x, P, np.int64(7)), ops.dropout(x, P, 7))
    assert torch.equal(ops.causal_attention(qkv, window=np.int64(2)), ops.causal_attention(qkv, window=2))


@pytest.mark.parametrize("backend", BACKENDS)
def test_integers_are_not_dropped(backend):
    ops, x = load_ops(backend), torch.ones(8, dtype=torch.int64)
    assert reasons_of(ops.dropout, x, P, SEED) == ("x is torch.int64; it must be a floating-point tensor",)
    assert reasons_of(ops.dropout, x, 0.0, None) == ("x is torch.int64; it must be a floating-point tensor",)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_head_has_a_column(backend):
    ops, cache = load_ops(backend), torch.zeros(1, 2, 3, 0)
    reason = "qkv has shape (1, 2, 3, 1, 0); D must be at least 1"
    assert reason in reasons_of(ops.causal_attention, torch.zeros(1, 2, 3, 1, 0))
    reason = "q has shape (1, 2, 0); D must be at least 1"
    assert reason in reasons_of(ops.decode_attention, torch.zeros(1, 2, 0), cache, cache, torch.tensor([1]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_seed_lies_where_its_elements_do(backend):
    """A copy of it would wait for the device, and break the capture of a graph."""
    ops, seed = load_ops(backend), torch.zeros(1, dtype=torch.int64, device="meta")
    x, tokens = torch.ones(2, 16), torch.zeros(1, 2, dtype=torch.int64)
    expected = (
        "seed is on meta and the tensor to drop from on cpu; it must be there, or an int, because a copy would wait "
        "for the device",
    )
    assert reasons_of(ops.dropout, x, P, seed) == expected
    assert reasons_of(ops.dropout_add, x, x, P, seed) == expected
    assert reasons_of(ops.add_layer_norm, x, x, x[0], x[0], dropout_p=P, seed=seed) == expected
    assert reasons_of(ops.embedding, tokens, x, x, dropout_p=P, seed=seed) == expected
    assert reasons_of(ops.causal_attention, torch.ones(1, 2, 3, 1, 16), dropout_p=P, seed=seed) == expected


@pytest.mark.parametrize("backend", [5, None, ["torch"]])
def test_a_backend_is_a_name(backend):
    with pytest.raises(UnsupportedInput) as error:
        load_ops(backend)
    assert str(error.value) == (
        f"{backend!r} is not a kernel backend:\n"
        "  - allowed: 'auto', 'triton', 'native', 'torch', 'reference'\n"
        "Set kernels.backend to 'auto' to choose by the hardware."
    )


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("p", [0.0, P])
def test_a_sum_is_in_the_dtype_of_the_residual(p, backend):
    ops, x, residual, vector = load_ops(backend), torch.randn(2, 4).double(), torch.randn(2, 4), torch.ones(4)
    assert ops.dropout_add(x, residual, p, SEED).dtype == torch.float32
    normed, total = ops.add_layer_norm(x, residual, vector, vector, dropout_p=p, seed=SEED)
    assert (normed.dtype, total.dtype) == (torch.float64, torch.float32)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_autocast_casts_what_it_casts_elsewhere_and_nothing_else(backend):
    ops, targets = load_ops(backend), torch.tensor([0, 1])
    x, weight, bias = torch.randn(2, 16), torch.randn(8, 16), torch.randn(8)
    whole = ("x is torch.int64; it must be a floating-point tensor",)
    with torch.autocast("cpu", torch.float16):
        assert set(whole) <= set(reasons_of(ops.linear_gelu, x.long(), weight, bias))
        assert set(whole) <= set(reasons_of(ops.linear_cross_entropy, x.long(), weight, targets))
        assert ops.logits(x.bfloat16(), weight).dtype == torch.float16
        # what it is told of is what was given
        mixed = "weight is torch.float32 and x torch.float64; they must be of one dtype"
        assert mixed in reasons_of(ops.linear_gelu, x.double(), weight, bias)
        assert mixed in reasons_of(ops.linear_cross_entropy, x.double(), weight, targets)
        assert ops.linear_gelu(x.bfloat16(), weight, bias.half()).dtype == torch.float16
        wide = (x.double(), weight.double())
        if backend == "torch":
            assert ops.linear_gelu(*wide, bias.double()).dtype == torch.float64
            assert ops.linear_cross_entropy(*wide, targets).dtype == torch.float64
        else:
            assert len(reasons_of(ops.linear_gelu, *wide, bias.double())) == 3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_forward_mode_derivatives_are_refused_not_zero(operation, backend):
    call, x = calls_of(load_ops(backend))[operation]
    refused = "carries a tangent; forward-mode derivatives are not offered"
    for derivative in (torch.func.jvp, lambda f, xs, _: torch.func.hessian(lambda x: _sum(f(x)))(*xs)):
        with pytest.raises(UnsupportedInput, match=refused):
            derivative(call, (x,), (torch.ones_like(x),))
    with forward_ad.dual_level():
        with pytest.raises(UnsupportedInput, match=refused):
            call(forward_ad.make_dual(x, torch.ones_like(x)))
        call(x)


def _sum(outs):
    return sum(out.float().sum() for out in (outs if isinstance(outs, tuple) else (outs,)))


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_compiled_call_is_refused_with_the_same_reasons(backend, dynamic):
    ops, x = load_ops(backend), torch.ones(2, 16)

    def call(x):
        return ops.bias_gelu(x * 2.0, x[:, 0], "erf")

    reasons = reasons_of(call, x)
    assert len(reasons) == 2
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported) as error:
        torch.compile(call, fullgraph=True, backend="eager", dynamic=dynamic)(x)
    assert "UnsupportedInput('bias_gelu" in str(error.value) and all(reason in str(error.value) for reason in reasons)
    torch._dynamo.reset()
    assert reasons_of(torch.compile(call, backend="eager", dynamic=dynamic), x) == reasons


def test_the_error_survives_a_pickle():
    error = UnsupportedInput("it cannot", ["a", "b", "a"], "do not")
    copy = pickle.loads(pickle.dumps(error))  # noqa: S301 - of our own making
    assert str(copy) == str(error) == "it cannot:\n  - a\n  - b\ndo not"
    assert copy.reasons == ("a", "b") and copy.remedy == "do not"


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_rate_that_is_1_on_a_gpu_is_refused(backend):
    ops, x = load_ops(backend), torch.ones(2, 16)
    for p in (1.0 - 2.0**-25, 1.0 - 2.0**-30, float(np.nextafter(1.0, 0.0))):
        assert np.float32(p) == 1.0
        assert reasons_of(ops.dropout, x, p, SEED) == (
            f"p is {p}; it must be below 1 when rounded to float32, which is what a GPU is given",
        )
    assert np.float32(1.0 - 2.0**-24) < 1.0
    assert ops.dropout(x, 1.0 - 2.0**-24, SEED).isfinite().all()


@pytest.mark.parametrize("p", [1e-6, 0.3, 0.9999, 0.999999])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_what_is_kept_is_scaled_by_the_rate_at_which_it_is(backend, p):
    ops, r = load_ops(backend), min(round(65536 * p), 65535) / 65536
    scale = torch.tensor(1.0 / (1.0 - r), dtype=torch.float64)
    x = torch.ones(1, 1_000_000, dtype=torch.float64)
    tokens, nothing = torch.zeros(1, 1, dtype=torch.int64), torch.zeros_like(x)
    found = [
        ops.dropout(x, p, SEED),
        ops.dropout_add(x, nothing, p, SEED),
        ops.embedding(tokens, x, nothing, dropout_p=p, seed=SEED),
    ]
    for y in found:
        kept = y[y != 0]
        assert len(kept) and (kept == scale).all()
    # four standard deviations
    assert abs(found[0].mean().item() - 1.0) <= 4.0 * (r / (1.0 - r) / x.numel()) ** 0.5
    qkv = torch.zeros(1, 64, 3, 8, 64, dtype=torch.float64)
    qkv[:, torch.arange(64), 2, :, torch.arange(64)] = 1.0
    # each weight is 1 / (i + 1)
    weights = ops.causal_attention(qkv, dropout_p=min(p, 0.9999), seed=SEED) * torch.arange(1.0, 65.0)[:, None, None]
    r = min(round(65536 * min(p, 0.9999)), 65535) / 65536
    torch.testing.assert_close(weights[weights > 0], torch.full_like(weights[weights > 0], 1.0 / (1.0 - r)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtypes", [("float32", "bfloat16"), ("bfloat16", "float32"), ("float16", "bfloat16")])
def test_a_norm_and_a_bias_may_have_another_dtype_than_x(dtypes, backend):
    dtype, of_parameters = (getattr(torch, name) for name in dtypes)
    ops, exact = load_ops(backend), load_ops("reference")
    x, weight, bias = torch.randn(5, 33).to(dtype), torch.randn(33).to(of_parameters), torch.randn(33).to(of_parameters)
    leaves = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    wide = [tensor.detach().double() for tensor in leaves]
    for y, oracle in (
        (ops.layer_norm(*leaves), exact.layer_norm(*wide)),
        (ops.bias_gelu(leaves[0], leaves[2]), exact.bias_gelu(wide[0], wide[2])),
    ):
        assert y.dtype == dtype
        gradients = torch.autograd.grad(y.sum(), leaves, allow_unused=True)
        assert all(g is None or g.dtype == leaf.dtype for g, leaf in zip(gradients, leaves, strict=True))
        # x + bias, and its product with a weight, may be rounded to 16 bits
        assert (y.double() - oracle).abs().max() <= 4.0 * torch.finfo(torch.bfloat16).eps * oracle.abs().max()


def sparse_memory(elements):
    """Zeros, of which only the pages that are written take memory."""
    pages = mmap.mmap(-1, 2 * elements, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)  # MAP_NORESERVE
    return torch.frombuffer(pages, dtype=torch.float16)


@pytest.mark.skipif(sys.platform != "linux", reason="the flags of Linux")
def test_rows_that_32_bits_do_not_reach_are_read(triton_ops):
    T, stride = 64, 2**26
    dense = torch.randn(1, T, 3, 1, 16).half()
    far = sparse_memory(T * stride).as_strided(dense.shape, (0, stride, 16, 16, 1)).copy_(dense)
    assert torch.equal(triton_ops.causal_attention(far), triton_ops.causal_attention(dense))
    leaf = far.requires_grad_()
    (gradient,) = torch.autograd.grad(triton_ops.causal_attention(leaf).sum(), leaf)
    assert gradient.shape == dense.shape and gradient.isfinite().all()
    q, cache, lengths = dense[:, 0, 0], dense[:, None, :, 0, 0], torch.tensor([T])
    far_cache = far.detach()[:, None, :, 0, 0]
    assert torch.equal(
        triton_ops.decode_attention(q, far_cache, far_cache, lengths),
        triton_ops.decode_attention(q, cache, cache, lengths),
    )


def test_within_reach_nothing_is_copied():
    from fastgpt_kernels import attention, launch, tiles

    tallest = max(max(cut[:2]) for entry in tiles.entries() for cut in (entry.tiles, *entry.candidates))
    assert tallest <= attention.MOST_ROWS
    for stride, copied in ((2**23 - 1, False), (2**23, True), (2**40, True)):
        x = torch.empty_strided((2, 64, 3, 2, 64), (0, stride, 128, 64, 1), dtype=torch.float16, device="meta")
        reached = launch.within_reach(x, x.stride(1), attention.MOST_ROWS)
        assert (reached is not x) == copied and (reached.is_contiguous() or not copied)


def test_linear_gelu_multiplies_only_for_the_gradients_that_are_needed(triton_ops, monkeypatch):
    from fastgpt_kernels import linear_gelu

    calls = []
    launch_backward = linear_gelu.launch_backward
    monkeypatch.setattr(linear_gelu, "launch_backward", lambda *args: calls.append(args[-1]) or launch_backward(*args))
    x, weight, bias = torch.randn(3, 16), torch.randn(8, 16, requires_grad=True), torch.randn(8, requires_grad=True)
    alone = torch.autograd.grad(triton_ops.linear_gelu(x, weight, bias).sum(), (weight, bias))
    beside = torch.autograd.grad(triton_ops.linear_gelu(x.requires_grad_(), weight, bias).sum(), (weight, bias, x))
    assert calls == [False, True]
    assert all(torch.equal(a, b) for a, b in zip(alone, beside, strict=False)) and beside[2].shape == x.shape
    tile = linear_gelu.Tile(16, 16, 16, 4, 2)
    dx, du, _ = launch_backward(weight.detach(), torch.randn(3, 8), torch.randn(3, 8), "tanh", tile, False)
    assert dx.numel() == 0 and du.shape == (3, 8)


@pytest.mark.parametrize("backend", BACKENDS)
def test_numbers_that_a_compiler_makes_symbols_of_are_judged(backend):
    ops, x, qkv = load_ops(backend), torch.randn(3, 16), torch.randn(1, 4, 3, 1, 16)

    def call(x, qkv, eps, scale):
        return ops.layer_norm(x, x[0], x[0], eps), ops.causal_attention(qkv, scale=scale)

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="eager", dynamic=True)
    for eps, scale in ((1e-5, 0.1), (0.0, 3.0)):
        for a, b in zip(compiled(x, qkv, eps, scale), call(x, qkv, eps, scale), strict=True):
            torch.testing.assert_close(a, b)
