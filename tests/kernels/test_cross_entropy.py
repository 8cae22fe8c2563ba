import importlib
import math

import pytest
import torch
import torch.nn.functional as F
from fastgpt_kernels import UnsupportedInput, cross_entropy, load_ops
from fastgpt_kernels.builtin import BUILTIN
from fastgpt_kernels.testing import assert_as_close_as_torch, assert_close, output_and_gradients
from hypothesis import given, settings
from hypothesis import strategies as st

# of this name the package holds the function
torch_file = importlib.import_module("fastgpt_kernels.torch_ops.cross_entropy")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
REDUCTIONS = ["mean", "sum", "none"]
# the gradient that comes in for the loss in `gradient_of` is 1
WAYS = {
    "beside the logits": {},
    "over the logits": {"consume": True},
    "in one pass": {"consume": True, "expected_gradient": 1.0},
    "in one pass, rescaled": {"consume": True, "expected_gradient": 0.3},
}


@pytest.fixture(params=["triton", "torch"])
def ops(request, device):
    return load_ops(request.param)


@pytest.fixture
def short_steps(monkeypatch):
    """The Triton kernels go through a row in steps of 256: short rows then have a first, middle and last one."""
    monkeypatch.setattr(cross_entropy, "MAX_LANES", 128)
    monkeypatch.setattr(cross_entropy, "MAX_DEPTH", 2)
    monkeypatch.setattr(cross_entropy, "ONE_PASS_LANES", 128)


def logits_and_targets(rows, V, dtype=torch.float32, device="cpu", ignored=0.3):
    logits, targets = (4.0 * torch.randn(rows, V)).to(device, dtype), torch.randint(V, (rows,))
    hidden = torch.rand(rows) < ignored
    hidden[0] = False
    return logits, targets.masked_fill(hidden, -100).to(device)


def gradient_of(ops, logits, targets, dloss=1.0, **options):
    """The gradient of logits that somebody else made, and these logits as the backward left them."""
    leaf = logits.detach().requires_grad_()
    made = leaf * 1.0
    loss = ops.cross_entropy(made, targets, **options)
    (gradient,) = torch.autograd.grad(loss, made, torch.full_like(loss, dloss))
    return gradient, made.detach()


@pytest.mark.parametrize("consume", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (3, 700), pytest.param((300, 50257), marks=pytest.mark.gpu)])
@pytest.mark.usefixtures("short_steps")
def test_it_is_as_close_to_the_mathematics_as_torch(shape, dtype, reduction, consume, device, ops):
    def call(ops, logits, targets):
        return ops.cross_entropy(logits * 1.0, targets, reduction=reduction, consume=consume)

    assert_as_close_as_torch(call, *logits_and_targets(*shape, dtype, device), ops=ops)


def loss_and_gradient(ops, logits, targets, dloss, **options):
    leaf = logits.detach().requires_grad_()
    loss = ops.cross_entropy(leaf * 1.0, targets, **options)
    (gradient,) = torch.autograd.grad(loss, leaf, torch.full_like(loss, dloss))
    return loss.detach(), gradient


@pytest.mark.parametrize("expected", [1.2, 0.4])  # right, and wrong: two roundings are still within the rule's floor
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (3, 700), pytest.param((300, 50257), marks=pytest.mark.gpu)])
@pytest.mark.usefixtures("short_steps")
def test_in_one_pass_it_is_as_close(shape, dtype, reduction, expected, device, ops):
    check_one_pass(ops, *logits_and_targets(*shape, dtype, device), reduction, expected)


