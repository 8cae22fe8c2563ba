"""A repeat gives the same bits where the device is full: programs run in an order of their own, and share sums."""

import pytest
import torch
from fastgpt_kernels.testing import results_of

P, SEED = 0.1, 2**40 + 7


def normal(*shape):
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def words(*shape):
    return torch.randint(50_257, shape, device="cuda")


CASES = {
    "attention": (lambda ops, qkv: ops.causal_attention(qkv), lambda: [normal(8, 1024, 3, 12, 64)]),
    "attention, dropout, a window and documents": (
        lambda ops, qkv, ids: ops.causal_attention(qkv, dropout_p=P, seed=SEED, window=300, document_ids=ids),
        lambda: [normal(8, 1024, 3, 12, 64), torch.arange(1024, device="cuda").expand(8, 1024) // 200],
    ),
    "layer norm": (
        lambda ops, *xs: ops.layer_norm(*xs),
        lambda: [normal(8192, 1600), normal(1600), normal(1600)],
    ),
    "layer norm of a sum, dropout": (
        lambda ops, *xs: ops.add_layer_norm(*xs, dropout_p=P, seed=SEED),
        lambda: [normal(8192, 1600), normal(8192, 1600), normal(1600), normal(1600)],
    ),
    "cross-entropy": (
        lambda ops, logits, targets: ops.cross_entropy(logits * 1.0, targets, consume=True),
        lambda: [normal(2048, 50_257), words(2048)],
    ),
    "logits and their loss": (
        lambda ops, x, weight, targets: ops.cross_entropy(
            ops.logits(x, weight), targets, consume=True, expected_gradient=1.0
        ),
        lambda: [normal(2048, 768), normal(50_257, 768), words(2048)],
    ),
    "linear cross-entropy": (
        lambda ops, *xs: ops.linear_cross_entropy(*xs),
        lambda: [normal(8192, 768), normal(50_257, 768), words(8192)],
    ),
    "embedding, dropout": (
        lambda ops, tokens, *tables: ops.embedding(tokens, *tables, dropout_p=P, seed=SEED),
        # half of them one word, whose gradients many programs add
        lambda: [torch.where(words(8, 1024) % 2 == 0, 220, words(8, 1024)), normal(50_257, 768), normal(1024, 768)],
    ),
    "GELU after a bias": (lambda ops, *xs: ops.bias_gelu(*xs), lambda: [normal(8192, 3072), normal(3072)]),
    "GELU after a linear map": (
        lambda ops, *xs: ops.linear_gelu(*xs),
        lambda: [normal(8192, 768), normal(3072, 768), normal(3072)],
    ),
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_a_repeat_gives_the_same_bits(name, device, triton_ops):
    call, inputs = CASES[name]
    tensors = inputs()
    first, *others = (results_of(lambda *xs: call(triton_ops, *xs), tensors) for _ in range(3))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
