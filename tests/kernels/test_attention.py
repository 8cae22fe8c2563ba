import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from fastgpt_kernels import Ops, UnsupportedInput, attention, load_ops, tiles
from fastgpt_kernels.builtin import BUILTIN
from fastgpt_kernels.reference import visible
from fastgpt_kernels.testing import assert_as_close_as_torch, assert_close, output_and_gradients
from fastgpt_kernels.tiles import Tiles
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GPU, SWEEP = pytest.mark.gpu, pytest.mark.sweep
# bf16 is judged on a GPU: the interpreter truncates where a GPU rounds
DTYPES = [torch.float32, pytest.param(torch.float16, marks=SWEEP), pytest.param(torch.bfloat16, marks=GPU)]
LENGTHS, HEAD_SIZES = [1, 2, 17, 127, 129, 1000], [16, 40, 64, 80, 96, 128, 256]
SHAPES = [  # B, T, H, D
    (2, 1, 1, 16),
    (1, 17, 2, 64),
    (1, 127, 1, 80),
    (1, 66, 1, 256),
    *(
        pytest.param(shape, marks=SWEEP)
        for shape in (
            (2, 2, 3, 40),
            (2, 33, 1, 24),
            (1, 18, 1, 20),
            (1, 129, 1, 96),
            (1, 65, 1, 128),
            (1, 34, 1, 120),
            (1, 35, 1, 160),
        )
    ),
]
GPU_SHAPES = [(2, 1024, 12, 64), (2, 515, 3, 80), (2, 777, 2, 128)]
GPU_SHAPES += [pytest.param(shape, marks=SWEEP) for shape in ((3, 1023, 5, 64), (2, 515, 3, 96), (1, 2049, 2, 40))]
VIEWS: dict[str, Callable[[], Tensor]] = {
    "time first": lambda: torch.randn(19, 2, 3, 2, 24).transpose(0, 1),
    "heads before positions": lambda: torch.randn(3, 2, 2, 19, 24).permute(1, 3, 0, 2, 4),
    "the parts inside each head": lambda: torch.randn(2, 19, 2, 3, 24).transpose(2, 3),
    "a part of a larger tensor": lambda: torch.randn(2, 38, 3, 3, 32)[:, ::2, :, 1:, 8:],
    "odd strides": lambda: torch.randn(2, 19, 3, 2, 27)[..., 1:25],
    "columns far apart": lambda: torch.randn(2, 19, 3, 24, 2).transpose(3, 4),
    "one head for all": lambda: torch.randn(2, 19, 3, 1, 24).expand(2, 19, 3, 2, 24),
}
P, SEED = 0.3, 2**40 + 7


class Cut(NamedTuple):
    """How the three kernels are cut: queries x keys of each."""

    forward: tuple[int, int]
    backward_queries: tuple[int, int]
    backward_keys: tuple[int, int]


CUTS = {
    "diagonals in halves": Cut((64, 32), (32, 16), (16, 64)),
    "square": Cut((32, 32), (16, 16), (32, 32)),
    "the other way round": Cut((16, 64), (16, 32), (64, 16)),
}
WINDOWS = [None, 1, 2, 5, 17, 32, 33, 40, 69, 1000]
# windows and documents of 70 positions for every run, tiles and all; the slow sweep has all that there are
CHOSEN = {
    (1, None), (17, None), (32, None), (69, None),
    (None, "lengths at random"), (None, "each its own"), (None, "at the borders of tiles"), (None, "in two places"),
    (5, "in two places"), (17, "interleaved"), (40, "lengths at random"),
}  # fmt: skip
CHOSEN_IN_16_BITS = {(17, None), (None, "lengths at random"), (5, "in two places")}


def ids_of(kind: str, B: int, T: int, device: str = DEVICE) -> Tensor:
    """(B, T) ids of documents, of one of the `KINDS`."""
    position = torch.arange(T).expand(B, T)
    row = torch.arange(B)[:, None]
    ids = {
        "lengths at random": torch.randint(0, 5, (B, T)).sort(-1).values * 7 - 3,
        "one": torch.full((B, T), -1),
        "each its own": position,
        "at the borders of tiles": position // 32 + row,
        "in two places": (position + 11 * row) // 23 % 2,
        "interleaved": (position + row) % 3,
    }[kind]
    return ids.to(device)


