from typing import Any

import pytest
import torch
from fastgpt_kernels import Ops, UnsupportedInput, layernorm, load_ops
from fastgpt_kernels.builtin import BUILTIN
from fastgpt_kernels.testing import assert_as_close_as_torch, assert_close, output_and_gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GPU, SWEEP = pytest.mark.gpu, pytest.mark.sweep
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# of x and the residual
PAIRS = [(torch.float32, torch.float32), (torch.float16, torch.float16), (torch.float16, torch.float32)]
GPU_PAIRS = [(torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)]
SHAPES = [(3, 7), (9, 768), (5, 1600)]
SHAPES += [pytest.param(shape, marks=SWEEP) for shape in ((1, 1), (2, 1023), (2, 3, 64), (70, 130))]
WIDE = [
    (3, 8193),
    *(pytest.param(shape, marks=SWEEP) for shape in ((1, 12288), (2, 16384))),
]  # parameter gradients by a kernel of their own
GPU_SHAPES = [(300, 1600), (8192, 768), (4099, 1025), (2050, 12288)]
P, SEED = 0.3, 2**40 + 7
RESULTS = {"both": (0, 1), "the normed one": (0,), "the sum": (1,)}


def normalise(ops: Ops, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return ops.layer_norm(x, weight, bias)


def add(ops: Ops, *tensors: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    return ops.add_layer_norm(*tensors, **options)


def chosen(results: tuple[Tensor, ...], places: tuple[int, ...]) -> tuple[Tensor, ...]:
    return tuple(results[place] for place in places)


def inputs(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> list[Tensor]:
    N = shape[-1]
    return [x.to(device, dtype) for x in (torch.randn(shape), 1.0 + 0.1 * torch.randn(N), torch.randn(N))]


def sum_inputs(
    shape: tuple[int, ...], dtype: torch.dtype, device: str, residual_dtype: torch.dtype | None = None
) -> list[Tensor]:
    """x, residual, weight, bias."""
    x, weight, bias = inputs(shape, dtype, device)
    return [x, torch.randn(shape).to(device, residual_dtype or dtype), weight, bias]


def kept_elements(ops: Ops, shape: tuple[int, ...], seed: int = SEED) -> Tensor:
    """Which elements of x dropout keeps, read off the kernel."""
    x, parameter = torch.ones(shape, device=DEVICE), torch.ones(shape[-1], device=DEVICE)
    return ops.add_layer_norm(x, torch.zeros_like(x), parameter, parameter, dropout_p=P, seed=seed)[1] != 0


def assert_dropout_uses(kept: Tensor, tensors: list[Tensor], ops: Ops, results: tuple[int, ...] = (0, 1)) -> None:
    """Outputs and gradients are those of this mask."""

    def with_mask(ops: Ops, x: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        return chosen(add(ops, x * (kept.to(x.device) / (1.0 - P)).to(x.dtype), *others), results)

    x, residual = tensors[:2]
    assert_close(
        ours=output_and_gradients(lambda *xs: chosen(add(ops, *xs, dropout_p=P, seed=SEED), results), tensors),
        theirs=output_and_gradients(lambda *xs: with_mask(BUILTIN, *xs), tensors),
        oracle=output_and_gradients(lambda *xs: with_mask(load_ops("reference"), *xs), [t.double() for t in tensors]),
        dtypes=[(x.dtype, residual.dtype)[i] for i in results] + [t.dtype for t in tensors],
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES + WIDE)
def test_it_is_as_close_to_the_mathematics_as_torch(shape, dtype, device, triton_ops):
    assert_as_close_as_torch(normalise, *inputs(shape, dtype, device), ops=triton_ops)


@pytest.mark.parametrize("pair", PAIRS + [pytest.param(pair, marks=GPU) for pair in GPU_PAIRS])
@pytest.mark.parametrize("shape", SHAPES + WIDE)
def test_with_a_residual_it_is_as_close(shape, pair, device, triton_ops):
    assert_as_close_as_torch(add, *sum_inputs(shape, pair[0], device, pair[1]), ops=triton_ops)


@pytest.mark.parametrize("pair", PAIRS + [pytest.param(pair, marks=GPU) for pair in GPU_PAIRS])
@pytest.mark.parametrize("shape", [(3, 7), (9, 768), (2, 1023), (70, 130), (2, 8193)])
def test_dropout_has_one_mask_forward_and_backward(shape, pair, device, triton_ops):
    tensors = sum_inputs(shape, pair[0], device, pair[1])
    assert_dropout_uses(kept_elements(triton_ops, shape), tensors, triton_ops)


@pytest.mark.parametrize("dropout", [False, True], ids=["plain", "dropout"])
@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("results", RESULTS.values(), ids=RESULTS)
def test_one_result_alone_has_its_own_gradient(results, pair, dropout, device, triton_ops):
    shape = (3, 41)  # rows that end within a call of the generator
    tensors = sum_inputs(shape, pair[0], device, pair[1])
    if dropout:
        assert_dropout_uses(kept_elements(triton_ops, shape), tensors, triton_ops, results)
    else:
        assert_as_close_as_torch(lambda ops, *xs: chosen(add(ops, *xs), results), *tensors, ops=triton_ops)


@GPU
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", GPU_SHAPES)
def test_it_is_as_close_with_many_rows(shape, dtype, device, triton_ops):
    assert_as_close_as_torch(normalise, *inputs(shape, dtype, device), ops=triton_ops)
    assert_as_close_as_torch(add, *sum_inputs(shape, dtype, device), ops=triton_ops)
    assert_dropout_uses(kept_elements(triton_ops, shape), sum_inputs(shape, dtype, device, torch.float32), triton_ops)


@SWEEP
@pytest.mark.usefixtures("device")
@settings(max_examples=20 if DEVICE == "cpu" else 4, deadline=None)
@given(rows=st.integers(1, 9), N=st.integers(1, 700))
def test_every_width_is_as_close(rows, N):
    assert_as_close_as_torch(add, *sum_inputs((rows, N), torch.float32, DEVICE), ops=load_ops("triton"))


def test_every_width_is_held_in_pieces_that_follow_each_other():
    for N in range(1, layernorm.MAX_COLUMNS + 1):
        pieces = layernorm.tile(N).pieces
        ends = [first + columns for first, columns in pieces]
        assert [first for first, _ in pieces] == [0, *ends[:-1]]
        assert all(end < N for end in ends[:-1])
        empty = ends[-1] - N
        assert 0 <= empty <= max(ends[-1] / 8, layernorm.SMALLEST_PIECE - 1)


def test_the_mask_is_that_of_dropout_where_rows_are_whole_calls(device, triton_ops):
    for shape in ((9, 40), (3, 768), (2, 1600)):
        expected = triton_ops.dropout(torch.ones(shape, device=device), P, SEED) != 0
        assert torch.equal(kept_elements(triton_ops, shape), expected)


def test_the_mask_of_a_row_depends_on_no_other_row_nor_on_the_tiles(device, triton_ops, monkeypatch):
    few, many = (kept_elements(triton_ops, (rows, 71)) for rows in (3, 9))
    assert torch.equal(few, many[:3])
    monkeypatch.setattr(layernorm, "tile", lambda N: layernorm.Tile(2, ((0, 32), (32, 16), (48, 32)), 4))
    assert torch.equal(many, kept_elements(triton_ops, (9, 71)))


def test_dropout_drops_at_its_rate_and_keeps_the_mean(device, triton_ops):
    kept = kept_elements(triton_ops, (40, 1023)).float()
    deviation = (P * (1 - P) / kept.numel()) ** 0.5
    assert abs(kept.mean().item() - (1 - P)) < 4 * deviation  # four standard deviations
    x, weight = torch.ones(40, 1023, device=device), torch.ones(1023, device=device)
    _, s = triton_ops.add_layer_norm(x, x, weight, weight, dropout_p=P, seed=SEED)
    assert abs(s.mean().item() - 2.0) < 4 * deviation / (1 - P)


@pytest.mark.parametrize("backend", ["triton", "torch", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("N", [33, 40])
def test_zeros_added_to_a_sum_that_is_taken_already_change_no_bit_of_norm_or_gradients(N, dtype, backend, device):
    """What activation checkpointing of a block rests on."""
    ops = load_ops(backend)
    x, residual, weight, bias = sum_inputs((3, N), dtype, device)
    options = {"dropout_p": P, "seed": SEED}
    total = ops.dropout_add(x, residual, P, SEED)
    whole, parts = (
        output_and_gradients(lambda *xs: ops.add_layer_norm(*xs, **options), [*terms, weight, bias])
        for terms in ((x, residual), (x.new_zeros(()).expand_as(x), total))
    )
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


@pytest.mark.parametrize("backend", ["triton", "torch", "reference"])
def test_a_seed_counts_where_there_is_dropout_only(backend, device):
    ops = load_ops(backend)
    tensors = sum_inputs((3, 40), torch.float32, device)
    by_int, by_tensor, other, none, without = (
        ops.add_layer_norm(*tensors, dropout_p=p, seed=seed)[1]
        for p, seed in (
            (P, SEED),
            (P, torch.tensor(SEED, device=device)),
            (P, SEED - 2**40),
            (0.0, SEED),
            (0.0, None),
        )
    )
    assert torch.equal(by_int, by_tensor) and not torch.equal(by_int, other) and torch.equal(none, without)


def test_a_mean_far_from_zero_leaves_the_variance_exact(device, triton_ops):
    x, weight, bias = inputs((4, 300), torch.float32, device)
    assert_as_close_as_torch(normalise, x + 1000.0, weight, bias, ops=triton_ops)
    assert_as_close_as_torch(add, x + 1000.0, torch.randn_like(x), weight, bias, ops=triton_ops)


def test_half_precision_rows_take_float32_parameters(device, triton_ops):
    x, weight, bias = inputs((4, 300), torch.float32, device)
    out, dx, dweight, dbias = output_and_gradients(triton_ops.layer_norm, [x.half(), weight, bias])
    exact = output_and_gradients(triton_ops.layer_norm, [x.half().float(), weight, bias])
    assert torch.equal(out, exact[0].half().double()) and torch.equal(dx, exact[1].half().double())
    assert torch.equal(dweight, exact[2]) and torch.equal(dbias, exact[3])


def test_a_loss_scale_scales_the_gradients(device, triton_ops):
    x, weight, bias = inputs((4, 300), torch.float16, device)
    for tensor in (x, weight, bias):
        tensor.requires_grad_()
    y = triton_ops.layer_norm(x, weight, bias)
    dy = (torch.randn(4, 300, device=device) * 16).round().half() * 2.0**-9
    plain, scaled = (torch.autograd.grad(y, (x, weight, bias), d, retain_graph=True) for d in (dy, dy * 2.0**12))
    for small, large in zip(plain, scaled, strict=True):
        spacing = torch.finfo(torch.float16).smallest_normal * torch.finfo(torch.float16).eps
        assert (large.float() / 2.0**12 - small.float()).abs().max() <= spacing


def test_views_are_taken(device, triton_ops):
    x, weight, bias = inputs((5, 4, 66), torch.float32, device)
    x, weight, bias = x.transpose(0, 1)[..., ::2], weight[::2], bias[::2]
    assert_as_close_as_torch(normalise, x, weight, bias, ops=triton_ops)
    residual = torch.randn(33, 4, 5, device=device).permute(1, 2, 0)
    assert_as_close_as_torch(add, x, residual, weight, bias, ops=triton_ops)
    assert_as_close_as_torch(add, x[:, :1].expand(4, 5, 33), residual, weight, bias[:1].expand(33), ops=triton_ops)
    assert all(result.is_contiguous() for result in triton_ops.add_layer_norm(x, residual, weight, bias))


def test_incoming_gradients_may_have_any_strides(device, triton_ops):
    tensors = [t.requires_grad_() for t in sum_inputs((6, 33), torch.float32, device)]
    y, s = triton_ops.add_layer_norm(*tensors, dropout_p=P, seed=SEED)
    dy, ds = torch.randn(33, 6, device=device).t(), torch.randn(1, 33, device=device).expand(6, 33)
    strided = torch.autograd.grad((y, s), tensors, (dy, ds), retain_graph=True)
    dense = torch.autograd.grad((y, s), tensors, (dy.contiguous(), ds.contiguous()))
    assert all(torch.equal(a, b) for a, b in zip(strided, dense, strict=True))


def test_eps_is_a_choice(device, triton_ops):
    tensors = inputs((3, 40), torch.float32, device)
    assert_as_close_as_torch(lambda ops, *xs: ops.layer_norm(*xs, eps=0.5), *tensors, ops=triton_ops)
    tensors = sum_inputs((3, 40), torch.float32, device)
    assert_as_close_as_torch(lambda ops, *xs: ops.add_layer_norm(*xs, eps=0.5), *tensors, ops=triton_ops)


def test_a_row_of_equal_numbers_becomes_the_bias(device, triton_ops):
    x, weight, bias = inputs((2, 33), torch.float32, device)
    out = triton_ops.layer_norm(torch.full_like(x, 3.0), weight, bias)
    assert torch.equal(out, bias.expand(2, 33))


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("shape", [(70, 130), pytest.param((3000, 8193), marks=GPU)])
def test_a_repeat_gives_the_same_bits(shape, passes, device, triton_ops, monkeypatch):
    if passes == 2:
        monkeypatch.setattr(layernorm, "MAX_COLUMNS_IN_ONE_PASS", 100)
    tensors = sum_inputs(shape, torch.float16, device)
    call = lambda *xs: triton_ops.add_layer_norm(*xs, dropout_p=P, seed=SEED)  # noqa: E731
    first, second = (output_and_gradients(call, tensors) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_every_reason_against_an_input_is_given(device, triton_ops):
    x = torch.zeros(2, 20000, dtype=torch.float64, device=device)
    with pytest.raises(UnsupportedInput) as error:
        triton_ops.layer_norm(x, x[0].float(), x[0].float())
    assert str(error.value) == (
        "layer_norm (triton) cannot take this input:\n"
        "  - x has 20000 columns; at most 16384 fit in registers\n"
        "  - x is torch.float64; supported: float32, float16, bfloat16\n"
        "Set kernels.backend to 'torch' to run it without Triton."
    )
    with pytest.raises(UnsupportedInput) as error:
        triton_ops.add_layer_norm(x[:0], x[:0], x[0], x[0].float())
    assert error.value.reasons == (
        "x has 20000 columns; at most 16384 fit in registers",
        "x is torch.float64; supported: float32, float16, bfloat16",
        "x has shape (0, 20000); it needs at least one element",
        "residual is torch.float64; supported: float32, float16, bfloat16",
        "residual has shape (0, 20000); it needs at least one element",
        "weight is torch.float64; supported: float32, float16, bfloat16",
    )


@pytest.mark.parametrize("backend", ["triton", "torch", "reference"])
def test_every_mistake_in_a_call_is_named(backend, device):
    ops = load_ops(backend)
    x = torch.zeros(2, 8, device=device)
    with pytest.raises(UnsupportedInput) as error:
        ops.layer_norm(x.long(), x[0, :7], x[0].to("meta"))
    assert str(error.value) == (
        f"layer_norm ({backend}) cannot take this input:\n"
        "  - x is torch.int64; it must be a floating-point tensor\n"
        "  - weight has shape (7,); x (..., 8) needs (8,)\n"
        f"  - bias is on meta and x on {x.device}\n"
        "No backend takes these arguments: correct the call."
    )
    with pytest.raises(UnsupportedInput) as error:
        ops.add_layer_norm(x.half(), x[:1].bfloat16(), x[0], x, dropout_p=0.5)
    assert error.value.reasons == (
        "dropout_p is 0.5 but seed is None; give an int, or an int64 tensor of one element",
        "residual has shape (1, 8) and x (2, 8)",
        "residual is torch.bfloat16 and x torch.float16; it must be of the same dtype, or float32",
        "bias has shape (2, 8); x (..., 8) needs (8,)",
    )
    with pytest.raises(UnsupportedInput, match=r"x has no dimensions; it must be \(..., N\)"):
        ops.layer_norm(x[0, 0], x[0], x[0])
