"""Byte-level BPE: text to token ids and back, losslessly."""

from fastgpt.tokenizer.base import END_OF_TEXT, Tokenizer
from fastgpt.tokenizer.files import load_tokenizer
from fastgpt.tokenizer.training import MINIMUM_VOCAB_SIZE, train_tokenizer

__all__ = ["END_OF_TEXT", "MINIMUM_VOCAB_SIZE", "Tokenizer", "load_tokenizer", "train_tokenizer"]
