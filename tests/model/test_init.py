import math
from collections.abc import Callable

import pytest
import torch
from fastgpt_kernels import load_ops

from fastgpt.config import ModelConfig
from fastgpt.model import GPT, build_model
from fastgpt.model.init import decays, initial_value, initial_values, initialise

SHAPE = (300, 401)


@pytest.mark.parametrize(
    ("norm", "name", "std"),
    [
        ("pre", "token_embedding.weight", 0.02),
        ("pre", "position_embedding.weight", 0.01),
        ("pre", "blocks.1.attention.qkv.weight", 0.02),
        ("pre", "blocks.1.attention.out.weight", 0.02 / math.sqrt(4)),
        ("pre", "blocks.0.mlp.up.weight", 0.02),
        ("pre", "blocks.0.mlp.down.weight", 0.02 / math.sqrt(4)),
        ("post", "token_embedding.weight", 0.02),
        ("post", "position_embedding.weight", 0.02),
        ("post", "blocks.1.attention.out.weight", 0.02),
        ("post", "blocks.0.mlp.down.weight", 0.02),
    ],
)
def test_weights_are_normal_with_the_published_standard_deviation(
    norm: str, name: str, std: float, config_of: Callable[..., ModelConfig]
) -> None:
    values = initial_value(name, SHAPE, config_of(norm=norm), seed=3).double()
    count = values.numel()
    # five standard errors of the mean, of the deviation and of the fourth moment of that many normal values
    assert abs(values.mean()) < 5 * std / math.sqrt(count)
    assert abs(values.std() / std - 1) < 5 / math.sqrt(2 * count)
    assert abs(((values / std) ** 4).mean() - 3) < 5 * math.sqrt(96 / count)


def test_biases_are_zero_and_gains_one(config: ModelConfig) -> None:
    for name, parameter in build_model(config, load_ops("torch")).named_parameters():
        if parameter.dim() == 1:
            assert (parameter == (0.0 if name.endswith("bias") else 1.0)).all(), name


def test_values_depend_on_name_and_seed_and_on_nothing_else(config: ModelConfig) -> None:
    name = "blocks.1.mlp.up.weight"
    torch.manual_seed(0)
    value = initial_value(name, SHAPE, config, seed=3)
    torch.manual_seed(1)
    initial_value("blocks.0.mlp.up.weight", SHAPE, config, seed=3)
    with torch.device("meta"):
        again = initial_value(name, SHAPE, config, seed=3)
    assert torch.equal(value, again)
    assert value.dtype == torch.float32
    assert not torch.equal(value, initial_value(name, SHAPE, config, seed=4))
    assert not torch.equal(value, initial_value("blocks.0.mlp.up.weight", SHAPE, config, seed=3))


def test_every_parameter_starts_at_its_initial_value(config: ModelConfig) -> None:
    model = build_model(config, load_ops("torch"), seed=3)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, initial_value(name, tuple(parameter.shape), config, 3)), name


@pytest.mark.parametrize("threads", [1, 5])
def test_values_do_not_depend_on_how_many_are_drawn_at_a_time(
    threads: int, config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    model = build_model(config, load_ops("torch"), seed=3)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, initial_value(name, tuple(parameter.shape), config, 3)), name


def test_a_bf16_model_starts_at_the_rounded_values(config: ModelConfig) -> None:
    model = GPT(config, load_ops("torch")).to(torch.bfloat16)
    initialise(model, initial_values(config, 3))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, initial_value(name, tuple(parameter.shape), config, 3).to(torch.bfloat16)), name


def test_weight_decay_acts_on_matrices_and_tables_only(config: ModelConfig) -> None:
    decayed = {
        name.rpartition(".")[2]: decays(p.shape)
        for name, p in build_model(config, load_ops("torch")).named_parameters()
        if "norm" not in name
    }
    assert decayed == {"weight": True, "bias": False}
    assert not decays((21,))
