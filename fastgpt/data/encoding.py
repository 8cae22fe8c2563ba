"""Documents as tokens, in the form in which they are written."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fastgpt.tokenizer import Tokenizer


class TextBatch(NamedTuple):
    """Some documents in a row, by split."""

    train: list[str]
    validation: list[str]


class Encoded(NamedTuple):
    """Documents as tokens: `ids` of all, one after another, each document led by end-of-text."""

    ids: npt.NDArray[np.integer]
    lengths: npt.NDArray[np.int64]  # (documents,) tokens
    bytes: int  # of UTF-8 text


class EncodedBatch(NamedTuple):
    """A TextBatch as tokens."""

    train: Encoded
    validation: Encoded


def encode_batch(batch: TextBatch, tokenizer: Tokenizer, dtype: str) -> EncodedBatch:
    """The documents of both splits as tokens."""
    return EncodedBatch(*(encode_documents(texts, tokenizer, dtype) for texts in batch))


def encode_documents(texts: list[str], tokenizer: Tokenizer, dtype: str) -> Encoded:
    """The documents as tokens, each led by end-of-text, so that every token of text has one before it."""
    documents = [[tokenizer.end_of_text, *ids] for ids in tokenizer.encode_batch(texts)]
    ids = np.array([index for document in documents for index in document], np.dtype(dtype).newbyteorder("<"))
    lengths = np.array([len(document) for document in documents], np.int64)
    return Encoded(ids, lengths, sum(len(text.encode()) for text in texts))
