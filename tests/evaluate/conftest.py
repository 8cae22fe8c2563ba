"""A tokenizer of whole words, and models whose probabilities can be worked out by hand."""

import re
from collections.abc import Callable, Iterable, Sequence
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn


class Words:
    """Each word and each mark is a token; new ones take the next id. It is no more of a tokenizer than is needed."""

    end_of_text = 0

    def __init__(self) -> None:
        self.ids = {"": 0}

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [[self.id(word) for word in re.findall(r"\w+|[^\w\s]", text)] for text in texts]

    def id(self, word: str) -> int:
        return self.ids.setdefault(word, len(self.ids))


class Planted(nn.Module):
    """Logits that are sums of what was planted: `weights[seen, next]` for every token seen, or for the last alone."""

    def __init__(self, vocab_size: int, context: int, *, last_only: bool) -> None:
        super().__init__()
        self.config = SimpleNamespace(vocab_size=vocab_size, context=context)
        self.weights = nn.Parameter(torch.zeros(vocab_size, vocab_size, dtype=torch.float64))
        self.last_only = last_only
        self.batches: list[tuple[int, ...]] = []  # shapes of tokens that were read, call by call
        self.rows: list[int] = []  # of hidden states that became logits

    def hidden(self, tokens: Tensor) -> Tensor:
        assert tokens.shape[1] <= self.config.context
        self.batches.append(tuple(tokens.shape))
        seen = nn.functional.one_hot(tokens, self.config.vocab_size).double()
        return seen if self.last_only else seen.cumsum(1)

    def logits(self, x: Tensor, p: float, seeds: Tensor | None) -> Tensor:
        assert not self.training and p == 0.0 and seeds is None
        self.rows.append(len(x))
        return x @ self.weights


@pytest.fixture
def words() -> Words:
    return Words()


@pytest.fixture
def planted(words: Words) -> Callable[..., Planted]:
    """A model that finds one word likelier after another: (seen, next, weight)."""

    def make(preferences: Iterable[tuple[str, str, float]], *, context: int = 64, last_only: bool = False) -> Planted:
        model = Planted(64, context, last_only=last_only)
        with torch.no_grad():
            for seen, following, weight in preferences:
                model.weights[words.id(seen), words.id(following)] = weight
        return model

    return make
