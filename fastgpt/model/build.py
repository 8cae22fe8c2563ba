"""The model that a config asks for."""

from fastgpt_kernels import Ops

from fastgpt.config import ModelConfig
from fastgpt.model.gpt import GPT
from fastgpt.model.init import initial_values, initialise
from fastgpt.model.language_model import LanguageModel
from fastgpt.model.lstm import LSTM


def new_model(config: ModelConfig, ops: Ops) -> LanguageModel:
    """The model of `config.kind`, its parameters allocated and not initialised."""
    return LSTM(config, ops) if config.kind == "lstm" else GPT(config, ops)


def build_model(config: ModelConfig, ops: Ops, *, seed: int = 0) -> LanguageModel:
    """A model with its initial values for this seed, on the default device; on the meta device, without values."""
    model = new_model(config, ops)
    if not model.token_embedding.weight.is_meta:
        initialise(model, initial_values(config, seed))
    return model
