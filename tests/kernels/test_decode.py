import pytest
import torch
from fastgpt_kernels import UnsupportedInput, decode, load_ops
from fastgpt_kernels.builtin import BUILTIN
from fastgpt_kernels.testing import assert_close
from fastgpt_kernels.torch_ops.decode import _decode as on_cpu
from hypothesis import given, settings
from hypothesis import strategies as st

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["triton", "torch"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
HEAD_SIZES = [16, 40, 64, 80, 96, 128, 256]


@pytest.fixture(params=[16, None], ids=["many stretches", "stretches as they are"])
def stretches(request, monkeypatch):
    """Short ones, so that a few keys take more of them than one turn joins."""
    if request.param:
        monkeypatch.setattr(decode, "keys_of_program", lambda head_size: request.param)
        monkeypatch.setattr(decode, "STRETCHES", 4)


def inputs_of(B, H, D, T_max, dtype, device):
    return [torch.randn(shape).to(device, dtype) for shape in ((B, H, D), (B, H, T_max, D), (B, H, T_max, D))]


def assert_as_close_as_torch(ops, q, k, v, lengths, **options):
    """By the rule of `fastgpt_kernels.testing`, without gradients; PyTorch is asked where there is a key."""
    exact = [x.double() for x in (q, k, v)]
    oracle = load_ops("reference").decode_attention(*exact, lengths, **options)
    ours = ops.decode_attention(q, k, v, lengths, **options)
    # sums are the built-in's, too: it turns no keys into NaN and takes NaN from unused places
    used = (torch.arange(k.shape[2], device=k.device) < lengths[:, None])[:, None, :, None]
    theirs = BUILTIN.decode_attention(q, k.where(used, 0.0), v.where(used, 0.0), lengths, **options)
    theirs = theirs.where(lengths[:, None, None] > 0, 0.0)
    assert ours.shape == q.shape and ours.dtype == q.dtype and ours.is_contiguous()
    assert_close([ours], [theirs], [oracle], [q.dtype])
    assert (ours[lengths == 0] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", HEAD_SIZES)
def test_it_is_as_close_to_the_mathematics_as_torch(D, dtype, backend, device):
    T_max = 150
    lengths = torch.tensor([0, 1, 83, T_max], device=device)
    assert_as_close_as_torch(load_ops(backend), *inputs_of(4, 1, D, T_max, dtype, device), lengths)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("length", [0, 1, 15, 16, 17, 255, 256, 257, 300])
def test_all_lengths_are_right(length, backend, stretches, device):
    lengths = torch.tensor([length], device=device)
    assert_as_close_as_torch(load_ops(backend), *inputs_of(1, 2, 40, 300, torch.float32, device), lengths)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", HEAD_SIZES)
def test_long_caches_are_as_close(D, dtype, device, triton_ops):
    lengths = torch.tensor([0, 1, 5000, 8192, 77], device=device)
    assert_as_close_as_torch(triton_ops, *inputs_of(5, 12, D, 8192, dtype, device), lengths)


@pytest.mark.usefixtures("device")
@settings(max_examples=15 if DEVICE == "cpu" else 4, deadline=None)
@given(
    lengths=st.lists(st.integers(-1, 45), min_size=1, max_size=4),
    D=st.sampled_from([16, 24, 48]),
    keys=st.sampled_from([16, 32]),
    backend=st.sampled_from(BACKENDS),
)
def test_unused_places_do_not_matter(lengths, D, keys, backend):
    B, T_max = len(lengths), 40
    lengths = torch.tensor(lengths, device=DEVICE)
    q, k, v = inputs_of(B, 1, D, T_max, torch.float32, DEVICE)
    unused = (torch.arange(T_max, device=DEVICE) >= lengths[:, None])[:, None, :, None]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode, "keys_of_program", lambda head_size: keys)
        attend = load_ops(backend).decode_attention
        out = attend(q, k, v, lengths)
        for anything in (float("nan"), float("inf"), 1e30):
            rubbish = (cache.masked_fill(unused, anything) for cache in (k, v))
            assert torch.equal(out, attend(q, *rubbish, lengths))
    exact = load_ops("reference").decode_attention(q.double(), k.double(), v.double(), lengths)
    # of a few small numbers the largest rounding error says too little for the rule of `fastgpt_kernels.testing`
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_any_strides_are_taken(dtype, backend, stretches, device):
    B, H, T_max, D = 2, 3, 50, 24
    lengths = torch.tensor([33, 50], dtype=torch.int32, device=device)
    q = torch.randn(B, 1, 3, H, D).to(device, dtype)[:, 0, 0]
    after_time = torch.randn(2, B, T_max, H, D).to(device, dtype).transpose(2, 3)
    columns_first = torch.randn(2, B, H, D, T_max).to(device, dtype).mT
    part = torch.randn(2, B, H, T_max + 7, D + 3).to(device, dtype)[:, :, :, 5:-2, 2:-1]
    shared = torch.randn(2, 1, 1, T_max, D).to(device, dtype).expand(2, B, H, T_max, D)
    for caches in (after_time, columns_first, part, shared, torch.stack((part[0], shared[1]))):
        assert_as_close_as_torch(load_ops(backend), q, *caches, lengths)
    assert_as_close_as_torch(load_ops(backend), q.mT.contiguous().mT, *part, lengths[:1].expand(2))


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_is_the_last_row_of_causal_attention(backend, stretches, device):
    ops = load_ops(backend)
    qkv = torch.randn(2, 37, 3, 2, 32, device=device)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    for length in (1, 16, 37):
        lengths = torch.full((2,), length, device=device)
        exact = load_ops("reference").causal_attention(qkv[:, :length].double(), scale=0.3)[:, -1]
        theirs = BUILTIN.causal_attention(qkv[:, :length], scale=0.3)[:, -1]
        ours = ops.decode_attention(q[:, :, length - 1], k, v, lengths, scale=0.3)
        assert_close([ours], [theirs], [exact], [torch.float32])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_scale_is_a_choice(backend, device):
    inputs = inputs_of(2, 2, 16, 20, torch.float32, device)
    lengths = torch.tensor([20, 7], device=device)
    assert_as_close_as_torch(load_ops(backend), *inputs, lengths, scale=0.7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_scores_lose_no_digits(backend, stretches, device):
    q, k, v = inputs_of(2, 2, 16, 40, torch.float32, device)
    assert_as_close_as_torch(load_ops(backend), 30.0 * q, 30.0 * k, v, torch.tensor([40, 17], device=device))


def test_neither_the_batch_nor_the_capacity_changes_a_bit(stretches, device, triton_ops):
    attend = triton_ops.decode_attention
    q, k, v = inputs_of(3, 1, 40, 300, torch.float16, device)
    lengths = torch.tensor([140, 33, 300], device=device)
    together = attend(q, k, v, lengths)
    assert torch.equal(together, attend(q, k, v, lengths))
    for b, capacity in ((0, 140), (0, 257), (1, 40), (2, 300)):
        alone = attend(q[b : b + 1], k[b : b + 1, :, :capacity], v[b : b + 1, :, :capacity], lengths[b : b + 1])
        assert torch.equal(together[b : b + 1], alone)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8])
