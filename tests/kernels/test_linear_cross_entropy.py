import importlib
import weakref

import pytest
import torch
from fastgpt_kernels import UnsupportedInput, cross_entropy, linear_cross_entropy, load_ops
from fastgpt_kernels.testing import (
    assert_as_close_as_torch,
    assert_close,
    output_and_gradients,
    pytorch_and_oracle,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# of this name the package holds the function
torch_file = importlib.import_module("fastgpt_kernels.torch_ops.linear_cross_entropy")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
REDUCTIONS = ["mean", "sum", "none"]
BUDGET = 1.5e9  # bytes above inputs and outputs, at 65,536 x 50,257


@pytest.fixture(params=["triton", "torch"])
def ops(request, device):
    return load_ops(request.param)


@pytest.fixture
def chunks_of(monkeypatch):
    """Sets the rows of a chunk."""
    return lambda rows: monkeypatch.setattr(torch_file, "chunk_rows", lambda V, itemsize: rows)


def inputs_of(rows, N, V, dtype=torch.float32, device="cpu", ignored=0.3):
    x, weight = torch.randn(rows, N).to(device, dtype), (2.0 * torch.randn(V, N) / N**0.5).to(device, dtype)
    hidden = torch.rand(rows) < ignored
    hidden[0] = False
    return x, weight, torch.randint(V, (rows,)).masked_fill(hidden, -100).to(device)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "chunk"),
    [
        *((shape, chunk) for shape in ((1, 1, 1), (11, 5, 3), (9, 33, 300)) for chunk in (4, 5_120)),
        pytest.param((700, 768, 50257), 256, marks=pytest.mark.gpu),
    ],
)
def test_it_is_as_close_to_the_mathematics_as_torch(chunk, shape, dtype, reduction, device, ops, chunks_of):
    chunks_of(chunk)
    assert_as_close_as_torch(
        lambda ops, x, weight, targets: ops.linear_cross_entropy(x, weight, targets, reduction=reduction),
        *inputs_of(*shape, dtype, device),
        ops=ops,
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_so_for_the_vocabulary_of_gpt_2(dtype, device, ops, chunks_of):
    chunks_of(2)
    inputs = inputs_of(3, 24, 50257, dtype, device)
    assert_as_close_as_torch(lambda ops, *inputs: ops.linear_cross_entropy(*inputs), *inputs, ops=ops)


@pytest.mark.usefixtures("device")
@settings(max_examples=20 if DEVICE == "cpu" else 4, deadline=None)
@given(
    rows=st.integers(1, 9),
    N=st.integers(1, 20),
    V=st.integers(1, 70),
    chunk=st.integers(1, 10),
    backend=st.sampled_from(["triton", "torch"]),
)
def test_it_is_the_cross_entropy_of_the_logits_wherever_the_chunks_end(rows, N, V, chunk, backend):
    ops = load_ops(backend)
    inputs = inputs_of(rows, N, V, device=DEVICE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_file, "chunk_rows", lambda V, itemsize: chunk)
        ours = output_and_gradients(ops.linear_cross_entropy, inputs)
    plain = output_and_gradients(lambda x, weight, targets: ops.cross_entropy(x @ weight.t(), targets), inputs)
    # of a few small numbers the largest rounding error says too little for the rule of `fastgpt_kernels.testing`
    for one, other in zip(ours, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_weight_s_gradient_is_summed_over_chunks_in_float32(dtype, device, ops, chunks_of):
    # with a weight of 0, dz is 1/2 and -1/2 in every row. The first chunk's part, 1 + eps / 2, is not in the dtype
    eps = torch.finfo(dtype).eps if dtype != torch.float32 else 2.0**-20
    x = torch.tensor([[1.0], [eps / 2], [-1.0]], device=device, dtype=dtype)
    weight = torch.zeros(2, 1, device=device, dtype=dtype, requires_grad=True)
    chunks_of(2)
    targets = torch.zeros(3, dtype=torch.int64, device=device)
    ops.linear_cross_entropy(x, weight, targets, reduction="sum").backward()
    assert weight.grad.flatten().tolist() == [-eps / 4, eps / 4]


def test_the_widened_numbers_are_taken_a_piece_of_columns_at_a_time(monkeypatch):
    dz, x = torch.randn(9, 50).bfloat16(), torch.randn(9, 7).bfloat16()
    for piece in (1, 7, 50):
        monkeypatch.setattr(torch_file, "WIDENED_BYTES", piece * 9 * 4)
        total = torch.ones(50, 7)
        torch_file.add_product(total, dz, x)
        torch.testing.assert_close(total, 1.0 + dz.float().t() @ x.float())


@pytest.mark.parametrize("rows", [64, pytest.param(8192, marks=pytest.mark.gpu)])
def test_a_loss_scale_acts_before_float16_rounds(rows, device, ops, chunks_of):
    chunks_of(rows // 2)
    # dx is a single element of dz. As one of 8,192 rows and 3,000 columns it would be 0 in float16, but for the scale
    x = torch.zeros(rows, 16, dtype=torch.float16, device=device, requires_grad=True)
    weight = torch.zeros(3_000, 16, dtype=torch.float16, device=device)
    weight[7] = 1.0
    scale = 2.0**15 * rows / 8192
    targets = torch.zeros(rows, dtype=torch.int64, device=device)
    (scale * ops.linear_cross_entropy(x, weight, targets)).backward()
    exact = 2.0**15 / 8192 / 3_000
    assert ((x.grad.double() - exact).abs() <= torch.finfo(torch.float16).eps * exact).all()
    assert torch.tensor(exact / 2.0**15).half() < 1e-7


class LiveBytes(TorchDispatchMode):
    """Adds up the memory of the tensors that live, without those that lived before; `peak` is the most there was."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        before = {id(x.untyped_storage()) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        result = function(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if not isinstance(x, torch.Tensor):
                continue
            storage = x.untyped_storage()
            if storage not in self.known and id(storage) not in before:
                self.known.add(storage)
                self.now += storage.nbytes()
                weakref.finalize(storage, self.free, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def free(self, size):
        self.now -= size


@pytest.mark.parametrize(
    ("N", "dtype", "native"),
    [
        (768, torch.bfloat16, True),
        (1600, torch.bfloat16, True),
        (1600, torch.bfloat16, False),
        (1600, torch.float32, True),
    ],
)
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_its_plan_for_65536_rows_of_50257_fits_the_budget(backend, dtype, N, native, monkeypatch):
    # tensors of the device "meta" have shapes and no memory
    monkeypatch.setattr(torch_file, "adds_16_bit_products", lambda device: native)
    monkeypatch.setattr(cross_entropy, "launch_backward", lambda *arguments: None)
    monkeypatch.setattr(
        cross_entropy, "launch_forward", lambda z, *rest: (z.new_empty(len(z)), z.new_empty((len(z), 2)))
    )
    rows, V = 65_536, 50_257
    x, weight = (torch.empty(size, N, dtype=dtype, device="meta") for size in (rows, V))
    targets = torch.empty(rows, dtype=torch.int64, device="meta")
    file = {"triton": linear_cross_entropy, "torch": torch_file}[backend]
    torch.use_deterministic_algorithms(False)  # which would fill the memory
    with LiveBytes() as forward:
        kept = file.losses_by_chunks(x, weight, targets, -100)
    logits = torch_file.chunk_rows(V, dtype.itemsize) * V * dtype.itemsize
    assert logits <= forward.peak < BUDGET
    losses, *statistics = kept if backend == "triton" else (kept,)
    with LiveBytes() as backward:
        outputs = file.gradients_by_chunks(x, weight, targets, *statistics, losses, -100, True, True)
    above_outputs = backward.peak - sum(out.untyped_storage().nbytes() for out in outputs)
    assert logits <= above_outputs < BUDGET


@pytest.mark.gpu
@pytest.mark.parametrize("N", [768, 1600])
def test_it_takes_no_more_memory_than_its_budget(N, device, ops):
    rows, V = 65_536, 50_257
    x, weight = (torch.randn(size, N, device=device, dtype=torch.bfloat16) for size in (rows, V))
    targets = torch.randint(V, (rows,), device=device)
    torch.use_deterministic_algorithms(False)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    ops.linear_cross_entropy(x.requires_grad_(), weight.requires_grad_(), targets).backward()
    outputs = sum(grad.numel() * grad.element_size() for grad in (x.grad, weight.grad))
    assert torch.cuda.max_memory_allocated() - before - outputs < BUDGET


@pytest.mark.parametrize(
    ("V", "itemsize", "rows"), [(50_257, 2, 5_120), (50_257, 4, 2_560), (2**21, 4, 64), (2**30, 4, 1), (1, 2, 2**28)]
)
def test_the_rows_of_a_chunk_follow_from_its_bytes(V, itemsize, rows):
    assert torch_file.chunk_rows(V, itemsize) == rows


def test_views_are_taken(device, ops, chunks_of):
    chunks_of(4)
    x, weight = torch.randn(33, 6, device=device).t(), torch.randn(33, 80, device=device)[:, ::2].t()
    targets = torch.randint(40, (12,), device=device)[::2]
    assert_as_close_as_torch(lambda ops, *inputs: ops.linear_cross_entropy(*inputs), x, weight, targets, ops=ops)


def test_a_target_that_is_ignored_does_not_count(device, ops, chunks_of):
    chunks_of(3)
    x, weight, targets = inputs_of(8, 5, 20, device=device, ignored=0.0)
    counts = torch.arange(8, device=device) % 4 != 2
    counts[3:6] = False  # all of the second chunk
    targets = torch.where(counts, targets % 7, 7)
    call = lambda x, weight, targets: ops.linear_cross_entropy(x, weight, targets, ignore_index=7)  # noqa: E731
    loss, dx, dweight = output_and_gradients(call, [x, weight, targets])
    fewer = pytorch_and_oracle(lambda ops, *xs: ops.linear_cross_entropy(*xs), [x[counts], weight, targets[counts]])
    theirs, exact = ([x.double().cpu() for x in results] for results in fewer)
    assert_close([loss, dx[counts.cpu()], dweight], theirs, exact, [torch.float32] * 3)
    assert not dx[~counts.cpu()].any()


def test_a_target_that_is_no_column_makes_its_loss_nan_or_is_refused(device, triton_ops):
    x, weight, targets = inputs_of(5, 6, 20, device=device, ignored=0.0)
    targets[2] = 20
    losses = triton_ops.linear_cross_entropy(x, weight, targets, reduction="none")
    assert losses.isnan().tolist() == [False, False, True, False, False]
    if device == "cpu":
        with pytest.raises(UnsupportedInput, match="targets has 20; with V = 20 columns"):
            load_ops("torch").linear_cross_entropy(x, weight, targets)


def test_a_repeat_gives_the_same_bits(device, ops, chunks_of):
    chunks_of(8)
    x, weight, targets = inputs_of(30, 33, 70, torch.float16, device)
    first, second = (output_and_gradients(ops.linear_cross_entropy, [x, weight, targets]) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_only_the_gradients_that_are_asked_for_are_given(device, ops, chunks_of):
    chunks_of(3)
    x, weight, targets = inputs_of(8, 5, 20, device=device)
    both = torch.autograd.grad(
        ops.linear_cross_entropy(x.requires_grad_(), weight.requires_grad_(), targets), [x, weight]
    )
    for place, expected in enumerate(both):
        leaves = [x.detach(), weight.detach()]
        (gradient,) = torch.autograd.grad(
            ops.linear_cross_entropy(*leaves[:place], leaves[place].requires_grad_(), *leaves[place + 1 :], targets),
            leaves[place],
        )
        assert torch.equal(gradient, expected)


@pytest.mark.usefixtures("triton_ops")
@pytest.mark.parametrize("chunk", [3, 100])
def test_torch_library_finds_the_ops_well_formed(chunk, device, chunks_of):
    chunks_of(chunk)
    x, weight, targets = inputs_of(7, 5, 20, device=device)
    losses, statistics = linear_cross_entropy._linear_cross_entropy(x, weight, targets, -100)
    for needs in ((True, True), (chunk == 3, chunk != 3)):
        torch.library.opcheck(linear_cross_entropy._gradients, (x, weight, targets, statistics, losses, -100, *needs))
        torch.library.opcheck(torch_file._gradients, (x, weight, targets, losses, -100, *needs))
    leaves = (x.requires_grad_(), weight.requires_grad_(), targets, -100)
    torch.library.opcheck(linear_cross_entropy._linear_cross_entropy, leaves)
    torch.library.opcheck(torch_file._losses, leaves)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_it_compiles_whole(reduction, device, ops, chunks_of):
    torch.compiler.reset()  # the function of another parameter has the same code, and so many may it have
    chunks_of(3)
    x, weight, targets = inputs_of(7, 5, 20, device=device)

    def call(x, weight):
        return ops.linear_cross_entropy(torch.nn.functional.relu(x), weight, targets, reduction=reduction) * 2.0

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for ours, eager in zip(
        output_and_gradients(compiled, [x, weight]), output_and_gradients(call, [x, weight]), strict=True
    ):
        assert torch.equal(ours, eager)


def test_autocast_chooses_the_dtype(device, ops, chunks_of):
    chunks_of(3)
    x, weight, targets = inputs_of(7, 5, 20, device=device)
    leaves = [x.half().requires_grad_(), weight.requires_grad_()]
    with torch.autocast(device, torch.float16):
        loss = ops.linear_cross_entropy(*leaves, targets)
        loss.backward()
    assert loss.dtype == torch.float32 and leaves[1].grad.dtype == torch.float32
    assert torch.equal(loss, ops.linear_cross_entropy(x.half(), weight.half(), targets))
    with torch.autocast(device, torch.float16), torch.autocast(device, enabled=False):
        assert torch.equal(ops.linear_cross_entropy(x, weight, targets), ops.linear_cross_entropy(x, weight, targets))


def test_checkpointing_changes_no_bit(device, ops, chunks_of):
    chunks_of(3)
    inputs = inputs_of(7, 5, 20, device=device)

    def recomputed(*inputs):
        return torch.utils.checkpoint.checkpoint(ops.linear_cross_entropy, *inputs, use_reentrant=False)

    plain, again = (output_and_gradients(call, inputs) for call in (ops.linear_cross_entropy, recomputed))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_every_reason_against_an_input_is_given(device, triton_ops):
    x, weight, targets = inputs_of(2, 3, 4, torch.float64, device)
    with pytest.raises(UnsupportedInput) as error:
        triton_ops.linear_cross_entropy(x, weight, targets)
    assert error.value.reasons == tuple(
        f"{name} is torch.float64; supported: float32, float16, bfloat16" for name in ("x", "weight")
    )
    with pytest.raises(UnsupportedInput) as error:
        triton_ops.linear_cross_entropy(x, weight.t().float(), targets[:1].int(), reduction="max")
    assert error.value.reasons == (
        "reduction is 'max'; it must be 'mean', 'sum' or 'none'",
        "weight is torch.float32 and x torch.float64; they must be of one dtype",
        "weight has shape (3, 4); x (2, 3) needs (V, 3)",
        "targets are torch.int32; they must be int64",
        "targets has shape (1,); x (2, 3) needs (2,)",
        "x is torch.float64; supported: float32, float16, bfloat16",
    )
    with pytest.raises(UnsupportedInput, match=r"x has shape \(0, 3\); it needs at least one element"):
        triton_ops.linear_cross_entropy(x[:0].float(), weight.float(), targets[:0])


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("chunk", [2, 100])
def test_the_torch_backend_takes_float64_and_no_rows(chunk, reduction, chunks_of):
    chunks_of(chunk)
    ops = load_ops("torch")
    x, weight, targets = inputs_of(5, 3, 4, torch.float64)
    leaves = (x.requires_grad_(), weight.requires_grad_())
    assert torch.autograd.gradcheck(
        lambda x, weight: ops.linear_cross_entropy(x, weight, targets, reduction=reduction), leaves
    )
    nothing = torch.zeros(0, 3, dtype=torch.float64, requires_grad=True)
    ops.linear_cross_entropy(nothing, leaves[1], targets[:0], reduction="sum").backward()
    assert nothing.grad.shape == (0, 3) and not weight.grad.any()