KINDS = [None, "lengths at random", "one", "each its own", "at the borders of tiles", "in two places", "interleaved"]


def masks() -> Iterator[Any]:
    """A window and the kind of documents; those that are not chosen are marked slow."""
    for window in WINDOWS:
        for kind in KINDS:
            for dtype in (torch.float32, torch.float16):
                chosen = CHOSEN if dtype == torch.float32 else CHOSEN_IN_16_BITS
                yield pytest.param(window, kind, dtype, marks=[] if (window, kind) in chosen else pytest.mark.slow)


def packed(B: int, T: int, H: int, D: int, dtype: torch.dtype = torch.float32, device: str = DEVICE) -> Tensor:
    return torch.randn(B, T, 3, H, D).to(device, dtype)


def attend(ops: Ops, qkv: Tensor, ids: Tensor | None = None, **options: Any) -> Tensor:
    return ops.causal_attention(qkv, document_ids=ids, **options)


def assert_right(qkv: Tensor, ids: Tensor | None = None, *, ops: Ops, **options: Any) -> None:
    """As close to the mathematics as PyTorch, output and gradient."""
    inputs = [qkv] if ids is None else [qkv, ids]
    assert_as_close_as_torch(lambda ops, *inputs: attend(ops, *inputs, **options), *inputs, ops=ops)


@contextlib.contextmanager
def cut(how: Cut) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for kernel, sizes in how._asdict().items():
            stack.enter_context(tiles.forced(kernel, Tiles(*sizes, 4, 1)))
        yield


def kept_weights(ops: Ops, B: int, T: int, H: int, D: int, seed: int = SEED, **options: Any) -> Tensor:
    """(B, H, T, T) booleans, read off the kernel: with q = k = 0 and v a unit matrix, its output is the weights."""
    kept = []
    for first in range(0, T, D):
        qkv = torch.zeros(B, T, 3, H, D, dtype=torch.float16)
        columns = torch.arange(min(D, T - first))
        qkv[:, first + columns, 2, :, columns] = 1.0
        kept.append(ops.causal_attention(qkv.to(DEVICE), dropout_p=P, seed=seed, **options).cpu() != 0)
    return torch.cat(kept, -1)[..., :T].transpose(1, 2)


def attend_with_mask(
    qkv: Tensor, kept: Tensor, window: int | None = None, document_ids: Tensor | None = None
) -> Tensor:
    """Attention with a given dropout mask (B, H, T, T), by autograd."""
    ids = None if document_ids is None else document_ids.to(qkv.device)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    scores = q @ k.mT / qkv.shape[-1] ** 0.5
    weights = scores.masked_fill(~visible(qkv, window, ids), -math.inf).softmax(-1)
    return (torch.where(kept.to(qkv.device), weights / (1.0 - P), 0.0) @ v).transpose(1, 2)


def assert_dropout_uses(kept: Tensor, qkv: Tensor, ops: Ops, **options: Any) -> None:
    """Output and gradient are those of this mask."""
    assert_close(
        ours=output_and_gradients(lambda x: ops.causal_attention(x, dropout_p=P, seed=SEED, **options), [qkv]),
        theirs=output_and_gradients(lambda x: attend_with_mask(x, kept, **options), [qkv]),
        oracle=output_and_gradients(lambda x: attend_with_mask(x, kept, **options), [qkv.double()]),
        dtypes=[qkv.dtype, qkv.dtype],
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_as_close_to_the_mathematics_as_torch(shape, dtype, device, triton_ops):
    assert_right(packed(*shape, dtype, device), ops=triton_ops)


def test_it_is_so_for_many_tiles(device, triton_ops):
    assert_right(packed(1, 1000, 1, 16, device=device), ops=triton_ops)


@pytest.mark.parametrize("shape", [(1, 17, 1, 40), (1, 66, 1, 64)])
def test_bfloat16_widened_for_its_products_is_as_close_too(shape, device, triton_ops):
    assert_right(packed(*shape, torch.bfloat16, device), ops=triton_ops)


@pytest.mark.parametrize(("window", "kind", "dtype"), masks())
@pytest.mark.parametrize(
    "how", [pytest.param(how, marks=SWEEP if place else [], id=name) for place, (name, how) in enumerate(CUTS.items())]
)
def test_a_window_and_documents_are_as_close_whatever_the_tiles(how, window, kind, dtype, device, triton_ops):
    # two sequences where each has its own documents
    B = 2 if kind == "in two places" else 1
    ids = None if kind is None else ids_of(kind, B, 70, device)
    with cut(how):
        assert_right(packed(B, 70, 1, 16, dtype, device), ids, window=window, ops=triton_ops)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 70, 1, 80), (1, 35, 2, 256)])