def test_lengths_are_integers_of_any_kind(dtype, backend, device):
    inputs = inputs_of(2, 1, 16, 20, torch.float32, device)
    assert_as_close_as_torch(load_ops(backend), *inputs, torch.tensor([20, 7], device=device, dtype=dtype))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_length_beyond_the_capacity_is_all_of_it(backend, stretches, device):
    inputs = inputs_of(2, 1, 16, 40, torch.float32, device)
    beyond, all_of_it = (torch.tensor(lengths, device=device) for lengths in ([41, 2**30], [40, 40]))
    attend = load_ops(backend).decode_attention
    assert torch.equal(attend(*inputs, beyond), attend(*inputs, all_of_it))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_result_requires_no_gradient(backend, device):
    inputs = [x.requires_grad_() for x in inputs_of(2, 1, 16, 20, torch.float32, device)]
    out = load_ops(backend).decode_attention(*inputs, torch.tensor([20, 7], device=device))
    assert not out.requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_changes_nothing(backend, device):
    inputs, lengths = inputs_of(2, 1, 16, 20, torch.float32, device), torch.tensor([20, 7], device=device)
    attend = load_ops(backend).decode_attention
    with torch.autocast(device, torch.bfloat16):
        out = attend(*inputs, lengths)
    assert torch.equal(out, attend(*inputs, lengths))


