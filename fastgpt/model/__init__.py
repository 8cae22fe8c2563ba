"""The language models: GPT, and an LSTM beside it."""

from fastgpt.model.build import build_model
from fastgpt.model.gpt import GPT
from fastgpt.model.language_model import LanguageModel
from fastgpt.model.lstm import LSTM
from fastgpt.sizes import flops_per_token, parameter_count

__all__ = ["GPT", "LSTM", "LanguageModel", "build_model", "flops_per_token", "parameter_count"]