@pytest.mark.parametrize("expected", [1.2, 0.4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_in_one_pass_it_is_so_for_the_vocabulary_of_gpt_2(dtype, expected, device, ops):
    check_one_pass(ops, *logits_and_targets(3, 50257, dtype, device), "mean", expected)


def check_one_pass(ops, logits, targets, reduction, expected):
    ours = loss_and_gradient(ops, logits, targets, 1.2, reduction=reduction, consume=True, expected_gradient=expected)
    theirs = loss_and_gradient(BUILTIN, logits, targets, 1.2, reduction=reduction)
    exact = loss_and_gradient(load_ops("reference"), logits.double(), targets, 1.2, reduction=reduction)
    numbers = [[x.double() for x in results] for results in (ours, theirs, exact)]
    assert_close(*numbers, dtypes=[x.dtype for x in ours])


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("short_steps")
def test_after_the_forward_the_logits_hold_the_gradient_that_was_expected(dtype, as_tensor, reduction, device, ops):
    logits, targets = logits_and_targets(6, 700, dtype, device)
    leaf = logits.view(2, 3, 700).requires_grad_()
    made = leaf * 1.0
    expected = torch.tensor([0.7], device=device) if as_tensor else 0.7
    loss = ops.cross_entropy(made.flatten(0, 1), targets, reduction=reduction, consume=True, expected_gradient=expected)
    written = made.detach().clone()
    gradient, from_made = torch.autograd.grad(loss, [leaf, made], torch.full_like(loss, 0.7))
    assert torch.equal(written, made) and torch.equal(written, gradient)
    # of logits that are a view too, the gradient is this memory and no copy
    assert from_made.data_ptr() == made.data_ptr()
    separate, _ = gradient_of(ops, logits, targets, 0.7, reduction=reduction)
    assert torch.equal(written.flatten(0, 1) == 0, separate == 0)
    eps = torch.finfo(dtype).eps
    assert (written.flatten(0, 1) - separate).abs().max() <= eps * separate.abs().max()


def test_rows_may_have_other_gradients_than_expected(device, ops):
    logits, targets = logits_and_targets(6, 40, device=device)
    leaf = logits.requires_grad_()
    dlosses = torch.tensor([0.5, 2.0, 0.0, math.nan, 0.5, -1.0], device=device)
    targets[3], targets[5] = -100, 7
    made = leaf * 1.0
    losses = ops.cross_entropy(made, targets, reduction="none", consume=True, expected_gradient=0.5)
    written = made.detach().clone()
    (gradient,) = torch.autograd.grad(losses, leaf, dlosses)
    ratios = (dlosses / 0.5).nan_to_num(0.0).unsqueeze(1)
    torch.testing.assert_close(gradient, written * ratios)
    assert torch.equal(gradient[[0, 4]], written[[0, 4]]) and not gradient[3].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_so_for_the_vocabulary_of_gpt_2(dtype, device, ops):
    logits, targets = logits_and_targets(3, 50257, dtype, device)
    assert_as_close_as_torch(lambda ops, z, t: ops.cross_entropy(z, t), logits, targets, ops=ops)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("before", "after"), [(0, 1), (1, 0), (3, 4), (8, 0), (0, 12)])
@pytest.mark.usefixtures("short_steps")
def test_rows_may_be_any_distance_apart(before, after, dtype, way, device, ops):
    V = 700
    whole, targets = logits_and_targets(6, before + V + after, dtype, device)
    targets = targets.clamp(max=V - 1)
    logits = whole[:, before : before + V].detach().requires_grad_()
    untouched = whole.clone()
    assert_as_close_as_torch(lambda ops, z, t: ops.cross_entropy(z, t), logits, targets, ops=ops)
    assert torch.equal(whole, untouched)
    separate, _ = gradient_of(ops, untouched[:, before : before + V], targets)
    (gradient,) = torch.autograd.grad(ops.cross_entropy(logits, targets, **WAYS[way]), logits)
    expected = untouched.clone()
    if "consume" in WAYS[way]:
        assert gradient.data_ptr() == logits.data_ptr()
        expected[:, before : before + V] = gradient
    assert torch.equal(whole, expected)
    assert (gradient - separate).abs().max() <= 2 * torch.finfo(dtype).eps * separate.abs().max()


@pytest.mark.parametrize("layout", ["transposed", "every second column", "one row for all"])
def test_other_layouts_are_copied_and_left_alone(layout, device, ops):
    whole = torch.randn(6, 40, device=device)
    logits = {"transposed": whole.t(), "every second column": whole[:, ::2], "one row for all": whole[:1].expand(9, -1)}
    logits = logits[layout]
    targets = torch.arange(len(logits), device=device) % logits.shape[1]
    before = whole.clone()
    for options in ({}, {"expected_gradient": 1.0}):
        call = lambda ops, z, t: ops.cross_entropy(z, t, consume=True, **options)  # noqa: B023, E731
        assert_as_close_as_torch(call, logits, targets, ops=ops)
    assert torch.equal(whole, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("short_steps")
def test_consumed_logits_hold_the_gradient_and_no_bit_of_it_is_another(dtype, device, ops):
    logits, targets = logits_and_targets(6, 700, dtype, device)
    kept, unchanged = gradient_of(ops, logits, targets, consume=False)
    written, overwritten = gradient_of(ops, logits, targets, consume=True)
    assert torch.equal(kept, written)
    assert torch.equal(unchanged, logits) and kept.data_ptr() != unchanged.data_ptr()
    assert written.data_ptr() == overwritten.data_ptr()


def test_without_a_backward_nothing_is_consumed(device, ops):
    logits, targets = logits_and_targets(6, 40, device=device)
    before = logits.clone()
    ops.cross_entropy(logits, targets, consume=True, expected_gradient=1.0)
    with torch.no_grad():
        ops.cross_entropy(logits.requires_grad_(), targets, consume=True, expected_gradient=1.0)
    ops.cross_entropy(logits, targets, consume=True)
    ops.cross_entropy(logits, targets, expected_gradient=1.0)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("way", ["over the logits", "in one pass", "in one pass, rescaled"])
def test_consumed_logits_have_no_second_gradient(way, device, ops):
    logits, targets = logits_and_targets(6, 40, device=device)
    logits.requires_grad_()
    loss = ops.cross_entropy(logits * 1.0, targets, **WAYS[way])
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a second backward needs consume=False"):
        loss.backward()
    loss = ops.cross_entropy(logits * 1.0, targets)
    first, second = (torch.autograd.grad(loss, logits, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("way", ["over the logits", "in one pass"])
def test_logits_that_another_gradient_needs_are_not_consumed_unnoticed(way, device, ops):
    logits, targets = logits_and_targets(6, 40, device=device)
    capped = logits.requires_grad_().tanh()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        ops.cross_entropy(capped, targets, **WAYS[way]).backward()


@pytest.mark.parametrize("rows", [64, pytest.param(8192, marks=pytest.mark.gpu)])
def test_a_loss_scale_acts_before_float16_rounds(rows, device, ops):
    logits, targets = logits_and_targets(rows, 300, torch.float16, device, ignored=0.0)
    # as if these were a few of 8,192 rows: unscaled, most gradients are below the smallest float16
    scale = 2.0**15 * rows / 8192
    exact, _ = gradient_of(load_ops("reference"), logits.double(), targets, scale)
    for options in ({}, {"consume": True}, {"consume": True, "expected_gradient": scale}):
        gradient, _ = gradient_of(ops, logits, targets, scale, **options)
        finest = torch.finfo(torch.float16).smallest_normal
        error = (gradient.double() - exact).abs()
        assert (error <= torch.finfo(torch.float16).eps * exact.abs().clamp(min=finest)).all()
    assert (exact / 2.0**15).abs().half().eq(0).float().mean() > 0.1


@pytest.mark.parametrize("ignore_index", [-100, -1, 2])
def test_a_target_that_is_ignored_does_not_count(ignore_index, device, ops):
    logits, targets = logits_and_targets(7, 5, device=device, ignored=0.0)
    targets[1::2] = ignore_index
    counts = targets != ignore_index
    for reduction in REDUCTIONS:
        loss = ops.cross_entropy(logits, targets, ignore_index=ignore_index, reduction=reduction)
        expected = F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction=reduction)
        torch.testing.assert_close(loss, expected)
    for options in WAYS.values():
        gradient, _ = gradient_of(ops, logits, targets, ignore_index=ignore_index, **options)
        assert not gradient[~counts].any() and gradient[counts].all()


def test_where_no_target_counts_the_sum_is_zero_and_the_mean_is_nan(device, ops):
    logits, targets = logits_and_targets(7, 5, device=device)
    targets.fill_(-100)
    for reduction, expected in (("none", torch.zeros(7)), ("sum", torch.tensor(0.0)), ("mean", torch.tensor(math.nan))):
        for options in WAYS.values():
            loss = ops.cross_entropy(logits * 1.0, targets, reduction=reduction, **options)
            assert torch.equal(loss.cpu().nan_to_num(9.0), expected.nan_to_num(9.0))
            gradient, _ = gradient_of(ops, logits, targets, reduction=reduction, **options)
            assert not gradient.any()


def test_an_ignored_row_may_hold_anything(device, triton_ops):
    logits, targets = logits_and_targets(4, 300, device=device, ignored=0.0)
    targets[1:3] = -100
    logits[1], logits[2] = math.nan, math.inf
    assert triton_ops.cross_entropy(logits, targets).isfinite()
    for options in WAYS.values():
        gradient, _ = gradient_of(triton_ops, logits, targets, **options)
        assert gradient.isfinite().all() and not gradient[1:3].any()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.usefixtures("short_steps")
@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # NumPy's, in the interpreter
def test_infinite_logits_give_what_torch_gives(way, device, ops):
    logits, targets = logits_and_targets(7, 700, device=device, ignored=0.0)
    logits[0, 100:600] = -math.inf  # a whole step, and lanes that never see a number
    targets[0] = 3
    logits[1, targets[1]] = -math.inf
    logits[2] = -math.inf
    logits[3, 5] = math.inf
    logits[4, 5] = math.nan
    logits[5, 1:] = -math.inf
    targets[5] = 0
    results = []
    for call, options in ((ops.cross_entropy, WAYS[way]), (F.cross_entropy, {})):
        leaf = logits.clone().requires_grad_()
        losses = call(leaf, targets, reduction="none", **options)
        results.append((losses.detach(), torch.autograd.grad(losses.sum(), leaf)[0]))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True)
    assert results[0][0][5] == 0.0 and results[0][0][1] == math.inf


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("offset", [-3e4, 1e4])
def test_large_logits_lose_no_digits(offset, dtype, device, ops):
    logits, targets = logits_and_targets(6, 300, dtype, device)
    logits += offset
    assert_as_close_as_torch(lambda ops, z, t: ops.cross_entropy(z, t, reduction="none"), logits, targets, ops=ops)
    logits, targets = logits_and_targets(6, 300, dtype, device)
    assert_as_close_as_torch(lambda ops, z, t: ops.cross_entropy(z, t), logits * 1e3, targets, ops=ops)

    def in_one_pass(ops, logits, targets):
        return ops.cross_entropy(logits * 1.0, targets, reduction="none", **WAYS["in one pass"])

    for shifted in (logits + offset, logits * 1e3):
        assert_as_close_as_torch(in_one_pass, shifted, targets, ops=ops)


def test_a_target_that_is_no_column_makes_its_row_nan(device, triton_ops):
    logits, targets = logits_and_targets(5, 40, device=device, ignored=0.0)
    for wrong in (40, -1, 2**40 + 3, -(2**63)):
        targets[2] = wrong
        for options in WAYS.values():
            leaf = logits.clone().requires_grad_()
            losses = triton_ops.cross_entropy(leaf * 1.0, targets, reduction="none", **options)
            gradient, _ = gradient_of(triton_ops, logits, targets, reduction="none", **options)
            assert losses.isnan().tolist() == [False, False, True, False, False]
            assert gradient.isnan().all(1).tolist() == losses.isnan().tolist() == gradient.isnan().any(1).tolist()


def test_on_a_cpu_the_torch_backend_refuses_a_target_that_is_no_column():
    logits, targets = logits_and_targets(5, 40, ignored=0.0)
    targets[2] = 40
    before = logits.clone()
    for options in WAYS.values():
        with pytest.raises(UnsupportedInput, match=r"targets has 40; with V = 40 columns it must be from 0 to 39"):
            load_ops("torch").cross_entropy(logits.requires_grad_(), targets, **options)
    assert torch.equal(logits, before)
    targets[2] = -1
    load_ops("torch").cross_entropy(logits, targets, ignore_index=-1)


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 4),
    V=st.integers(1, 300),
    shift=st.floats(-100.0, 100.0),
    backend=st.sampled_from(["triton", "torch"]),
)
def test_a_constant_added_to_a_row_changes_nothing(rows, V, shift, backend):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ops = load_ops(backend)
    logits, targets = logits_and_targets(rows, V, device=device)
    # in steps of 2^-8 the sums are exact
    logits, shift = (logits * 256).round() / 256, round(shift * 256) / 256
    for call in (lambda z: ops.cross_entropy(z, targets), lambda z: gradient_of(ops, z, targets)[0]):
        torch.testing.assert_close(call(logits + shift), call(logits), rtol=1e-5, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 4), V=st.integers(2, 300), backend=st.sampled_from(["triton", "torch"]))
