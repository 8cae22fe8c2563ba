import pytest
import torch
from fastgpt_kernels import UnsupportedInput, linear_gelu, load_ops
from fastgpt_kernels.linear_gelu import CUBLAS, Entry, Tile, Ways
from fastgpt_kernels.testing import assert_as_close_as_torch, output_and_gradients
from fastgpt_kernels.tiles import ARCHITECTURES, listed
from hypothesis import given, settings
from hypothesis import strategies as st

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# rows..., K, N
SHAPES = [((1,), 1, 1), ((3,), 5, 7), ((2, 3), 33, 768), ((17,), 65, 1023), ((70,), 70, 40)]
WIDE = [((9,), 1600, 33), ((2,), 7, 12288), ((300,), 129, 70)]
SMALL = Tile(32, 32, 16, 4, 2)
FUSED = Ways(SMALL, SMALL)
WAYS = {"cublas": CUBLAS, "fused": FUSED, "forward fused": Ways(SMALL, None), "backward fused": Ways(None, SMALL)}
# the interpreter cannot multiply bfloat16 in PyTorch's order: on a GPU only
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]


@pytest.fixture(params=WAYS)
def ways(request, monkeypatch):
    force(WAYS[request.param], monkeypatch)
    return WAYS[request.param]


def force(ways, monkeypatch):
    monkeypatch.setattr(linear_gelu, "chosen", lambda device, dtype, K, N: ways)


def inputs_of(rows, K, N, dtype, device):
    shapes = ((*rows, K), (N, K), (N,))
    x, weight, bias = (torch.randn(shape).to(device, dtype) for shape in shapes)
    return x, weight * (2.0 / K**0.5), bias


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [
        *SHAPES,
        *(pytest.param(shape, marks=pytest.mark.slow) for shape in WIDE),
        pytest.param(((4096,), 768, 3072), marks=pytest.mark.gpu),
    ],
)
def test_it_is_as_close_to_the_mathematics_as_torch(shape, dtype, ways, device, triton_ops):
    assert_as_close_as_torch(
        lambda ops, *inputs: ops.linear_gelu(*inputs), *inputs_of(*shape, dtype, device), ops=triton_ops
    )


@pytest.mark.parametrize("shape", [((3,), 17, 1600), ((2,), 7, 12288)])
def test_it_is_so_for_wide_models(shape, device, triton_ops, monkeypatch):
    force(FUSED, monkeypatch)
    inputs = inputs_of(*shape, torch.float16, device)
    assert_as_close_as_torch(lambda ops, *inputs: ops.linear_gelu(*inputs), *inputs, ops=triton_ops)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [((3,), 5, 7), ((70,), 70, 40)])
def test_the_exact_form_is_as_close(shape, dtype, ways, device, triton_ops):
    assert_as_close_as_torch(
        lambda ops, *inputs: ops.linear_gelu(*inputs, "none"), *inputs_of(*shape, dtype, device), ops=triton_ops
    )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_every_tile_that_may_be_chosen_is_right(direction, dtype, device, triton_ops, monkeypatch):
    inputs = inputs_of((1_000,), 776, 1_030, dtype, device)
    arch = listed(linear_gelu.launch.architecture(inputs[0].device))
    for tile in linear_gelu.CANDIDATES[direction, arch]:
        force(CUBLAS._replace(**{direction: tile}), monkeypatch)
        assert_as_close_as_torch(lambda ops, *inputs: ops.linear_gelu(*inputs), *inputs, ops=triton_ops)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_the_tiles_of_every_architecture_are_right_for_odd_sizes(direction, device, triton_ops, monkeypatch):
    if device == "cuda":
        pytest.skip("another architecture's tiles may not fit")
    inputs = inputs_of((130,), 70, 257, torch.float16, device)
    # the interpreter knows neither warps nor stages
    candidates = (tile for arch in ARCHITECTURES for tile in linear_gelu.CANDIDATES[direction, arch])
    for tile in {tile._replace(warps=4, stages=1) for tile in candidates}:
        force(CUBLAS._replace(**{direction: tile}), monkeypatch)
        assert_as_close_as_torch(lambda ops, *inputs: ops.linear_gelu(*inputs), *inputs, ops=triton_ops)


