from collections.abc import Callable
from typing import Any

import pytest
import torch
from fastgpt_kernels import load_ops
from torch import Tensor

from fastgpt.config import ModelConfig
from fastgpt.model import GPT, build_model
from fastgpt.model.seeds import fold


@pytest.fixture(params=["pre", "post"])
def norm(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def config_of() -> Callable[..., ModelConfig]:
    """A small model with sizes that are multiples of nothing."""

    def make(**changes: Any) -> ModelConfig:
        shape = {"n_layer": 2, "n_head": 3, "n_embd": 21, "context": 13, "vocab_size": 37}
        return ModelConfig.model_validate(shape | changes)

    return make


@pytest.fixture
def config(config_of: Callable[..., ModelConfig], norm: str) -> ModelConfig:
    return config_of(norm=norm)


@pytest.fixture
def model(config: ModelConfig) -> GPT:
    return scrambled(build_model(config, load_ops("torch")))


@pytest.fixture
def tokens(config: ModelConfig) -> Tensor:
    return torch.randint(config.vocab_size, (2, 11), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def scramble() -> Callable[[GPT], GPT]:
    return scrambled


@torch.no_grad()
def scrambled(model: GPT) -> GPT:
    """Random values everywhere, larger than the initial ones: no bias or gain that could be left out unseen."""
    for index, parameter in enumerate(model.parameters()):
        generator = torch.Generator().manual_seed(fold(7, index))
        parameter.copy_(
            torch.randn(parameter.shape, generator=generator) * 0.3 + (0.5 if parameter.dim() == 1 else 0.0)
        )
    return model