def test_every_part_at_once_is_as_close_for_other_head_sizes(shape, dtype, device, triton_ops):
    ids = ids_of("in two places", *shape[:2], device)
    qkv = packed(*shape, dtype, device)
    assert_right(qkv, ids, window=20, scale=0.11, ops=triton_ops)
    kept = kept_weights(triton_ops, *shape)
    assert_dropout_uses(kept, qkv, triton_ops, window=20, document_ids=ids)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", HEAD_SIZES)
@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("masked", [False, True], ids=["causal", "window and documents"])
def test_it_is_as_close_for_every_length_and_head_size(masked, T, D, dtype, device, triton_ops):
    # short sequences in large batches: the largest of a few rounding errors says little about either side
    B = max(1, 32 // T)
    ids = ids_of("lengths at random", B, T, device) if masked else None
    assert_right(packed(B, T, 1, D, dtype, device), ids, window=T // 3 + 1 if masked else None, ops=triton_ops)


@GPU
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masked", [False, True], ids=["causal", "window and documents"])
@pytest.mark.parametrize("shape", GPU_SHAPES)
def test_it_is_as_close_at_length(shape, masked, dtype, device, triton_ops):
    ids = ids_of("lengths at random", *shape[:2], device) if masked else None
    assert_right(packed(*shape, dtype, device), ids, window=200 if masked else None, ops=triton_ops)


@GPU
def test_offsets_beyond_2_to_the_31_are_right(device, triton_ops):
    # q, k and v are 2^30 elements apart, and the last head is further from the first than 2^31
    B, T, H, D = 1, 2**16, 2**9, 32
    parts = torch.zeros(3, B, H, T, D, dtype=torch.float16, device=device)
    parts[..., -64:, :] = torch.randn(3, B, H, 64, D)
    qkv = parts.permute(1, 3, 0, 2, 4).requires_grad_()
    out = triton_ops.causal_attention(qkv, window=64)
    (gradient,) = torch.autograd.grad(out, qkv, torch.ones_like(out))
    last = parts[:, :, -1:, -64:].permute(1, 3, 0, 2, 4).contiguous().requires_grad_()
    expected = triton_ops.causal_attention(last, window=64)
    assert torch.equal(out[:, -1, -1], expected[:, -1, -1])
    (expected_gradient,) = torch.autograd.grad(expected, last, torch.ones_like(expected))
    torch.testing.assert_close(gradient[:, -1, :, -1], expected_gradient[:, -1, :, -1])


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS.keys())
def test_views_are_read_in_place(view, device, triton_ops):
    qkv = view().to(device)
    assert not qkv.is_contiguous()
    assert_right(qkv, ops=triton_ops)


def test_the_gradient_lies_in_memory_as_the_projection_does(device, triton_ops):
    for qkv in (packed(2, 5, 3, 16, device=device), torch.randn(3, 2, 3, 5, 16, device=device).permute(1, 3, 0, 2, 4)):
        qkv.requires_grad_()
        out = triton_ops.causal_attention(qkv)
        (gradient,) = torch.autograd.grad(out.sum(), qkv)  # an expanded number comes in
        assert out.is_contiguous() and gradient.stride() == qkv.stride()


def test_an_incoming_gradient_may_have_any_strides(device, triton_ops):
    qkv = packed(2, 19, 3, 16, device=device).requires_grad_()
    dout = torch.randn(3, 16, 2, 19, device=device).permute(2, 3, 0, 1)
    out = triton_ops.causal_attention(qkv)
    strided, dense = (torch.autograd.grad(out, qkv, d, retain_graph=True)[0] for d in (dout, dout.contiguous()))
    assert torch.equal(strided, dense)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8])