def test_what_was_never_timed_goes_to_cublas(device):
    where = torch.device(device)
    assert linear_gelu.chosen(where, torch.float16, 9, 13) == CUBLAS
    assert linear_gelu.chosen(where, torch.float32, 768, 3072) == CUBLAS


def test_a_measured_way_is_taken(monkeypatch):
    table = {("sm_80", 9, 13): CUBLAS, ("sm_90", 9, 13): FUSED}
    monkeypatch.setattr(linear_gelu, "measured", lambda: table)
    monkeypatch.setattr(linear_gelu.launch, "architecture", lambda device: "sm_90")
    gpu = torch.device("cuda")
    assert linear_gelu.chosen(gpu, torch.float16, 9, 13) == FUSED
    assert linear_gelu.chosen(gpu, torch.float32, 9, 13) == CUBLAS == linear_gelu.chosen(gpu, torch.float16, 13, 9)


def test_the_table_is_read_as_it_is_written():
    table = (Entry("sm_90", 768, 3072, SMALL, None, "a GPU, a day"), Entry("sm_80", 1600, 6400, None, SMALL, "another"))
    assert linear_gelu.parse(linear_gelu.write(table)) == table
    kept = linear_gelu.parse(linear_gelu.PATH.read_text())
    assert linear_gelu.write(kept) == linear_gelu.PATH.read_text() and len(linear_gelu.measured()) == len(kept)
    for entry in kept:
        assert entry.arch in ARCHITECTURES
        assert entry.forward in (None, *linear_gelu.CANDIDATES["forward", entry.arch])
        assert entry.backward in (None, *linear_gelu.CANDIDATES["backward", entry.arch])


@pytest.mark.sweep
@pytest.mark.usefixtures("device")
@settings(max_examples=10 if DEVICE == "cpu" else 4, deadline=None)
@given(
    rows=st.integers(1, 70),
    K=st.integers(1, 40),
    N=st.integers(1, 70),
    tile=st.sampled_from([SMALL, Tile(16, 64, 16, 4, 1)]),
)
def test_fused_or_not_makes_no_difference(rows, K, N, tile):
    inputs = inputs_of((rows,), K, N, torch.float32, DEVICE)
    dy = torch.randn(rows, N, device=DEVICE)
    results = []
    for way in (tile, None):
        y, u = linear_gelu.launch_forward(*inputs, "tanh", way)
        results.append([y, u, *linear_gelu.launch_backward(inputs[1], u, dy, "tanh", way)])
    # of a few small numbers the largest rounding error says too little for the rule of `fastgpt_kernels.testing`
    for fused, plain in zip(*results, strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-4)


def test_the_bias_gradient_is_summed_before_rounding(ways, device):
    # each gradient of u rounds 1 + 2^-11 to 1; their sum does not
    u = torch.full((32, 1), 30.0, dtype=torch.float16, device=device)
    dy = torch.full_like(u, 1.0)
    dy[0] = 2.0**-11
    weight = torch.ones(1, 1, dtype=torch.float16, device=device)
    _, _, dbias = linear_gelu.launch_backward(weight, u, dy, "none", ways.backward)
    assert dbias.item() == torch.tensor(31.0 + 2.0**-11).half().item()
    dx, du, _ = linear_gelu.launch_backward(weight, u, dy, "none", ways.backward)
    assert torch.equal(dx, dy) and torch.equal(du, dy)


def test_views_are_taken(ways, device, triton_ops):
    x, weight, bias = (torch.randn(s, device=device) for s in ((6, 33, 5), (33, 40), (80,)))
    assert_as_close_as_torch(
        lambda ops, x, weight, bias: ops.linear_gelu(x, weight, bias),
        x.transpose(1, 2), weight.t(), bias[::2], ops=triton_ops,
    )  # fmt: skip


