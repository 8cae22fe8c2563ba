"""Logits in rows of a multiple of 128 columns are those of the plain product, and so are the gradients."""

import importlib

import pytest
import torch
from fastgpt_kernels import load_ops
from fastgpt_kernels.testing import assert_as_close_as_torch, results_of

# of this name the package holds the function
file = importlib.import_module("fastgpt_kernels.torch_ops.logits")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BACKENDS = ["triton", "torch"]
SHAPES = [((1,), 1, 1), ((3,), 7, 128), ((2, 5), 16, 129), ((70,), 33, 300), ((3,), 24, 50257)]
LOSSES = {
    "a gradient of its own": {},
    "over the logits": {"consume": True},
    "over the logits, in one pass": {"consume": True, "expected_gradient": 1.0},
}


@pytest.fixture(params=[False, True], ids=["plain", "padded"])
def padded(request, monkeypatch):
    monkeypatch.setattr(file, "is_padded", lambda x, weight: request.param)
    return request.param


@pytest.fixture
def zeros_followed(monkeypatch):
    """What the backward was told of each gradient."""
    seen, original = [], file._gradients

    def spy(dz, x, padded, zeros_follow):
        seen.append(zeros_follow)
        return original(dz, x, padded, zeros_follow)

    monkeypatch.setattr(file, "_gradients", spy)
    return seen


def inputs_of(rows, N, V, dtype, device):
    x, weight = torch.randn(*rows, N), torch.randn(V, N) * N**-0.5
    return x.to(device, dtype), weight.to(device, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_they_are_as_close_to_the_mathematics_as_torch(shape, dtype, backend, padded, device):
    ops = load_ops(backend)
    assert_as_close_as_torch(lambda ops, *xs: ops.logits(*xs), *inputs_of(*shape, dtype, device), ops=ops)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_loss_may_write_over_them(shape, loss, backend, monkeypatch, device, zeros_followed):
    ops, (x, weight) = load_ops(backend), inputs_of(*shape, torch.float32, device)
    targets = torch.randint(weight.shape[0], (x.numel() // x.shape[-1],), device=device)

    def call(x, weight):
        return ops.cross_entropy(ops.logits(x, weight).flatten(0, -2), targets, reduction="sum", **LOSSES[loss])

    plain = results_of(call, (x, weight))
    monkeypatch.setattr(file, "is_padded", lambda x, weight: True)
    ours = results_of(call, (x, weight))
    # without a copy, wherever the gradient lies in the memory of the logits
    assert zeros_followed == [bool(LOSSES[loss])]
    for one, other in zip(ours, plain, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("shape", SHAPES)
def test_nothing_but_zeros_lies_beside_the_gradient(shape, device):
    ops, (x, weight) = load_ops("torch"), inputs_of(*shape, torch.bfloat16, device)
    V, columns = weight.shape[0], file.padded_columns(weight.shape[0])
    logits = file.padded_logits(x.requires_grad_(), weight).flatten(0, -2)
    targets = torch.randint(V, (logits.shape[0],), device=device)
    assert logits.shape == (targets.numel(), V) and (len(logits) == 1 or logits.stride() == (columns, 1))
    ops.cross_entropy(logits, targets, consume=True, expected_gradient=1.0)
    whole = logits.detach().as_strided((targets.numel(), columns), (columns, 1))
    assert not whole[:, V:].any() and whole[:, :V].any() == (V > 1)


def test_a_gradient_that_lies_elsewhere_in_like_rows_is_not_taken_for_one_with_zeros(device, zeros_followed):
    x, weight = inputs_of((5,), 16, 200, torch.float32, device)
    z = file.padded_logits(x.requires_grad_(), weight.requires_grad_())
    wide = torch.full((5, 256), torch.nan, device=device)
    wide[:, :200] = 1.0
    dx, dweight = torch.autograd.grad(z, (x, weight), wide[:, :200])
    assert zeros_followed == [False]
    ones = torch.ones(5, 200, device=device)
    torch.testing.assert_close(dx, ones @ weight.detach())
    torch.testing.assert_close(dweight, ones.T @ x.detach())


def test_a_second_backward_gives_the_same(device):
    x, weight = (t.requires_grad_() for t in inputs_of((5,), 16, 200, torch.float32, device))
    z = file.padded_logits(x, weight)
    first, second = (torch.autograd.grad(z.square().sum(), (x, weight), retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("rows", "V", "dtype", "device", "expected"),
    [
        (1024, 50257, torch.bfloat16, "cuda", True),
        (1024, 50257, torch.float16, "cuda", True),
        (1024, 50257, torch.float32, "cuda", False),
        (1024, 50304, torch.bfloat16, "cuda", False),
        (8, 50257, torch.bfloat16, "cuda", False),
        (1024, 50257, torch.bfloat16, "cpu", False),
    ],
)
def test_columns_are_added_where_they_pay(rows, V, dtype, device, expected):
    class On:
        type = device

    class Like:
        def __init__(self, shape):
            self.shape, self.dtype, self.device = shape, dtype, On

        def numel(self):
            return self.shape[0] * self.shape[1]

    assert file.is_padded(Like((rows, 768)), Like((V, 768))) is expected


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_gpu_computes_them_so_by_itself(dtype, device, zeros_followed):
    ops, (x, weight) = load_ops("triton"), inputs_of((2, 1024), 768, 50257, dtype, device)
    targets = torch.randint(50257, (2048,), device=device)
    logits = ops.logits(x.requires_grad_(), weight.requires_grad_()).flatten(0, -2)
    assert logits.stride() == (50304, 1)
    ops.cross_entropy(logits, targets, consume=True, expected_gradient=1.0).backward()
    assert zeros_followed == [True]