def test_ids_are_integers_of_any_kind_and_strides(dtype, device, triton_ops):
    qkv = packed(2, 10, 1, 16, device=device)
    ids = torch.tensor([3, 3, 250, 250, 250, 7, 7, 7, 3, 0], device=device).to(dtype).expand(2, 10)
    expected = triton_ops.causal_attention(qkv, document_ids=ids.long().contiguous())
    wide = torch.stack([ids, ids + 1], -1)
    for same in (ids, wide[..., 0], wide.transpose(0, 1).contiguous()[..., 1].t()):
        assert torch.equal(triton_ops.causal_attention(qkv, document_ids=same), expected)


def test_the_scale_is_a_choice(device, triton_ops):
    assert_right(packed(2, 18, 2, 32, device=device), scale=0.37, ops=triton_ops)


def test_scores_far_apart_neither_overflow_nor_lose_digits(device, triton_ops):
    qkv = 30.0 * packed(1, 40, 1, 64, device=device)  # scores in the thousands
    ours, theirs, oracle = (
        output_and_gradients(ops.causal_attention, [x])
        for ops, x in ((triton_ops, qkv), (BUILTIN, qkv), (load_ops("reference"), qkv.double()))
    )
    assert_close(ours[:1], theirs[:1], oracle[:1], [torch.float32])
    assert ours[1].isfinite().all()


def test_scores_beyond_float16_are_no_trouble(device, triton_ops):
    qkv = packed(1, 40, 1, 64, torch.float16, device)
    qkv[:, :, :2] *= 300.0  # products to 10^7 and more, where float16 ends at 65504
    ours = output_and_gradients(triton_ops.causal_attention, [qkv])
    oracle = output_and_gradients(load_ops("reference").causal_attention, [qkv.double()])
    assert_close(ours[:1], oracle[:1], oracle[:1], [torch.float16])
    assert ours[1].isfinite().all()


def test_a_loss_scale_scales_the_gradient(device, triton_ops):
    qkv = packed(1, 40, 1, 64, torch.float16, device).requires_grad_()
    out = triton_ops.causal_attention(qkv)
    # most of what is computed of it is subnormal, or nothing
    dout = (torch.randn(out.shape, device=device) * 16).round().half() * 2.0**-24
    scaled, plain = (torch.autograd.grad(out, qkv, d, retain_graph=True)[0] for d in (dout * 2.0**15, dout))
    assert scaled.isfinite().all()
    oracle = load_ops("reference")
    exact = qkv.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(oracle.causal_attention(exact), exact, dout.double())
    error, unscaled_error = ((g.double() / s - expected).abs().max() for g, s in ((scaled, 2**15), (plain, 1)))
    assert error <= torch.finfo(torch.float16).eps * expected.abs().max()
    assert error < unscaled_error


@pytest.mark.usefixtures("device")
@settings(max_examples=10 if DEVICE == "cpu" else 4, deadline=None)
@given(
    T=st.integers(2, 40),
    window=st.none() | st.integers(1, 45),
    documents=st.none() | st.lists(st.integers(0, 3), min_size=40, max_size=40),
    how=st.sampled_from(list(CUTS.values())),
    dropout_p=st.sampled_from([0.0, P]),
    data=st.data(),
)
def test_no_position_sees_its_future_its_neighbours_documents_or_beyond_its_window(
    T, window, documents, how, dropout_p, data
):
    now = data.draw(st.integers(0, T - 1))
    ids = None if documents is None else torch.tensor([documents[:T]], device=DEVICE)
    qkv = packed(1, T, 1, 16)
    seen = visible(qkv, window, ids).reshape(T, T)[now]
    other = qkv.clone()
    other[:, ~seen] = torch.randn(1).item()
    leaf = qkv.clone().requires_grad_()
    options = {"window": window, "ids": ids, "dropout_p": dropout_p, "seed": SEED}
    with cut(how):
        out = attend(load_ops("triton"), leaf, **options)
        assert torch.equal(out[:, now], attend(load_ops("triton"), other, **options)[:, now])
        (gradient,) = torch.autograd.grad(out[:, now].sum(), leaf)
    assert not gradient[:, ~seen].any()
    assert dropout_p or gradient[:, seen, 2].any(-1).all()