def test_a_repeat_gives_the_same_bits(ways, device, triton_ops):
    inputs = inputs_of((70,), 70, 90, torch.float16, device)
    first, second = (output_and_gradients(triton_ops.linear_gelu, inputs) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_without_gradients_nothing_is_kept(ways, device, triton_ops):
    x, weight, bias = inputs_of((20,), 33, 40, torch.float32, device)
    y, u = linear_gelu._linear_gelu(x, weight, bias, "tanh", False)
    assert u.numel() == 0
    weight.requires_grad_()
    with torch.no_grad():
        assert torch.equal(triton_ops.linear_gelu(x, weight, bias), y)
    assert torch.equal(triton_ops.linear_gelu(x, weight, bias), y)


def test_only_the_gradients_that_are_asked_for_are_given(ways, device, triton_ops):
    x, weight, bias = inputs_of((20,), 33, 40, torch.float32, device)
    triton_ops.linear_gelu(x, weight, bias.requires_grad_()).sum().backward()
    assert x.grad is None and weight.grad is None and bias.grad is not None


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_it_compiles_whole(backend, device, monkeypatch):
    force(FUSED, monkeypatch)
    ops = load_ops(backend)
    inputs = inputs_of((2, 9), 33, 40, torch.float16, device)

    def call(x, weight, bias):
        return ops.linear_gelu(torch.nn.functional.relu(x), weight, bias) * 2.0

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for ours, eager in zip(output_and_gradients(compiled, inputs), output_and_gradients(call, inputs), strict=True):
        assert torch.equal(ours, eager)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_autocast_chooses_the_dtype(backend, device):
    ops = load_ops(backend)
    inputs = [x.requires_grad_() for x in inputs_of((20,), 33, 40, torch.float32, device)]
    with torch.autocast(device, torch.float16):
        y = ops.linear_gelu(inputs[0].half(), *inputs[1:])
        y.float().sum().backward()
    assert y.dtype == torch.float16 and all(x.grad.dtype == torch.float32 for x in inputs)
    with torch.autocast(device, torch.float16), torch.autocast(device, enabled=False):
        assert ops.linear_gelu(*inputs).dtype == torch.float32
    expected = ops.linear_gelu(*(x.half() for x in inputs))
    assert torch.equal(y, expected)


def test_checkpointing_changes_no_bit(ways, device, triton_ops):
    inputs = inputs_of((20,), 33, 40, torch.float16, device)

    def recomputed(*inputs):
        return torch.utils.checkpoint.checkpoint(triton_ops.linear_gelu, *inputs, use_reentrant=False)

    plain, again = (output_and_gradients(call, inputs) for call in (triton_ops.linear_gelu, recomputed))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_every_reason_against_an_input_is_given(device, triton_ops):
    x, weight, bias = inputs_of((2,), 3, 4, torch.float64, device)
    with pytest.raises(UnsupportedInput) as error:
        triton_ops.linear_gelu(x[:0], weight, bias)
    assert str(error.value) == (
        "linear_gelu (triton) cannot take this input:\n"
        "  - x is torch.float64; supported: float32, float16, bfloat16\n"
        "  - x has shape (0, 3); it needs at least one element\n"
        "  - weight is torch.float64; supported: float32, float16, bfloat16\n"
        "  - bias is torch.float64; supported: float32, float16, bfloat16\n"
        "Set kernels.backend to 'torch' to run it without Triton."
    )


@pytest.mark.parametrize("backend", ["triton", "torch", "reference"])
def test_every_mistake_in_a_call_is_named(backend, device):
    x, weight, bias = inputs_of((2,), 3, 4, torch.float32, device)
    with pytest.raises(UnsupportedInput) as error:
        load_ops(backend).linear_gelu(x, weight.t().half(), bias.to("meta"), "erf")
    assert str(error.value) == (
        f"linear_gelu ({backend}) cannot take this input:\n"
        "  - approximate is 'erf'; it must be 'tanh' or 'none'\n"
        "  - weight is torch.float16 and x torch.float32; they must be of one dtype\n"
        f"  - bias is on meta and x on {x.device}\n"
        "  - weight has shape (3, 4); x (..., 3) needs (N, 3)\n"
        "No backend takes these arguments: correct the call."
    )
    with pytest.raises(UnsupportedInput, match=r"bias has shape \(3,\); weight \(4, 3\) needs \(4,\)"):
        load_ops(backend).linear_gelu(x, weight, bias[:3])
