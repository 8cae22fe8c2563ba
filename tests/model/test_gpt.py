import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fastgpt_kernels import Ops, load_ops
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fastgpt.config import ModelConfig
from fastgpt.errors import UserError
from fastgpt.model import GPT, build_model, flops_per_token, parameter_count
from fastgpt.model.dropout import Masks, dropout_seeds
from fastgpt.model.seeds import fold

GPT2 = {"context": 1024, "vocab_size": 50257, "norm": "pre"}
PUBLISHED = {
    116_534_784: {"n_layer": 12, "n_head": 12, "n_embd": 768, "context": 512, "vocab_size": 40478, "norm": "post"},
    124_439_808: {"n_layer": 12, "n_head": 12, "n_embd": 768} | GPT2,
    354_823_168: {"n_layer": 24, "n_head": 16, "n_embd": 1024} | GPT2,
    774_030_080: {"n_layer": 36, "n_head": 20, "n_embd": 1280} | GPT2,
    1_557_611_200: {"n_layer": 48, "n_head": 25, "n_embd": 1600} | GPT2,
}


@pytest.mark.parametrize("count", PUBLISHED)
def test_the_published_models_have_exactly_their_parameters(count: int) -> None:
    config = ModelConfig.model_validate(PUBLISHED[count])
    with torch.device("meta"):
        model = build_model(config, load_ops("torch"))
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    assert parameter_count(config) == count
    assert all(parameter.is_meta for parameter in model.parameters())


@given(
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 9),
    st.integers(1, 50),
    st.sampled_from(["pre", "post"]),
    st.sampled_from(["separate", "table"]),
)
def test_the_parameter_count_is_that_of_the_model(
    layers: int, heads: int, size: int, rows: int, norm: str, embedding: str
) -> None:
    shape = {"n_layer": layers, "n_head": heads, "n_embd": heads * size, "context": 7, "vocab_size": rows}
    config = ModelConfig.model_validate(shape | {"norm": norm, "embedding": embedding})
    with torch.device("meta"):
        model = GPT(config, load_ops("torch"))
    assert sum(parameter.numel() for parameter in model.parameters()) == parameter_count(config)


@pytest.mark.parametrize("embedding", ["separate", "table"])
def test_flops_count_every_matrix_product(config: ModelConfig, embedding: str) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    config = config.model_copy(update={"embedding": embedding})
    model = build_model(config, load_ops("reference"))
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, config.context, dtype=torch.int64)).sum().backward()
    assert counter.get_total_flops() == flops_per_token(config) * config.context


def test_parameters_have_the_names_that_checkpoints_rely_on(model: GPT, config: ModelConfig) -> None:
    block = [
        f"{module}.{leaf}"
        for module in ("norm_1", "attention.qkv", "attention.out", "norm_2", "mlp.up", "mlp.down")
        for leaf in ("weight", "bias")
    ]
    expected = ["token_embedding.weight", "position_embedding.weight"]
    expected += [f"blocks.{layer}.{name}" for layer in range(config.n_layer) for name in block]
    if config.norm == "pre":
        expected += ["final_norm.weight", "final_norm.bias"]
    assert [name for name, _ in model.named_parameters()] == expected
    assert list(model.state_dict()) == expected


def test_construction_initialises_nothing(config: ModelConfig) -> None:
    torch.use_deterministic_algorithms(True)  # torch.empty is filled with NaN
    try:
        model = GPT(config, load_ops("torch"))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(parameter.isnan().all() for parameter in model.parameters())


@pytest.mark.parametrize("length", [1, 11, 13])
def test_logits_are_the_hidden_states_times_the_token_table(model: GPT, length: int) -> None:
    tokens = torch.arange(2 * length).view(2, length) % model.config.vocab_size
    logits = model(tokens)
    assert logits.shape == (2, length, model.config.vocab_size)
    torch.testing.assert_close(logits, model.hidden(tokens) @ model.token_embedding.weight.T)
    torch.testing.assert_close(model(tokens, last_only=True), logits[:, -1])


@pytest.mark.parametrize("length", [0, 14])
def test_a_length_outside_the_context_is_an_error_that_names_the_limit(model: GPT, length: int) -> None:
    with pytest.raises(UserError, match=f"{length} tokens do not fit the model: model.context allows 1 to 13"):
        model(torch.zeros(1, length, dtype=torch.int64))