@pytest.mark.usefixtures("device")
@settings(max_examples=10 if DEVICE == "cpu" else 4, deadline=None)
@given(T=st.integers(1, 40), constant=st.floats(-3.0, 3.0), window=st.none() | st.integers(1, 40))
def test_each_output_is_an_average_of_the_values(T, constant, window):
    qkv = packed(1, T, 2, 16)
    qkv[:, :, 2] = constant
    out = load_ops("triton").causal_attention(qkv, window=window)
    torch.testing.assert_close(out, torch.full_like(out, constant))


@SWEEP
@pytest.mark.usefixtures("device")
@settings(max_examples=5 if DEVICE == "cpu" else 4, deadline=None)
@given(lengths=st.lists(st.integers(1, 25), min_size=1, max_size=3), window=st.none() | st.integers(1, 20))
def test_packed_documents_are_as_each_by_itself(lengths, window):
    ops = load_ops("triton")
    qkv = packed(1, sum(lengths), 1, 16)
    ids = torch.arange(len(lengths), device=DEVICE).repeat_interleave(torch.tensor(lengths, device=DEVICE))[None]
    together = output_and_gradients(lambda x: attend(ops, x, ids, window=window), [qkv])
    alone = [output_and_gradients(lambda x: attend(ops, x, window=window), [x]) for x in qkv.split(lengths, 1)]
    expected = torch.cat([out for out, _ in alone], 1)
    # of a few small numbers the largest rounding error says too little for the rule of `fastgpt_kernels.testing`
    torch.testing.assert_close(together[0], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("how", CUTS.values(), ids=CUTS)
def test_tiles_beyond_the_window_are_not_visited(how, device, triton_ops):
    # any tile, of 64 or fewer, that the late positions reach begins after the early ones
    window, early, late = 16, slice(0, 64), slice(128, 150)
    qkv = packed(1, 150, 1, 16, device=device)
    with cut(how):
        clean = output_and_gradients(lambda x: attend(triton_ops, x, window=window), [qkv])
        qkv[:, early, 1:] = torch.nan
        dirty = output_and_gradients(lambda x: attend(triton_ops, x, window=window), [qkv])
    for a, b in zip(clean, dirty, strict=True):
        assert torch.equal(a[:, late], b[:, late]) and b[:, early].isnan().any()


@pytest.mark.parametrize("how", CUTS.values(), ids=CUTS)
def test_tiles_of_other_documents_are_not_visited(how, device, triton_ops):
    qkv, ids = packed(1, 140, 1, 16, device=device), (torch.arange(140, device=device) // 64)[None]
    documents = [slice(0, 64), slice(64, 128), slice(128, 140)]
    with cut(how):
        clean = output_and_gradients(lambda x: attend(triton_ops, x, ids), [qkv])
        qkv[:, documents[1]] = torch.nan
        dirty = output_and_gradients(lambda x: attend(triton_ops, x, ids), [qkv])
    for a, b in zip(clean, dirty, strict=True):
        assert torch.equal(a[:, documents[0]], b[:, documents[0]]) and torch.equal(
            a[:, documents[2]], b[:, documents[2]]
        )
        assert b[:, documents[1]].isnan().all()


@pytest.mark.parametrize("how", CUTS.values(), ids=CUTS)
def test_tiles_of_the_future_are_not_visited(how, device, triton_ops):
    qkv = packed(1, 140, 1, 16, device=device)
    with cut(how):
        clean = triton_ops.causal_attention(qkv)
        qkv[:, 64:] = torch.nan
        dirty = triton_ops.causal_attention(qkv)
    assert torch.equal(clean[:, :64], dirty[:, :64]) and dirty[:, 64:].isnan().all()


def test_a_repeat_gives_the_same_bits(device, triton_ops):
    qkv, ids = packed(1, 81, 1, 40, torch.float16, device), ids_of("in two places", 1, 81, device)
    for options in ({}, {"window": 30, "ids": ids, "dropout_p": P, "seed": SEED}):
        call = lambda x, o=options: attend(triton_ops, x, **o)  # noqa: E731
        first, second = output_and_gradients(call, [qkv]), output_and_gradients(call, [qkv])
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 33, 1, 40), (1, 70, 1, 128)])
def test_dropout_has_one_mask_forward_and_backward(shape, dtype, device, triton_ops):
    assert_dropout_uses(kept_weights(triton_ops, *shape), packed(*shape, dtype, device), triton_ops)


