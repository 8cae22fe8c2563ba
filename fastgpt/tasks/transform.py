"""Examples as token sequences: the input transformations of GPT-1 (Radford et al. 2018, section 3.3 and figure 1).

With s, $ and e for the start, delimiter and extract tokens:

    classification  [s text e]
    pair            [s premise $ hypothesis e]
    similarity      [s first $ second e] and [s second $ first e]
    choice          [s context question $ choice_k e] for each k

The head reads the activation at e; a causal model has read the whole sequence there, and nothing of the padding after.

What is too long is cut at its end. OpenAI's code has two parts around the delimiter, each of which keeps its first
n_ctx // 2 - 2 tokens; we do the same with a question as the end of its part, whole, for which the context makes room.
A single text has the whole context, less the two tokens around it.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from fastgpt.errors import UserError
from fastgpt.tasks.example import Example, Kind, Task
from fastgpt.tokenizer import Tokenizer

IGNORED = -100  # a target that counts for nothing: PyTorch's ignore_index
PADDING = 0  # any token: a causal model never reads it before the extract token

Ids = tuple[int, ...]
TooLong = Literal["cut", "refuse"]


class SpecialTokens(NamedTuple):
    """The tokens that fine-tuning adds after those of the pre-trained model, in the order of OpenAI's code."""

    start: int
    delimiter: int
    extract: int

    @classmethod
    def after(cls, vocab_size: int) -> "SpecialTokens":
        """The three ids that follow a vocabulary."""
        return cls(vocab_size, vocab_size + 1, vocab_size + 2)


class Encoded(NamedTuple):
    """An example as token sequences, each of which ends with the extract token."""

    sequences: tuple[Ids, ...]
    target: int | float | None


class TaskBatch(NamedTuple):
    """B examples of K sequences, padded to T tokens."""

    tokens: npt.NDArray[np.int64]  # (B, K, T)
    following: npt.NDArray[np.int64]  # (B, K, T): the token after each, or -100 after the last real one
    extract: npt.NDArray[np.int64]  # (B, K): where the extract token stands
    targets: npt.NDArray[np.int64] | npt.NDArray[np.float32] | None  # (B,): classes or choices, scores, or None


def encode_examples(
    examples: Sequence[Example],
    task: Task,
    tokenizer: Tokenizer,
    special: SpecialTokens,
    context: int,
    *,
    too_long: TooLong = "cut",
) -> list[Encoded]:
    """The examples as token sequences of at most `context` tokens.

    Args:
        examples: of the task.
        task: what they ask for.
        tokenizer: that of the pre-trained model.
        special: ids that it does not give.
        context: the longest sequence of the model.
        too_long: "cut" as the module says, or "refuse" what would be cut.

    Raises:
        UserError: a text gives no tokens, or is too long and to be refused (file and row); the context has no room for
            a token of each part; the special tokens are tokens of the text.
    """
    if min(special) < tokenizer.vocab_size or len(set(special)) < len(special):
        raise UserError(
            f"the special tokens are {tuple(special)}; they must be three different ids, each at least "
            f"{tokenizer.vocab_size}, beyond those of the tokenizer"
        )
    if room(task.kind, context) < 1:
        raise UserError(
            f"model.context is {context}; kind {task.kind} needs {3 if task.kind is Kind.CLASSIFICATION else 6}"
        )
    texts = [text for example in examples for text in (*example.parts, *example.choices)]
    ids = iter(tokenizer.encode_batch(texts))
    encoded = []
    for example in examples:
        parts = [tuple(next(ids)) for _ in example.parts]
        choices = [tuple(next(ids)) for _ in example.choices]
        if not all([*parts, *choices]):
            raise UserError(f"{example.place}: a text gives no tokens")
        sequences = arrange(task.kind, parts, choices, special, context, too_long, example.place)
        encoded.append(Encoded(sequences, example.target))
    return encoded


def arrange(
    kind: Kind,
    parts: Sequence[Ids],
    choices: Sequence[Ids],
    special: SpecialTokens,
    context: int,
    too_long: TooLong = "cut",
    place: str = "example",
) -> tuple[Ids, ...]:
    """The sequences of one example, of the tokens of its parts and choices. Raises UserError as `encode_examples`."""
    limit = room(kind, context)

    def cut(ids: Ids, limit: int = limit) -> Ids:
        if len(ids) > limit and too_long == "refuse":
            raise UserError(
                f"{place}: {len(ids)} tokens, where model.context ({context}) leaves {limit}; shorten the text, or let "
                "it be cut"
            )
        return ids[:limit]

    def joined(left: Ids, right: Ids) -> Ids:
        return (special.start, *left, special.delimiter, *right, special.extract)

    if kind is Kind.CLASSIFICATION:
        return ((special.start, *cut(parts[0]), special.extract),)
    if kind is Kind.CHOICE:
        question = cut(tuple(token for part in parts[1:] for token in part))
        left = (*cut(parts[0], limit - len(question)), *question)
        return tuple(joined(left, cut(choice)) for choice in choices)
    first, second = (cut(part) for part in parts)
    if kind is Kind.SIMILARITY:
        return joined(first, second), joined(second, first)
    return (joined(first, second),)


def room(kind: Kind, context: int) -> int:
    """The tokens that a part may have: all for a single text, or on each side of the delimiter."""
    return context - 2 if kind is Kind.CLASSIFICATION else context // 2 - 2


def collate(encoded: Sequence[Encoded], task: Task, length: int | None = None) -> TaskBatch:
    """Examples of one task as a batch, padded at the end to their longest sequence, or to `length`.

    OpenAI's code pads to the longest sequence of the whole data set; without dropout the results are the same.
    """
    K = task.sequences
    longest = max(len(sequence) for item in encoded for sequence in item.sequences)
    T = longest if length is None else length
    if length is not None and length < longest:
        raise ValueError(f"length is {length}; the longest sequence has {longest} tokens")
    tokens = np.full((len(encoded), K, T), PADDING, np.int64)
    following = np.full((len(encoded), K, T), IGNORED, np.int64)
    extract = np.zeros((len(encoded), K), np.int64)
    for b, item in enumerate(encoded):
        for k, sequence in enumerate(item.sequences):
            tokens[b, k, : len(sequence)] = sequence
            following[b, k, : len(sequence) - 1] = sequence[1:]
            extract[b, k] = len(sequence) - 1
    return TaskBatch(tokens, following, extract, _targets(encoded, task))


def _targets(encoded: Sequence[Encoded], task: Task) -> npt.NDArray[np.int64] | npt.NDArray[np.float32] | None:
    targets = [item.target for item in encoded if item.target is not None]
    if len(targets) < len(encoded):
        return None
    return np.array(targets, np.int64) if task.score is None else np.array(targets, np.float32)
