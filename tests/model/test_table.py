"""`model.embedding: table`, held to OpenAI's arithmetic written out: one table, dropped as such, all in the softmax."""

import logging
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fastgpt_kernels import Backend, Ops, load_ops
from torch import Tensor

from fastgpt.config import ModelConfig
from fastgpt.generate import generate
from fastgpt.model import GPT, build_model, parameter_count
from fastgpt.model.cache import CachedLogits
from fastgpt.model.convert import from_hugging_face, to_hugging_face
from fastgpt.model.layers import TableEmbedding
from fastgpt.model.seeds import fold
from fastgpt.model.state import join_tables, model_from_state, split_table

SEED = 5


@pytest.fixture
def config(config_of: Callable[..., ModelConfig]) -> ModelConfig:
    """GPT-1's block and table."""
    return config_of(norm="post", embedding="table")


def logits_written_out(parameters: dict[str, Tensor], config: ModelConfig, tokens: Tensor, mask: Tensor) -> Tensor:
    """Logits (B, T, V + context) of a post-norm GPT, the table dropped by `mask`, by the formulas alone."""
    table = parameters["token_embedding.weight"] * mask
    B, T = tokens.shape
    D = config.n_embd // config.n_head
    x = table[tokens] + table[config.vocab_size + torch.arange(T)]

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ parameters[f"{name}.weight"].T + parameters[f"{name}.bias"]

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * parameters[f"{name}.weight"] + parameters[f"{name}.bias"]

    for layer in range(config.n_layer):
        block = f"blocks.{layer}"
        q, k, v = linear(x, f"{block}.attention.qkv").view(B, T, 3, config.n_head, D).permute(2, 0, 3, 1, 4)
        scores = (q @ k.mT / math.sqrt(D)).masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)
        attended = (scores.softmax(-1) @ v).transpose(1, 2).reshape(B, T, config.n_embd)
        n = norm(x + linear(attended, f"{block}.attention.out"), f"{block}.norm_1")
        up = linear(n, f"{block}.mlp.up")
        active = 0.5 * up * (1 + torch.tanh(math.sqrt(2 / math.pi) * (up + 0.044715 * up**3)))
        x = norm(n + linear(active, f"{block}.mlp.down"), f"{block}.norm_2")
    return x @ table.T


def only_the_table_drops(ops: Ops) -> Ops:
    """The operations without the dropout of any other site."""

    def keeping(operation: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **options: operation(*args, **options | {"dropout_p": 0.0, "seed": None})

    return ops._replace(causal_attention=keeping(ops.causal_attention), add_layer_norm=keeping(ops.add_layer_norm))


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_loss_and_gradients_are_those_of_the_arithmetic_written_out(
    config: ModelConfig, tokens: Tensor, scramble: Callable[[GPT], GPT], backend: Backend, p: float
) -> None:
    config = config.model_copy(update={"dropout": p})
    ops = load_ops(backend)
    model = scramble(build_model(config, only_the_table_drops(ops))).double()
    targets = tokens.roll(-1, 1)
    loss = model(tokens, targets=targets, dropout_seed=SEED)
    loss.backward()

    parameters = {name: parameter.detach().clone().requires_grad_() for name, parameter in model.named_parameters()}
    table = parameters["token_embedding.weight"]
    mask = ops.dropout(torch.ones_like(table).detach(), p, torch.tensor(fold(SEED, 0, 0)))
    assert (0.2 < (mask == 0).double().mean() < 0.4) == (p == 0.3)
    logits = logits_written_out(parameters, config, tokens, mask)
    chosen = logits.gather(-1, targets[..., None])[..., 0]
    expected = (logits.exp().sum(-1).log() - chosen).mean()
    expected.backward()

    torch.testing.assert_close(loss, expected)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, parameters[name].grad, msg=lambda text, name=name: f"{name}: {text}")
    unread = config.vocab_size + tokens.shape[1]  # a position past the text has a part in the softmax
    assert table.grad is not None and (table.grad[unread:] != 0).any(1).all()


def test_a_table_is_the_two_tables_with_more_columns(
    config_of: Callable[..., ModelConfig], scramble: Callable[[GPT], GPT], tokens: Tensor, norm: str
) -> None:
    separate = scramble(build_model(config_of(norm=norm), load_ops("torch")))
    table = model_from_state(
        config_of(norm=norm, embedding="table"), load_ops("torch"), join_tables(separate.state_dict())
    )
    logits = table(tokens)
    assert logits.shape == (2, 11, 37 + 13)
    torch.testing.assert_close(logits[..., :37], separate(tokens))
    assert table(tokens, last_only=True).shape == (2, 37)
    torch.testing.assert_close(table(tokens, last_only=True), logits[:, -1, :37])


def test_joining_and_splitting_tables_undo_each_other(config_of: Callable[..., ModelConfig]) -> None:
    state = build_model(config_of(), load_ops("torch")).state_dict()
    again = split_table(join_tables(state), 37)
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], state[name]) for name in state)