def test_dropout_drops_at_its_rate_independently_in_each_head(device, triton_ops):
    T = 128
    kept = kept_weights(triton_ops, 2, T, 2, 128)[..., torch.ones(T, T, dtype=torch.bool).tril()]
    n = kept.numel()
    assert abs(kept.float().mean().item() - (1 - P)) < 4 * (P * (1 - P) / n) ** 0.5  # four standard deviations
    agreement = (kept[0, 0] == kept[1, 1]).float().mean().item()
    expected = P**2 + (1 - P) ** 2
    assert abs(agreement - expected) < 4 * (expected * (1 - expected) / kept[0, 0].numel()) ** 0.5


def test_dropout_keeps_the_mean(device, triton_ops):
    qkv = torch.zeros(1, 128, 3, 4, 16, device=device)
    qkv[:, :, 2] = 1.0
    # each output averages its kept weights: near 1 with a standard deviation of sqrt(P / (1 - P) / (i + 1))
    out = triton_ops.causal_attention(qkv, dropout_p=P, seed=SEED)[0, :, :, 0]
    deviation = (P / (1 - P) / torch.arange(1, 129, device=device)).sum().div(4).sqrt() / 128
    assert abs(out.mean().item() - 1.0) < 4 * deviation


def test_the_mask_is_a_function_of_the_seed(device, triton_ops):
    shape = (1, 40, 1, 64)
    first = kept_weights(triton_ops, *shape)
    assert torch.equal(first, kept_weights(triton_ops, *shape))
    assert not torch.equal(first, kept_weights(triton_ops, *shape, seed=SEED + 1))
    assert not torch.equal(first, kept_weights(triton_ops, *shape, seed=SEED - 2**40))  # the high word counts


@pytest.mark.parametrize("how", CUTS.values(), ids=CUTS)
def test_the_mask_depends_on_neither_the_tiles_nor_what_is_visible(how, device, triton_ops):
    shape, ids = (1, 70, 1, 80), ids_of("in two places", 1, 70, device)
    kept = kept_weights(triton_ops, *shape)
    qkv = packed(*shape, device=device)
    with cut(how):
        assert torch.equal(kept, kept_weights(triton_ops, *shape))
        both = kept_weights(triton_ops, *shape, window=20, document_ids=ids)
        assert torch.equal(both, kept & visible(qkv, 20, ids).cpu())
        assert_dropout_uses(kept, qkv, triton_ops, window=20, document_ids=ids)


def test_a_longer_sequence_keeps_the_mask_of_its_start(device, triton_ops):
    short, long = (kept_weights(triton_ops, 1, T, 2, 64) for T in (20, 50))
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
    seeds = SEED, torch.tensor([SEED], device=device), torch.tensor(SEED, device=device)
    first, *others = (ops.causal_attention(qkv, dropout_p=P, seed=seed) for seed in seeds)
    assert all(torch.equal(first, other) for other in others)


def test_without_dropout_a_seed_changes_nothing(device, triton_ops):
    qkv = packed(1, 20, 2, 16, device=device)
    assert torch.equal(triton_ops.causal_attention(qkv), triton_ops.causal_attention(qkv, seed=SEED))


def test_every_reason_against_an_input_is_given(device, triton_ops):
    with pytest.raises(UnsupportedInput) as error:
        triton_ops.causal_attention(torch.zeros(0, 4, 3, 1, 8, dtype=torch.float64, device=device))
    assert str(error.value) == (
        "causal_attention (triton) cannot take this input:\n"
        "  - qkv is torch.float64; supported: float32, float16, bfloat16\n"
        "  - qkv has shape (0, 4, 3, 1, 8); it needs at least one element\n"
        "  - the head size is 8; it must be between 16 and 256\n"
        "Set kernels.backend to 'torch' to run it without Triton."
    )


