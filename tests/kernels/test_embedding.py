import functools

import pytest
import torch
import torch.nn.functional as F
from fastgpt_kernels import UnsupportedInput, embedding, load_ops
from fastgpt_kernels.seeds import rate
from fastgpt_kernels.testing import assert_as_close_as_torch, assert_close, output_and_gradients
from fastgpt_kernels.torch_ops.embedding import _embedding as on_cpu
from fastgpt_kernels.torch_ops.embedding import _gradients as gradients_on_cpu
from fastgpt_kernels.torch_ops.embedding import token_gradient as token_gradient_on_cpu
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["triton", "torch"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SEED = 2**62 + 12345
CHUNK = embedding.CHUNK

# V, N
SHAPES = [(3, 1), (3, 768), (50257, 7), (11, 64), (5, 1023), (4, 1600)]
# B, T
TEXTS = {
    "all equal": torch.full((3, 29), 2),
    "all distinct": torch.randperm(87, generator=torch.Generator().manual_seed(0)).view(3, 29),
    "of which nine in ten are equal": torch.where(
        torch.rand(3, 29, generator=torch.Generator().manual_seed(0)) < 0.9, 1, torch.arange(87).view(3, 29)
    ),
    "whose runs end where a chunk does": torch.arange(80).div(8, rounding_mode="floor").view(2, 40),
    "whose runs cross a chunk": torch.arange(3, 83).div(8, rounding_mode="floor").view(2, 40),
    "whose runs cross several chunks": torch.arange(80).div(27, rounding_mode="floor").view(2, 40),
}


@pytest.fixture(autouse=True)
def few_tokens_fill_a_chunk(monkeypatch):
    monkeypatch.setattr(embedding, "CHUNK", 8)
    monkeypatch.setattr(embedding, "PARTIAL_ROWS", 4)


def embed(tokens, **options):
    return lambda ops, *tables: ops.embedding(tokens, *tables, **options)


def tables_of(V, N, rows, dtype, device):
    return [torch.randn(shape).to(device, dtype) for shape in ((V, N), (rows, N))]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("V", "N"), [*SHAPES, pytest.param(50257, 1600, marks=pytest.mark.gpu)])
def test_it_is_as_close_to_the_mathematics_as_torch(V, N, dtype, backend, device):
    tokens = torch.where(torch.rand(3, 7) < 0.5, V - 1, torch.randint(V, (3, 7))).to(device)
    assert_as_close_as_torch(embed(tokens), *tables_of(V, N, 9, dtype, device), ops=load_ops(backend))


def test_it_is_so_for_the_widest_model(device, triton_ops):
    tokens = torch.tensor([[2, 0, 2]], device=device)
    assert_as_close_as_torch(embed(tokens), *tables_of(3, 12288, 3, torch.float16, device), ops=triton_ops)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("chunk", [8, CHUNK])