def test_a_row_of_the_gradient_sums_to_zero_and_only_its_target_is_negative(rows, V, backend):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    logits, targets = logits_and_targets(rows, V, device=device)
    gradient, _ = gradient_of(load_ops(backend), logits, targets, reduction="sum")
    assert gradient.sum(1).abs().max() < 1e-5
    negative = [(row, column) for row, column in enumerate(targets.tolist()) if column != -100]
    assert (gradient < 0).nonzero().tolist() == [list(place) for place in negative]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.usefixtures("short_steps")
def test_a_repeat_gives_the_same_bits(way, device, ops):
    logits, targets = logits_and_targets(40, 700, torch.float16, device)
    first, second = (
        output_and_gradients(lambda z: ops.cross_entropy(z * 1.0, targets, **WAYS[way]), [logits]) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.usefixtures("triton_ops")
@pytest.mark.parametrize("stride", [40, 43])
def test_torch_library_finds_the_ops_well_formed(stride, device):
    whole, targets = logits_and_targets(3, stride, device=device)
    logits, targets = whole[:, :40], targets.clamp(max=39)
    losses, statistics = cross_entropy._cross_entropy(logits, targets, -100, False)
    for operation, kept in (
        (cross_entropy._gradient, (statistics,)),
        (cross_entropy._overwrite, (statistics,)),
        (torch_file._gradient, ()),
        (torch_file._overwrite, ()),
    ):
        torch.library.opcheck(operation, (logits, targets, *kept, losses, -100))
    for module, rescale in ((cross_entropy, cross_entropy._rescale), (torch_file, torch_file.rescale)):
        number = torch.tensor(0.5, device=device)
        torch.library.opcheck(module._losses_and_gradient, (logits, targets, number, -100))
        for dresult in (number, number + 1.0, losses):
            torch.library.opcheck(rescale, (logits, targets, dresult, number, -100))
    for consume in (False, True):
        for operation in (cross_entropy._cross_entropy, torch_file._losses):
            torch.library.opcheck(operation, (logits.detach().requires_grad_(), targets, -100, consume))
    for operation, kept in ((cross_entropy._gradient, (statistics,)), (torch_file._gradient, ())):
        torch.library.opcheck(operation, (torch.randn(40, 3, device=device).t(), targets, *kept, losses, -100))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_it_compiles_whole_with_the_layer_that_makes_the_logits(reduction, way, device, ops):
    torch.compiler.reset()  # the function of another parameter has the same code, and so many may it have
    x, weight = torch.randn(2, 3, 16, device=device), torch.randn(40, 16, device=device)
    targets = torch.randint(40, (6,), device=device)

    def call(x, weight):
        logits = F.linear(F.relu(x), weight)
        loss = ops.cross_entropy(logits.flatten(0, 1), targets, reduction=reduction, **WAYS[way])
        return loss * 1.0

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for ours, eager in zip(
        output_and_gradients(compiled, [x, weight]), output_and_gradients(call, [x, weight]), strict=True
    ):
        assert torch.equal(ours, eager)


@pytest.mark.parametrize("way", WAYS)
def test_checkpointing_changes_no_bit(way, device, ops):
    x, weight = torch.randn(6, 16, device=device), torch.randn(40, 16, device=device)
    targets = torch.randint(40, (6,), device=device)

    def call(x, weight):
        return ops.cross_entropy(F.linear(x, weight), targets, **WAYS[way])

    def recomputed(*inputs):
        return torch.utils.checkpoint.checkpoint(call, *inputs, use_reentrant=False)

    plain, again = (output_and_gradients(how, [x, weight]) for how in (call, recomputed))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_under_autocast_the_logits_keep_their_16_bits(device, ops):
    x, weight = torch.randn(6, 16, device=device), torch.randn(40, 16, device=device).requires_grad_()
    targets = torch.randint(40, (6,), device=device)
    with torch.autocast(device, torch.bfloat16):
        logits = F.linear(x, weight)
        loss = ops.cross_entropy(logits, targets, consume=True)
    assert logits.dtype == torch.bfloat16 and loss.dtype == torch.float32
    assert torch.equal(loss, ops.cross_entropy(logits, targets))
    loss.backward()
    assert weight.grad.isfinite().all()


def test_every_reason_against_an_input_is_given(device, triton_ops):
    targets = torch.zeros(3, dtype=torch.int32, device=device)
    with pytest.raises(UnsupportedInput) as error:
        triton_ops.cross_entropy(torch.zeros(2, 4, dtype=torch.int64, device=device), targets, reduction="max")
    assert error.value.reasons == (
        "logits is torch.int64; it must be a floating-point tensor",
        "reduction is 'max'; it must be 'mean', 'sum' or 'none'",
        "targets are torch.int32; they must be int64",
        "targets has shape (3,); logits (2, 4) needs (2,)",
    )
    with pytest.raises(UnsupportedInput) as error:
        triton_ops.cross_entropy(torch.zeros(0, 4, dtype=torch.float64, device=device), targets[:0].long())
    assert error.value.reasons == (
        "logits is torch.float64; supported: float32, float16, bfloat16",
        "logits has shape (0, 4); it needs at least one element",
    )
    for wrong, reason in (
        (0.0, "expected_gradient is 0.0; it must be finite and not 0, or None"),
        (math.inf, "expected_gradient is inf; it must be finite and not 0, or None"),
        (
            torch.zeros(2, dtype=torch.float64, device=device),
            "expected_gradient is a tensor of 2 x torch.float64; it must be one float32, a number or None",
        ),
        (torch.zeros(1, device="meta"), f"expected_gradient is on meta and logits on {targets.device}"),
    ):
        with pytest.raises(UnsupportedInput) as error:
            triton_ops.cross_entropy(torch.zeros(3, 4, device=device), targets.long(), expected_gradient=wrong)
        assert error.value.reasons == (reason,)
    with pytest.raises(UnsupportedInput, match=r"logits has shape \(3, 0\); it must be \(rows, V\)"):
        triton_ops.cross_entropy(torch.zeros(3, 0, device=device), targets.long())


@pytest.mark.gpu
def test_rows_beyond_two_billion_elements_are_reached(device, triton_ops):
    logits = torch.zeros(45_000, 50_257, dtype=torch.bfloat16, device=device)
    targets = torch.full((45_000,), 7, device=device)
    for expected in (None, 1.0, 2.0):
        with torch.no_grad():
            logits.zero_()[-1, 7] = 20.0
        losses = triton_ops.cross_entropy(
            logits.requires_grad_(), targets, reduction="none", consume=True, expected_gradient=expected
        )
        assert losses[-1] < 1e-3 < losses[-2]
        (gradient,) = torch.autograd.grad(losses.sum(), logits)
        assert gradient[-1].abs().max() < 1e-3 and gradient[-2, 7] < -0.99


@pytest.mark.gpu
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_the_host_never_waits(reduction, way, device, ops):
    logits, targets = logits_and_targets(300, 1000, torch.bfloat16, device)
    gradient_of(ops, logits, targets, reduction=reduction, **WAYS[way])  # compiles the kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        gradient_of(ops, logits, targets, reduction=reduction, **WAYS[way])
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_torch_backend_s_result_depends_on_neither_chunks_nor_threads(monkeypatch):
    logits, targets = logits_and_targets(23, 40_001, torch.bfloat16)
    threads = torch.get_num_threads()
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        try:
            for chunk, count in ((2**19, 2), (1, 1), (1, 3), (100_000, 2)):
                monkeypatch.setattr(torch_file, "CHUNK", chunk)
                torch.set_num_threads(count)
                results.append([])
                for options in (WAYS["over the logits"], WAYS["in one pass, rescaled"]):
                    call = lambda z: load_ops("torch").cross_entropy(z * 1.0, targets, reduction="none", **options)  # noqa: B023, E731
                    results[-1] += output_and_gradients(call, [logits.to(dtype)])
        finally:
            torch.set_num_threads(threads)
        assert all(torch.equal(a, b) for result in results for a, b in zip(result, results[0], strict=True))
        results.clear()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_the_torch_backend_takes_float64_and_no_rows(reduction):
    ops = load_ops("torch")
    logits, targets = logits_and_targets(5, 7, torch.float64)
    assert torch.autograd.gradcheck(
        lambda z: ops.cross_entropy(z, targets, reduction=reduction), logits.requires_grad_()
    )
    call = lambda z: ops.cross_entropy(z * 1.0, targets, reduction=reduction, **WAYS["in one pass, rescaled"])  # noqa: E731
    reference = lambda z: load_ops("reference").cross_entropy(z, targets, reduction=reduction)  # noqa: E731
    for ours, exact in zip(*(output_and_gradients(f, [logits]) for f in (call, reference)), strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-12)
    nothing = torch.zeros(0, 7, requires_grad=True)
    for options in WAYS.values():
        nothing.grad = None
        loss = ops.cross_entropy(nothing, targets[:0], reduction=reduction, **options)
        loss.sum().backward()
        assert nothing.grad.shape == (0, 7)
    assert {"none": loss.shape == (0,), "sum": bool(loss.sum() == 0), "mean": bool(loss.isnan().all())}[reduction]


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("expected_gradient", [None, 1.0])
def test_consumed_logits_have_no_second_derivative_and_say_so(expected_gradient, backend, device):
    logits = torch.randn(3, 11, device=device, requires_grad=True)
    targets = torch.tensor([0, 5, 10], device=device)
    loss = load_ops(backend).cross_entropy(logits * 1.0, targets, consume=True, expected_gradient=expected_gradient)
    with pytest.raises(RuntimeError, match="gives no second derivatives"):
        torch.autograd.grad(loss, logits, create_graph=True)