def test_a_device_without_kernels_is_named(device, triton_ops, monkeypatch):
    # as in a process that compiles
    monkeypatch.setattr(attention.launch, "INTERPRETED", False)
    with pytest.raises(UnsupportedInput) as error:
        triton_ops.causal_attention(torch.zeros(2, 4, 3, 1, 257, dtype=torch.float64, device="meta"))
    assert str(error.value) == (
        "causal_attention (triton) cannot take this input:\n"
        "  - qkv is on meta; a GPU is needed, or TRITON_INTERPRET=1 from the start\n"
        "  - qkv is torch.float64; supported: float32, float16, bfloat16\n"
        "  - the head size is 257; it must be between 16 and 256\n"
        "Set kernels.backend to 'torch' to run it without Triton."
    )


@pytest.mark.parametrize("backend", ["triton", "torch", "reference"])
def test_every_mistake_in_a_call_is_named(backend, device):
    with pytest.raises(UnsupportedInput) as error:
        load_ops(backend).causal_attention(torch.zeros(2, 3, 4, device=device), scale=-1.0, dropout_p=1.0, window=0)
    assert str(error.value) == (
        f"causal_attention ({backend}) cannot take this input:\n"
        "  - dropout_p is 1.0; it must be at least 0 and below 1\n"
        "  - dropout_p is 1.0 but seed is None; give an int, or an int64 tensor of one element\n"
        "  - qkv has shape (2, 3, 4); it must be (B, T, 3, H, D)\n"
        "  - window is 0; it must be None or an integer of at least 1\n"
        "  - scale is -1.0; it must be positive and finite\n"
        "No backend takes these arguments: correct the call."
    )


@pytest.mark.parametrize("backend", ["triton", "torch", "reference"])
@pytest.mark.parametrize(
    ("options", "reasons"),
    [
        ({"window": True}, ["window is True; it must be None or an integer of at least 1"]),
        ({"window": 2.0}, ["window is 2.0; it must be None or an integer of at least 1"]),
        ({"window": -3}, ["window is -3; it must be None or an integer of at least 1"]),
        (
            {"document_ids": torch.zeros(2, 5)},
            [
                "document_ids is torch.float32; it must be a tensor of integers",
                "document_ids has shape (2, 5); qkv (2, 4, 3, 1, 16) needs (2, 4)",
            ],
        ),
        (
            {"document_ids": torch.zeros(4, dtype=torch.bool, device="meta")},
            [
                "document_ids is torch.bool; it must be a tensor of integers",
                "document_ids has shape (4,); qkv (2, 4, 3, 1, 16) needs (2, 4)",
                "document_ids is on meta and qkv on cpu",
            ],
        ),
        ({"dropout_p": -0.1, "seed": 1}, ["dropout_p is -0.1; it must be at least 0 and below 1"]),
        ({"scale": math.inf}, ["scale is inf; it must be positive and finite"]),
    ],
)
def test_what_is_wrong_with_an_option_is_said(backend, options, reasons):
    with pytest.raises(UnsupportedInput) as error:
        load_ops(backend).causal_attention(torch.zeros(2, 4, 3, 1, 16), **options)
    assert error.value.reasons == tuple(reasons)


@pytest.mark.parametrize(
    ("head_size", "pieces"),
    [
        (16, (16, 0)),
        (24, (32, 0)),
        (40, (32, 16)),
        (64, (64, 0)),
        (80, (64, 16)),
        (96, (64, 32)),
        (120, (128, 0)),
        (160, (128, 32)),
    ],
)
def test_head_sizes_between_powers_of_two_are_split(head_size, pieces):
    assert attention.pieces(head_size) == pieces


def test_the_pieces_of_a_head_are_powers_of_two_and_hold_it():
    for head_size in range(16, 257, 8):
        main, tail = attention.pieces(head_size)
        assert main >= 16 and main.bit_count() == 1
        assert tail == 0 or (tail >= 16 and tail.bit_count() == 1)
        assert head_size <= main + tail < max(2 * head_size, 32)