@pytest.mark.parametrize("tokens", TEXTS.values(), ids=TEXTS)
def test_gradients_are_right_for_tokens(tokens, chunk, backend, device, monkeypatch):
    monkeypatch.setattr(embedding, "CHUNK", chunk)
    tokens = tokens.to(device)
    tables = tables_of(90, 5, tokens.shape[1] + 2, torch.float32, device)
    assert_as_close_as_torch(embed(tokens), *tables, ops=load_ops(backend))
    _, dtokens, dpositions = output_and_gradients(lambda *tables: embed(tokens)(load_ops(backend), *tables), tables)
    unused = torch.ones(90, dtype=torch.bool).index_fill(0, tokens.cpu().flatten(), False)
    assert (dtokens[unused] == 0).all() and (dpositions[tokens.shape[1] :] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("size", [(2, 16, 300, 48), pytest.param((16, 1024, 50257, 768), marks=pytest.mark.gpu)])
def test_a_text_in_which_one_token_is_half_is_as_close(size, dropout_p, dtype, backend, device, monkeypatch):
    monkeypatch.setattr(embedding, "CHUNK", CHUNK)
    B, T, V, N = size
    tokens = torch.where(torch.rand(B, T) < 0.5, 220, torch.randint(V, (B, T))).to(device)
    # the kernel's own mask: in 16 bits a sum of the two rows is often exactly 0 where it is kept
    dropped = dropout_p if backend == "triton" else rate(dropout_p)
    z = kept_by(backend, (B, T, N), dropout_p, device) / (1.0 - dropped)

    def with_mask(table, positions):
        return (F.embedding(tokens, table) + positions[:T]) * z.to(table.dtype)

    tables = tables_of(V, N, T, dtype, device)
    assert_close(
        ours=output_and_gradients(
            functools.partial(embed(tokens, dropout_p=dropout_p, seed=SEED), load_ops(backend)), tables
        ),
        theirs=output_and_gradients(with_mask, tables),
        oracle=output_and_gradients(with_mask, [table.double() for table in tables]),
        dtypes=[dtype] * 3,
    )


@pytest.mark.usefixtures("device")
@settings(max_examples=20 if DEVICE == "cpu" else 4, deadline=None)
@given(
    tokens=st.lists(st.integers(0, 9), min_size=1, max_size=60),
    heavy=st.integers(0, 30),
    columns=st.integers(1, 6),
    backend=st.sampled_from(BACKENDS),
)
def test_the_gradient_of_a_token_is_the_sum_over_its_places(tokens, heavy, columns, backend):
    tokens = torch.tensor([*tokens, *[4] * heavy], device=DEVICE)[None]
    # sums of small integers, exact in any order
    dy = torch.randint(-8, 9, (1, tokens.shape[1], columns)).float().to(DEVICE)
    if backend == "triton":
        dtable = embedding.launch_token_gradient(tokens, dy, 10)
    else:
        dtable = token_gradient_on_cpu(tokens.cpu(), dy.cpu(), 10, torch.float32).to(DEVICE)
    assert torch.equal(dtable, dy.new_zeros(10, columns).index_add(0, tokens[0], dy[0]))


@pytest.mark.parametrize(
    ("backend", "dtype", "times"),
    [("triton", torch.bfloat16, 511), ("torch", torch.bfloat16, 1023), ("torch", torch.float16, 1023)],
)
def test_a_frequent_token_gets_the_whole_sum_of_its_gradients(times, dtype, backend, device, monkeypatch):
    monkeypatch.setattr(embedding, "CHUNK", CHUNK)
    table, positions = (x.requires_grad_() for x in tables_of(11, 5, 8, dtype, device))
    tokens = torch.tensor([7] + [3] * times, device=device).view(-1, 8)
    dy = (1 + 0.5 * torch.randn(*tokens.shape, 5)).to(device, dtype)
    load_ops(backend).embedding(tokens, table, positions).backward(dy)
    exact = table.detach().double().requires_grad_()
    F.embedding(tokens, exact).backward(dy.double())
    # one rounding of each sum, and float32 sums of so many terms
    of_sums = times * torch.finfo(torch.float32).eps * exact.grad.abs().max()
    allowed = torch.finfo(dtype).eps * exact.grad.abs() + of_sums
    assert ((table.grad - exact.grad).abs() <= allowed).all()
    assert table.grad.dtype == dtype
    assert (table.grad[[0, 1, 2, 4, 5, 6, 8, 9, 10]] == 0).all()


def test_float64_is_taken_by_the_torch_backend():
    tokens = torch.tensor([[0, 2, 2], [1, 2, 0]])
    double = lambda *shape: torch.randn(shape, dtype=torch.float64, requires_grad=True)  # noqa: E731
    for p in (0.0, 0.4):
        call = functools.partial(embed(tokens, dropout_p=p, seed=3), load_ops("torch"))
        assert torch.autograd.gradcheck(call, (double(4, 3), double(5, 3)))


def kept_by(backend, shape, p, device, seed=SEED):
    """What dropout keeps of an embedding."""
    B, T, N = shape
    tables = (torch.ones(1, N, device=device), torch.zeros(T, N, device=device))
    tokens = torch.zeros(B, T, dtype=torch.int64, device=device)
    return load_ops(backend).embedding(tokens, *tables, dropout_p=p, seed=seed) != 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N", [3, 150])
@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_and_backward_use_one_mask(backend, N, dtype, device):
    tokens = torch.where(torch.rand(2, 9) < 0.7, 5, torch.randint(7, (2, 9))).to(device)
    tables = [x.requires_grad_() for x in tables_of(7, N, 10, dtype, device)]
    dy = torch.randn(2, 9, N).to(device, dtype)
    z = kept_by(backend, dy.shape, 0.25, device) / 0.75
    y = load_ops(backend).embedding(tokens, *tables, dropout_p=0.25, seed=SEED)
    dtokens, dpositions = torch.autograd.grad(y, tables, dy)

    exact = [x.detach().double().requires_grad_() for x in tables]
    exact_y = (exact[0][tokens] + exact[1][:9]) * z
    exact_dtokens, exact_dpositions = torch.autograd.grad(exact_y, exact, dy.double())
    for ours, theirs in ((dtokens, exact_dtokens), (dpositions, exact_dpositions)):
        assert (ours - theirs).abs().max() <= 2.0 * torch.finfo(dtype).eps * theirs.abs().max()
    assert (y - exact_y).abs().max() <= 2.0 * torch.finfo(dtype).eps * exact_y.abs().max()
    assert torch.equal(y[z == 0], torch.zeros_like(y[z == 0]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_it_drops_at_its_rate_and_keeps_the_mean(p, backend, device):
    kept = kept_by(backend, (5, 41, 333), p, device).double()
    deviation = (p * (1.0 - p) / kept.numel()) ** 0.5
    assert abs(kept.mean().item() - (1.0 - p)) < 4.0 * deviation
    for dimension in range(3):
        near, far = kept.narrow(dimension, 0, 4), kept.narrow(dimension, 1, 4)
        agreement = (near == far).double().mean().item()
        expected = p**2 + (1.0 - p) ** 2
        assert abs(agreement - expected) < 4.5 * (expected * (1.0 - expected) / near.numel()) ** 0.5 + 0.01


@pytest.mark.parametrize(("backend", "N"), [("triton", 5), ("triton", 772), ("torch", 5), ("torch", 772)])
def test_the_mask_is_that_of_dropout(backend, N, device):
    ones = torch.ones(2, 5, N, device=device)
    dropped = load_ops(backend).dropout(ones, 0.3, SEED)
    assert torch.equal(kept_by(backend, ones.shape, 0.3, device), dropped != 0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_seed_is_an_int_or_a_tensor_and_leaves_the_global_generator_alone(backend, device):
    state = torch.get_rng_state()
    shape = (2, 5, 130)
    kept = kept_by(backend, shape, 0.5, device)
    assert torch.equal(kept, kept_by(backend, shape, 0.5, device, torch.tensor([SEED], device=device)))
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(kept, kept_by(backend, shape, 0.5, device, SEED + 1))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_slices_of_tokens_and_tables_are_taken(dtype, backend, device):
    tokens = torch.randint(11, (3, 8), device=device, dtype=dtype)
    table, positions = tables_of(11, 10, 30, torch.float32, device)
    for view in (tokens[:, :-1], tokens[:, 1:], tokens.t(), tokens[:1].expand(4, 8), tokens[:, ::2]):
        assert_as_close_as_torch(embed(view), table[:, ::2], positions[4:, ::2], ops=load_ops(backend))
        assert_as_close_as_torch(embed(view), table, positions[3:], ops=load_ops(backend))


def test_a_token_outside_the_table_is_nan_and_adds_to_no_gradient(device, triton_ops):
    tokens = torch.tensor([[2, -1, 4, 0, 2, 2**40, 5, -(2**40), 2, 2, 2, 2]], device=device)
    known = (tokens >= 0) & (tokens < 5)
    table, positions = (x.requires_grad_() for x in tables_of(5, 6, 12, torch.float32, device))
    y = triton_ops.embedding(tokens, table, positions)
    assert y[~known].isnan().all() and torch.equal(y[known], table[tokens[known]] + positions[known[0]])
    y.backward(torch.ones_like(y))
    counts = tokens[known].bincount(minlength=5).float()
    assert torch.equal(table.grad, counts[:, None].expand(5, 6))


@pytest.mark.parametrize("token", [5, -1])
def test_a_token_outside_the_table_is_an_error_on_a_cpu(token):
    with pytest.raises(IndexError):
        load_ops("torch").embedding(torch.tensor([[token]]), torch.zeros(5, 6), torch.zeros(1, 6))


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_infinite_gradient_reaches_its_own_rows_only(backend, device):
    tokens = torch.tensor([[3, 1, 3, 3, 0, 4, 3, 3, 3, 3, 3, 2]], device=device)
    table, positions = (x.requires_grad_() for x in tables_of(5, 6, 12, torch.float32, device))
    dy = torch.ones(1, 12, 6, device=device)
    dy[0, 4], dy[0, 0, 2] = float("nan"), float("inf")
    load_ops(backend).embedding(tokens, table, positions).backward(dy)
    assert table.grad[0].isnan().all() and torch.equal(table.grad[[1, 2, 4]], torch.ones(3, 6, device=device))
    assert table.grad[3, 2].isinf() and (table.grad[3, [0, 1, 3, 4, 5]] == 8).all()
    assert torch.equal(positions.grad.nan_to_num(7.0), dy[0].nan_to_num(7.0))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_a_repeat_gives_the_same_bits(dropout_p, backend, device):
    tokens = torch.where(torch.rand(2, 20) < 0.7, 5, torch.randint(11, (2, 20))).to(device)
    call = lambda *tables: embed(tokens, dropout_p=dropout_p, seed=SEED)(load_ops(backend), *tables)  # noqa: E731
    tables = tables_of(11, 40, 20, torch.float16, device)
    first, second = (output_and_gradients(call, tables) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_gradients_that_are_asked_for_are_given(backend, device):
    tokens = torch.randint(11, (2, 5), device=device)
    for wanted in (0, 1):
        tables = tables_of(11, 6, 5, torch.float32, device)
        tables[wanted].requires_grad_()
        load_ops(backend).embedding(tokens, *tables).sum().backward()
        assert tables[wanted].grad is not None and tables[1 - wanted].grad is None
        assert tables[wanted].grad.sum().item() == 2 * 5 * 6


@pytest.mark.parametrize("backend", BACKENDS)
def test_checkpointing_recomputes_the_same_mask(backend, device):
    tokens = torch.randint(11, (2, 5), device=device)
    call = lambda *tables: embed(tokens, dropout_p=0.5, seed=SEED)(load_ops(backend), *tables) ** 2  # noqa: E731
    again = lambda *tables: checkpoint(call, *tables, use_reentrant=False)  # noqa: E731
    tables = tables_of(11, 6, 5, torch.float32, device)
    plain, recomputed = (output_and_gradients(call, tables) for call in (call, again))
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True))


def test_torch_library_finds_the_ops_well_formed(device):
    tokens = torch.randint(11, (2, 3), device=device)
    tables = [x.requires_grad_() for x in tables_of(11, 6, 7, torch.float32, device)]
    drawn, dy = torch.tensor([SEED], device=device), torch.randn(2, 3, 6, device=device)
    torch.library.opcheck(embedding._embedding, (tokens, *(x.detach() for x in tables), 0.0, None))
    torch.library.opcheck(embedding._embedding, (tokens, *tables, 0.5, drawn))
    torch.library.opcheck(embedding._token_gradient, (tokens, dy, 11, 0.5, drawn))
    torch.library.opcheck(embedding._position_gradient, (dy, 7, 0.5, drawn))
    if device == "cpu":
        torch.library.opcheck(on_cpu, (tokens, *tables, 0.5, drawn))
        for needed in ([True, True], [False, True]):
            torch.library.opcheck(gradients_on_cpu, (tokens, dy, [11, 7], needed, torch.float16))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_compiled_model_has_no_graph_break(backend, device):
    tokens, seed = torch.randint(11, (2, 5), device=device), torch.tensor([SEED], device=device)
    ops = load_ops(backend)
    call = lambda *tables: embed(tokens, dropout_p=0.5, seed=seed)(ops, *tables) * 2.0  # noqa: E731
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    tables = tables_of(11, 6, 7, torch.float32, device)
    for ours, eager in zip(output_and_gradients(compiled, tables), output_and_gradients(call, tables), strict=True):
        assert torch.equal(ours, eager)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize(
    ("change", "reasons"),
    [
        ({"tokens": torch.zeros(2, 5)}, ["tokens are torch.float32; they must be int64 or int32"]),
        ({"tokens": torch.zeros(2, dtype=torch.int64)}, ["tokens has shape (2,); it must be (B, T)"]),
        (
            {"tokens": torch.zeros(1, 8, dtype=torch.int64), "dropout_p": 1.0},
            [
                "dropout_p is 1.0; it must be at least 0 and below 1",
                "dropout_p is 1.0 but seed is None; give an int, or an int64 tensor of one element",
                "tokens has 8 positions; position_table has 7",
            ],
        ),
        ({"token_table": torch.zeros(11)}, ["token_table has shape (11,); it must be (V, N)"]),
        (
            {"position_table": torch.zeros(7, 5, dtype=torch.float16)},
            [
                "position_table is torch.float16 and token_table torch.float32; they must be of one dtype",
                "position_table has shape (7, 5); token_table (11, 6) needs (T_max, 6)",
            ],
        ),
        (
            {"token_table": torch.zeros(11, 6).int(), "position_table": torch.zeros(7, 6).int()},
            ["token_table is torch.int32; it must be a floating-point tensor"],
        ),
    ],
)
def test_mistakes_in_a_call_are_named(change, reasons, backend):
    arguments = {
        "tokens": torch.zeros(2, 5, dtype=torch.int64),
        "token_table": torch.zeros(11, 6),
        "position_table": torch.zeros(7, 6),
    }
    with pytest.raises(UnsupportedInput) as error:
        load_ops(backend).embedding(**arguments | change)
    assert list(error.value.reasons) == reasons


def test_every_reason_against_the_triton_kernels_is_given(device, triton_ops):
    tokens = torch.zeros(0, 5, dtype=torch.int64, device=device)
    with pytest.raises(UnsupportedInput) as error:
        triton_ops.embedding(tokens, *tables_of(11, 6, 5, torch.float64, device))
    assert str(error.value) == (
        "embedding (triton) cannot take this input:\n"
        "  - token_table is torch.float64; supported: float32, float16, bfloat16\n"
        "  - position_table is torch.float64; supported: float32, float16, bfloat16\n"
        "  - tokens has shape (0, 5); it needs at least one element\n"
        "Set kernels.backend to 'torch' to run it without Triton."
    )


def test_no_tokens_are_no_trouble_for_torch():
    tables = [x.requires_grad_() for x in tables_of(11, 6, 5, torch.float32, "cpu")]
    for shape in ((0, 5), (2, 0)):
        y = load_ops("torch").embedding(torch.zeros(shape, dtype=torch.int64), *tables)
        assert y.shape == (*shape, 6)
        assert all((gradient == 0).all() for gradient in torch.autograd.grad(y.sum(), tables))