def test_the_published_count_of_parameters_is_that_of_the_table_too() -> None:
    shape = {"n_layer": 12, "n_head": 12, "n_embd": 768, "context": 512, "norm": "post", "embedding": "table"}
    for vocab_size, count in ((40478, 116_534_784), (40481, 116_534_784 + 3 * 768)):
        config = ModelConfig.model_validate(shape | {"vocab_size": vocab_size})
        with torch.device("meta"):
            model = build_model(config, load_ops("torch"))
        assert sum(parameter.numel() for parameter in model.parameters()) == count == parameter_count(config)
    assert model.token_embedding.weight.shape == (40481 + 512, 768)
    assert not [name for name, _ in model.named_parameters() if "position" in name]


def test_every_row_of_the_table_begins_with_the_spread_of_gpt1(config_of: Callable[..., ModelConfig]) -> None:
    config = config_of(norm="post", embedding="table", n_embd=96, vocab_size=300, context=200)
    table = build_model(config, load_ops("torch")).token_embedding.weight.detach()
    for rows in (table[:300], table[300:]):
        assert rows.std().item() == pytest.approx(0.02, rel=0.03)


def test_the_mask_of_the_table_is_one_in_both_of_its_uses(config: ModelConfig, tokens: Tensor) -> None:
    config = config.model_copy(update={"dropout": 0.5})
    ops = load_ops("torch")
    dropped: list[Tensor] = []

    def spy(x: Tensor, p: float, seed: Any) -> Tensor:
        dropped.append(ops.dropout(x, p, seed))
        return dropped[-1]

    model = build_model(config, ops._replace(dropout=spy))
    model(tokens, dropout_seed=SEED)
    assert len(dropped) == 2 and torch.equal(*dropped)
    model(tokens, dropout_seed=SEED + 1)
    assert not torch.equal(dropped[0], dropped[2])
    dropped.clear()
    model.eval()(tokens)
    assert dropped == []


def test_recomputed_activations_give_the_same_gradients(config: ModelConfig, tokens: Tensor) -> None:
    gradients = []
    for again in (False, True):
        model = build_model(config.model_copy(update={"dropout": 0.3}), load_ops("torch"))
        model(tokens, targets=tokens.roll(-1, 1), dropout_seed=SEED, checkpoint_activations=again).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(kept, anew) for kept, anew in zip(*gradients, strict=True))


def test_generation_keeps_its_cache_and_never_draws_a_position(
    config: ModelConfig, scramble: Callable[[GPT], GPT]
) -> None:
    model = scramble(build_model(config, load_ops("torch"))).eval()
    with torch.no_grad():
        model.token_embedding.weight[config.vocab_size :] *= 20  # by their logits positions would be likeliest
    cached = CachedLogits(model, config, dtype=torch.float32, device=torch.device("cpu"))
    text = list(generate(cached, [3], steps=30, context=config.context, seed=1))
    plain = list(generate(lambda t: model(t)[:, -1, :37], [3], steps=30, context=config.context, seed=1))
    assert text == plain
    assert len(text) == 30 and max(text) < config.vocab_size


def test_transformers_gives_the_same_logits_of_the_tokens(
    config: ModelConfig, scramble: Callable[[GPT], GPT], tokens: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    model = scramble(build_model(config, load_ops("torch"))).eval()
    with caplog.at_level(logging.WARNING):
        state, settings = to_hugging_face(model)
    assert "softmax over positions" in caplog.text
    read = from_hugging_face(state, settings, load_ops("torch")).eval()
    assert read.config == config.model_copy(update={"embedding": "separate"})
    torch.testing.assert_close(read(tokens), model(tokens)[..., :37])


def test_a_step_on_triton_is_as_close_to_float64_as_twice_pytorch(device: str) -> None:
    shape = {"n_layer": 1, "n_head": 1, "n_embd": 18, "context": 6, "vocab_size": 11, "norm": "post"}
    config = ModelConfig.model_validate(shape | {"embedding": "table"})
    tokens = torch.randint(11, (1, 6), generator=torch.Generator().manual_seed(1))

    def step(backend: Backend, dtype: torch.dtype) -> dict[str, Tensor]:
        model = build_model(config, load_ops(backend), seed=3).to(device, dtype)
        loss = model(tokens.to(device), targets=tokens.roll(-1, 1).to(device))
        loss.backward()
        return {"loss": loss.detach()} | {name: parameter.grad for name, parameter in model.named_parameters()}

    steps = step("triton", torch.float32), step("torch", torch.float32), step("reference", torch.float64)
    for name, exact in steps[2].items():
        ours, theirs = ((result[name] - exact).abs().max() for result in steps[:2])
        assert ours <= 2 * max(theirs, torch.finfo(torch.float32).eps * exact.abs().max()), name


def test_dropout_on_triton_draws_one_mask_for_both_uses_of_the_table(device: str) -> None:
    ops = load_ops("triton")
    table = torch.ones(17, 18, device=device)
    seed = torch.tensor(fold(SEED, 0, 0), device=device)
    embedding = TableEmbedding(11, 6, 18, ops).to(device)
    embedding.load_state_dict({"weight": table})
    tokens = torch.arange(6, device=device)[None]
    mask = ops.dropout(table, 0.5, seed)
    embedded = embedding(tokens, start=0, p=0.5, seed=seed)[0]
    torch.testing.assert_close(embedded, mask[:6] + mask[11:])
    logits = embedding(torch.eye(18, device=device), p=0.5, seed=seed)
    torch.testing.assert_close(logits, mask.T)