def test_no_position_sees_its_future(model: GPT, tokens: Tensor) -> None:
    model = model.double()
    before = model(tokens)
    for changed in range(tokens.shape[1]):
        other = tokens.clone()
        other[:, changed] = (other[:, changed] + 1) % model.config.vocab_size
        after = model(other)
        assert torch.equal(after[:, :changed], before[:, :changed])
        assert (after[:, changed:] != before[:, changed:]).any(-1).all()


def test_alternating_layers_read_all_that_is_before_them_and_a_window_of_it(
    config_of: Callable[..., ModelConfig], scramble: Callable[[GPT], GPT], norm: str
) -> None:
    config = config_of(norm=norm, n_layer=4, attention="alternating", window=3)
    model = scramble(build_model(config, load_ops("torch"))).double()
    assert [config.window_of(layer) for layer in range(4)] == [None, 3, None, 3]
    past = torch.arange(11)[:, None] - torch.arange(11)  # (i, j): how far back j lies from i
    x = torch.randn(11, 21, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for layer, block in enumerate(model.blocks):

        def attended(x: Tensor, attention: nn.Module = block.attention) -> Tensor:
            return attention(x[None], Masks(0.0, None))[0].sum(-1)

        reads = (torch.autograd.functional.jacobian(attended, x) != 0).any(-1)  # (i, j)
        assert torch.equal(reads, (past >= 0) & ((past < 3) if layer % 2 else True))


def test_the_window_of_a_single_layer_changes_nothing(config_of: Callable[..., ModelConfig], tokens: Tensor) -> None:
    dense, banded = (
        build_model(config_of(n_layer=1, **changes), load_ops("torch"))
        for changes in ({}, {"attention": "alternating", "window": 2})
    )
    assert torch.equal(dense(tokens), banded(tokens))


def test_a_banded_layer_counts_its_window_as_work(config_of: Callable[..., ModelConfig]) -> None:
    dense, banded = config_of(n_layer=3), config_of(n_layer=3, attention="alternating", window=4)
    assert flops_per_token(dense) - flops_per_token(banded) == 12 * 21 * (13 - 4)


def test_sequences_of_a_batch_do_not_see_each_other(model: GPT, tokens: Tensor) -> None:
    model = model.double()
    together = model(tokens)
    alone = torch.cat([model(row[None]) for row in tokens])
    torch.testing.assert_close(together, alone)


def test_gradients_reach_every_parameter(model: GPT, tokens: Tensor) -> None:
    model(tokens, targets=tokens.roll(-1, 1)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        # the key bias moves all scores of a query alike, so that its true gradient is 0: nothing to see there
        gradient = parameter.grad.view(3, -1)[[0, 2]] if name.endswith("qkv.bias") else parameter.grad
        rows = gradient[: tokens.shape[1]] if name == "position_embedding.weight" else gradient
        assert (rows != 0).flatten(1).any(1).all() if rows.dim() > 1 else (rows != 0).all(), name


def test_the_torch_and_reference_operations_agree_in_float64(model: GPT, tokens: Tensor) -> None:
    reference = GPT(model.config, load_ops("reference")).double()
    reference.load_state_dict(model.state_dict())
    torch.testing.assert_close(model.double()(tokens), reference(tokens))
    assert reference(tokens).dtype == torch.float64


@pytest.fixture
def dropping(config_of: Callable[..., ModelConfig], norm: str, scramble: Callable[[GPT], GPT]) -> GPT:
    return scramble(build_model(config_of(norm=norm, dropout=0.3), load_ops("torch")))


def test_dropout_masks_depend_on_the_seed_alone(dropping: GPT, tokens: Tensor) -> None:
    torch.manual_seed(1)
    first = dropping(tokens, dropout_seed=5)
    state = torch.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(dropping(tokens, dropout_seed=5), first)
    assert not torch.equal(dropping(tokens, dropout_seed=6), first)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state), "the global generator moved"


def test_dropout_without_a_seed_is_an_error_in_training_and_absent_in_evaluation(dropping: GPT, tokens: Tensor) -> None:
    with pytest.raises(UserError, match=r"model\.dropout is 0\.3 .* dropout_seed is None"):
        dropping(tokens)
    dropping.eval()
    assert torch.equal(dropping(tokens), dropping(tokens, dropout_seed=5))
    without = GPT(dropping.config.model_copy(update={"dropout": 0.0}), dropping.ops)
    without.load_state_dict(dropping.state_dict())
    assert torch.equal(dropping(tokens), without(tokens))


def test_every_site_and_layer_drops_with_a_seed_of_its_own(dropping: GPT, tokens: Tensor) -> None:
    seen: list[tuple[float, Tensor]] = []

    def spy_on(operation: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(operation)

        def spy(*args: Any, **options: Any) -> Any:
            given = signature.bind(*args, **options).arguments
            seen.append((given["p"] if "p" in given else given["dropout_p"], given["seed"]))
            return operation(*args, **options)

        return spy

    names = [name for name in Ops._fields[1:] if "seed" in inspect.signature(getattr(dropping.ops, name)).parameters]
    ops = dropping.ops._replace(**{name: spy_on(getattr(dropping.ops, name)) for name in names})
    spied = GPT(dropping.config, ops)
    spied.load_state_dict(dropping.state_dict())
    spied(tokens, dropout_seed=5)
    assert {p for p, _ in seen} == {0.3}
    # the embedding; in each layer attention weights, attention output and MLP output
    expected = [fold(5, 0, 0)] + [
        fold(5, layer, site) for layer in range(dropping.config.n_layer) for site in (1, 2, 3)
    ]
    assert [int(seed) for _, seed in seen] == expected
    assert len(set(expected)) == len(expected)
    # one tensor holds them all: a single copy to the device
    assert len({seed.untyped_storage().data_ptr() for _, seed in seen}) == 1
    assert {(seed.dtype, seed.numel()) for _, seed in seen} == {(torch.int64, 1)}


def test_a_table_of_seeds_does_what_its_seed_does(dropping: GPT, tokens: Tensor) -> None:
    seeds = dropout_seeds(5, dropping.config.n_layer)
    assert torch.equal(dropping(tokens, dropout_seed=seeds), dropping(tokens, dropout_seed=5))


def test_a_backend_is_handed_the_whole_of_a_branch_to_fuse(dropping: GPT, tokens: Tensor) -> None:
    """No dropout, sum or activation of its own is left in the model between the operations."""
    from torch.utils._python_dispatch import TorchDispatchMode

    operations = load_ops("torch")
    outside: set[str] = set()
    inside = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if not inside:
                outside.add(function.overloadpacket.__name__)
            return function(*args, **(kwargs or {}))

    def enclose(operation: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal inside
            inside += 1
            try:
                return operation(*args, **options)
            finally:
                inside -= 1

        return call

    ops = operations._replace(**{name: enclose(getattr(operations, name)) for name in Ops._fields[1:]})
    spied = GPT(dropping.config, ops)
    spied.load_state_dict(dropping.state_dict())
    seeds = dropout_seeds(5, dropping.config.n_layer)
    with Watch():
        spied(tokens, targets=tokens, dropout_seed=seeds)
    products = {"addmm", "mm", "t", "linear"}
    views = {"view", "_unsafe_view", "select", "slice", "transpose", "alias", "detach", "expand", "unsqueeze"}
    assert outside <= products | views, outside - products - views


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checkpointed_activations_give_bit_identical_gradients_with_dropout(
    dropping: GPT, tokens: Tensor, dtype: torch.dtype
) -> None:
    dropping.to(dtype)
    gradients = []
    for checkpointed in (False, True):
        dropping.zero_grad()
        dropping(tokens, targets=tokens.roll(-1, 1), dropout_seed=5, checkpoint_activations=checkpointed).backward()
        gradients.append([parameter.grad for parameter in dropping.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_checkpointing_computes_each_block_twice(dropping: GPT, tokens: Tensor) -> None:
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    for block in dropping.blocks:
        block.mlp.register_forward_pre_hook(count)
    dropping(tokens, dropout_seed=5, checkpoint_activations=True).sum().backward()
    assert calls == 2 * len(dropping.blocks)


def test_the_packed_projection_reaches_attention_as_a_view(model: GPT, tokens: Tensor) -> None:
    projections: list[Tensor] = []
    packed: list[Tensor] = []
    attend = model.ops.causal_attention

    def spy(qkv: Tensor, **options: float) -> Tensor:
        packed.append(qkv)
        return attend(qkv, **options)

    spied = GPT(model.config, model.ops._replace(causal_attention=spy))
    spied.load_state_dict(model.state_dict())
    for block in spied.blocks:
        block.attention.qkv.register_forward_hook(lambda module, inputs, output: projections.append(output))
    spied(tokens)
    assert [qkv.data_ptr() for qkv in packed] == [projection.data_ptr() for projection in projections]
    assert all(qkv.shape == (2, 11, 3, 3, 7) and qkv.is_contiguous() for qkv in packed)
