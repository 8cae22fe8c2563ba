"""The GPT model."""

from fastgpt_kernels import Ops

from fastgpt.config import ModelConfig
from fastgpt.model.gpt import GPT
from fastgpt.model.init import initial_values, initialise
from fastgpt.sizes import flops_per_token, parameter_count

__all__ = ["GPT", "build_model", "flops_per_token", "parameter_count"]


def build_model(config: ModelConfig, ops: Ops, *, seed: int = 0) -> GPT:
    """A GPT with its initial values for this seed, on the default device; on the meta device, without values."""
    model = GPT(config, ops)
    if not model.token_embedding.weight.is_meta:
        initialise(model, initial_values(config, seed))
    return model