def test_torch_takes_float64_and_nothing():
    q, k, v = inputs_of(3, 2, 5, 9, torch.float64, "cpu")
    attend, reference = load_ops("torch").decode_attention, load_ops("reference").decode_attention
    for lengths in (torch.tensor([9, 9, 9]), torch.tensor([3, 0, 9]), torch.tensor([0, 0, 0])):
        torch.testing.assert_close(attend(q, k, v, lengths), reference(q, k, v, lengths), rtol=1e-14, atol=1e-14)
    assert torch.equal(attend(q, k[:, :, :0], v[:, :, :0], lengths), torch.zeros_like(q))
    assert attend(q[:0], k[:0], v[:0], lengths[:0]).shape == (0, 2, 5)


def test_torch_library_finds_the_ops_well_formed(device):
    inputs, lengths = inputs_of(2, 1, 16, 20, torch.float32, device), torch.tensor([20, 7], device=device)
    torch.library.opcheck(decode._decode, (*inputs, lengths, 0.25))
    if device == "cpu":
        torch.library.opcheck(on_cpu, (*inputs, lengths, 0.25))
        torch.library.opcheck(on_cpu, (*inputs, lengths, None))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_compiled_model_has_no_graph_break(backend, device):
    ops, lengths = load_ops(backend), torch.tensor([20, 7], device=device)
    inputs = inputs_of(2, 1, 16, 20, torch.float32, device)
    call = lambda *inputs: ops.decode_attention(*inputs, lengths) * 2.0  # noqa: E731
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*inputs), call(*inputs))


@pytest.mark.gpu
def test_a_cuda_graph_reads_the_lengths_of_its_replay(device, triton_ops):
    inputs, lengths = inputs_of(2, 3, 64, 500, torch.float16, device), torch.tensor([20, 7], device=device)
    triton_ops.decode_attention(*inputs, lengths)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = triton_ops.decode_attention(*inputs, lengths)
    lengths.copy_(torch.tensor([0, 333]))
    graph.replay()
    assert torch.equal(out, triton_ops.decode_attention(*inputs, lengths))


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize(
    ("change", "reasons"),
    [
        ({"q": torch.zeros(2, 16)}, ["q has shape (2, 16); it must be (B, H, D)"]),
        ({"scale": 0.0}, ["scale is 0.0; it must be positive and finite"]),
        (
            {"k_cache": torch.zeros(2, 1, 19, 16), "v_cache": torch.zeros(2, 1, 20, 16).half()},
            [
                "v_cache is torch.float16 and q torch.float32; they must be of one dtype",
                "k_cache has shape (2, 1, 19, 16) and v_cache (2, 1, 20, 16)",
            ],
        ),
        (
            {"v_cache": torch.zeros(2, 20, 16)},
            [
                "v_cache has shape (2, 20, 16); q (2, 1, 16) needs (2, 1, T_max, 16)",
                "k_cache has shape (2, 1, 20, 16) and v_cache (2, 20, 16)",
            ],
        ),
        (
            {"lengths": torch.zeros(3)},
            [
                "lengths is torch.float32; it must be a tensor of integers",
                "lengths has shape (3,); q (2, 1, 16) needs (2,)",
            ],
        ),
    ],
)
def test_mistakes_in_a_call_are_named(change, reasons, backend):
    arguments = {
        "q": torch.zeros(2, 1, 16),
        "k_cache": torch.zeros(2, 1, 20, 16),
        "v_cache": torch.zeros(2, 1, 20, 16),
        "lengths": torch.tensor([20, 7]),
    }
    with pytest.raises(UnsupportedInput) as error:
        load_ops(backend).decode_attention(**arguments | change)
    assert list(error.value.reasons) == reasons


@pytest.mark.parametrize("D", [15, 257])
def test_every_reason_against_the_triton_kernels_is_given(D, device, triton_ops):
    inputs, lengths = inputs_of(2, 1, D, 3, torch.float64, device), torch.tensor([3, 2], device=device)
    with pytest.raises(UnsupportedInput) as error:
        triton_ops.decode_attention(inputs[0], *(cache[:, :, :0] for cache in inputs[1:]), lengths)
    assert str(error.value) == (
        "decode_attention (triton) cannot take this input:\n"
        "  - q is torch.float64; supported: float32, float16, bfloat16\n"
        "  - k_cache is torch.float64; supported: float32, float16, bfloat16\n"
        f"  - k_cache has shape (2, 1, 0, {D}); it needs at least one element\n"
        "  - v_cache is torch.float64; supported: float32, float16, bfloat16\n"
        f"  - v_cache has shape (2, 1, 0, {D}); it needs at least one element\n"
        f"  - the head size is {D}; it must be between 16 and 256\n"
        "Set kernels.backend to 'torch' to run it without Triton."
    )
