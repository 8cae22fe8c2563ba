"""How likely a language model finds tokens after others.

A span is tokens to score and the prefix that stands before them; its likelihood is log p(scored | prefix) in nats, the
sum over the tokens that are scored, and only the states that predict those go through the output matrix. Every prefix
begins with the token that stands before each document in training, so that the first token of a text has a probability
too.

A text is encoded in two parts, so that what is scored is the same tokens whatever stands before it. The space between
them is the first character of what is scored, where byte-level BPE has it in running text too; GPT-1's tokenizer, which
cuts text into words, leaves it out.

What is longer than the model's context loses the beginning of its prefix, that first token included.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from fastgpt.errors import UserError
from fastgpt.tokenizer import Tokenizer

PADDING = 0  # any token: a causal model reads it after all that is scored
ROWS = 256  # hidden states that become logits at once: 51 MB of float32 at GPT-2's vocabulary

Ids = tuple[int, ...]


class Shape(Protocol):
    """A model's settings, as far as likelihoods need them."""

    @property
    def context(self) -> int:
        """The longest sequence, in tokens."""

    @property
    def vocab_size(self) -> int:
        """How many tokens there are; further columns of the logits are none."""


class LanguageModel(Protocol):
    """A causal language model, as far as likelihoods need it: an nn.Module."""

    training: bool

    @property
    def config(self) -> Shape:
        """Its settings."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """Its weights, all on one device."""

    def train(self, mode: bool) -> Any:
        """Set training mode, or evaluation mode."""

    def hidden(self, tokens: Tensor) -> Tensor:
        """Tokens (B, T) int64 to the final hidden states (B, T, N)."""

    def logits(self, x: Tensor, p: float, seeds: Tensor | None) -> Tensor:
        """Hidden states (..., N) to logits (..., V) at least; p and seeds are of dropout."""


class Passage(NamedTuple):
    """Text to score, and what stands before it."""

    before: str  # without white space at its end; "" at the beginning of a document
    scored: str  # with the space at its beginning, where one stands there
    place: str  # "file:row", for errors


class Span(NamedTuple):
    """Tokens to score, and those that stand before them."""

    prefix: Ids  # at least one
    scored: Ids  # at least one
    place: str


class Likelihood(NamedTuple):
    """log p(scored | prefix)."""

    total: float  # nats
    tokens: int  # that were scored
    cut: bool  # whether the prefix was longer than the context has room for

    @property
    def mean(self) -> float:
        """Nats of a token, on the average."""
        return self.total / self.tokens


class Window(NamedTuple):
    """What a model reads of a span."""

    tokens: Ids
    scored: int  # how many of the last ones

    @classmethod
    def of(cls, span: Span, context: int) -> "Window":
        """As much as the model can read: the last token is predicted, but not read."""
        if len(span.scored) > context:
            raise UserError(
                f"{span.place}: {len(span.scored)} tokens to score do not fit the model, whose context is {context}"
            )
        return cls((*span.prefix, *span.scored)[-context - 1 :], len(span.scored))


def encode_passages(tokenizer: Tokenizer, passages: Sequence[Passage]) -> list[Span]:
    """The passages as tokens, each prefix with the token before a document at its beginning.

    Raises UserError, with the passage's place, where there is nothing to score.
    """
    before = tokenizer.encode_batch([passage.before for passage in passages])
    scored = tokenizer.encode_batch([passage.scored for passage in passages])
    spans = []
    for passage, left, right in zip(passages, before, scored, strict=True):
        if not right:
            raise UserError(f"{passage.place}: a text gives no tokens")
        spans.append(Span((tokenizer.end_of_text, *left), tuple(right), passage.place))
    return spans


@torch.no_grad()
def likelihoods(model: LanguageModel, spans: Sequence[Span], *, batch_size: int = 32) -> list[Likelihood]:
    """The likelihood of each span, dropout off; equal spans have exactly equal ones.

    Args:
        model: on any device, in any mode, which it keeps.
        spans: of any lengths.
        batch_size: spans that are computed together; those of like length are, padded at the end.

    Raises:
        UserError: what is to be scored is longer than the context; or the model does not give numbers.
    """
    windows = [Window.of(span, model.config.context) for span in spans]
    order = sorted(dict.fromkeys(windows), key=lambda window: -len(window.tokens))
    totals: dict[Window, float] = {}
    with in_evaluation_mode(model):
        for first in range(0, len(order), batch_size):
            batch = order[first : first + batch_size]
            totals.update(zip(batch, batch_totals(model, batch).tolist(), strict=True))
    return [
        Likelihood(totals[window], window.scored, len(window.tokens) < len(span.prefix) + len(span.scored))
        for window, span in zip(windows, spans, strict=True)
    ]


def batch_totals(model: LanguageModel, batch: Sequence[Window]) -> Tensor:
    """The log-probability of what is scored of each window, (B,) float64 on the CPU."""
    device = next(iter(model.parameters())).device
    tokens = torch.full((len(batch), max(len(window.tokens) for window in batch) - 1), PADDING)
    for row, window in zip(tokens, batch, strict=True):
        row[: len(window.tokens) - 1] = torch.tensor(window.tokens[:-1])
    rows = torch.repeat_interleave(torch.tensor([window.scored for window in batch]))
    # the state that predicts a token stands one before it
    positions = torch.cat([torch.arange(-window.scored, 0) + len(window.tokens) - 1 for window in batch])
    targets = torch.tensor([token for window in batch for token in window.tokens[-window.scored :]])
    states = model.hidden(tokens.to(device))[rows.to(device), positions.to(device)]
    parts = zip(states.split(ROWS), targets.to(device).split(ROWS), strict=True)
    found = torch.cat([log_probabilities(model, x, following) for x, following in parts]).double().cpu()
    if not bool(found.isfinite().all()):
        raise UserError("the model's probabilities are not numbers: its weights are damaged, or its training diverged")
    return torch.zeros(len(batch), dtype=torch.float64).index_add_(0, rows, found)


def log_probabilities(model: LanguageModel, x: Tensor, following: Tensor) -> Tensor:
    """log p(following) after hidden states: (n, N) and (n,) to (n,), in float32 at least."""
    logits = model.logits(x, 0.0, None)[:, : model.config.vocab_size]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits.gather(1, following[:, None])[:, 0] - logits.logsumexp(1)


@contextmanager
def in_evaluation_mode(model: LanguageModel) -> Iterator[None]:
    """Without dropout, and afterwards in the mode of before."""
    training = model.training
    model.train(False)
    try:
        yield
    finally:
        model.train(training)
