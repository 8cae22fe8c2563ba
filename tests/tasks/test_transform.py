"""Sequences worked out by hand. Tokens of texts are below 100; start, delimiter and extract are 100, 101 and 102."""

from collections.abc import Iterable, Sequence
from os import PathLike

import numpy as np
import pytest

from fastgpt.errors import UserError
from fastgpt.tasks import Example, Kind, SpecialTokens, Task, collate, encode_examples

S, D, E = SpecialTokens.after(100)


class Numbers:
    """A tokenizer of texts that are written as their tokens: "7 8 9"."""

    vocab_size = 100
    end_of_text = 0

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split() if word.isdigit()]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return " ".join(map(str, ids))

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return self.decode(ids).encode()

    def save(self, folder: str | PathLike[str]) -> None:
        raise NotImplementedError

    def fingerprint(self) -> str:
        return ""


CLASSES = Task(Kind.CLASSIFICATION, ("accuracy",), labels=("no", "yes"))
PAIRS = Task(Kind.PAIR, ("accuracy",), labels=("no", "yes"))
SIMILAR = Task(Kind.SIMILARITY, ("pearson",), score=(0.0, 5.0))
CHOICES = Task(Kind.CHOICE, ("accuracy",), choices=3)


def example(*parts: str, choices: tuple[str, ...] = (), target: int | float | None = 1) -> Example:
    return Example(parts, choices, target, "data.tsv:7")


def sequences(task: Task, example: Example, context: int = 32, too_long: str = "cut") -> tuple[tuple[int, ...], ...]:
    (encoded,) = encode_examples([example], task, Numbers(), SpecialTokens(S, D, E), context, too_long=too_long)  # type: ignore[arg-type]
    assert encoded.target == example.target
    return encoded.sequences


def test_the_special_tokens_follow_the_vocabulary_in_openais_order() -> None:
    assert SpecialTokens.after(40478) == (40478, 40479, 40480)


def test_a_text_stands_between_start_and_extract() -> None:
    assert sequences(CLASSES, example("7 8 9")) == ((S, 7, 8, 9, E),)


def test_a_pair_keeps_its_order_around_the_delimiter() -> None:
    assert sequences(PAIRS, example("7 8", "9")) == ((S, 7, 8, D, 9, E),)


def test_similar_texts_stand_in_both_orders() -> None:
    assert sequences(SIMILAR, example("7 8", "9", target=2.5)) == ((S, 7, 8, D, 9, E), (S, 9, D, 7, 8, E))


def test_each_choice_follows_the_context_and_the_question() -> None:
    item = example("1 2 3", "4 5", choices=("6", "7 8", "9"))
    assert sequences(CHOICES, item) == (
        (S, 1, 2, 3, 4, 5, D, 6, E),
        (S, 1, 2, 3, 4, 5, D, 7, 8, E),
        (S, 1, 2, 3, 4, 5, D, 9, E),
    )
    item = example("1 2 3", choices=("6", "7 8", "9"))
    assert sequences(CHOICES, item) == ((S, 1, 2, 3, D, 6, E), (S, 1, 2, 3, D, 7, 8, E), (S, 1, 2, 3, D, 9, E))


def test_each_side_of_a_delimiter_keeps_its_first_half_context_less_two() -> None:
    # n_ctx // 2 - 2 = 3, as max_len of OpenAI's code: even a short side leaves the other no more
    item = example("1 2 3 4 5", "6 7 8 9")
    assert sequences(PAIRS, item, context=10) == ((S, 1, 2, 3, D, 6, 7, 8, E),)
    assert sequences(PAIRS, item, context=11) == ((S, 1, 2, 3, D, 6, 7, 8, E),)
    assert sequences(PAIRS, item, context=12) == ((S, 1, 2, 3, 4, D, 6, 7, 8, 9, E),)
    assert sequences(SIMILAR, example("1 2 3 4 5", "6"), context=10) == ((S, 1, 2, 3, D, 6, E), (S, 6, D, 1, 2, 3, E))


def test_a_single_text_has_the_whole_context() -> None:
    assert sequences(CLASSES, example("1 2 3 4 5 6"), context=6) == ((S, 1, 2, 3, 4, E),)


def test_a_long_context_makes_room_for_the_question() -> None:
    item = example("1 2 3 4 5", "6 7", choices=("8", "9 10 11 12", "13"))
    assert sequences(CHOICES, item, context=10)[1] == (S, 1, 6, 7, D, 9, 10, 11, E)
    item = example("1 2", "3 4 5 6", choices=("8", "9", "13"))
    assert sequences(CHOICES, item, context=10)[0] == (S, 3, 4, 5, D, 8, E)


@pytest.mark.parametrize(
    ("task", "item", "tokens"),
    [
        (CLASSES, example("1 2 3 4 5 6 7 8 9"), 9),
        (PAIRS, example("1", "2 3 4 5"), 4),
        (SIMILAR, example("1 2 3 4 5", "2"), 5),
        (CHOICES, example("1", choices=("1", "2", "3 4 5 6")), 4),
    ],
)
def test_what_is_too_long_is_refused_where_that_is_asked_for(task: Task, item: Example, tokens: int) -> None:
    limit = 8 if task is CLASSES else 3
    with pytest.raises(UserError, match=rf"data.tsv:7: {tokens} tokens, where model.context \(10\) leaves {limit}"):
        sequences(task, item, context=10, too_long="refuse")
    assert all(len(sequence) <= 10 for sequence in sequences(task, item, context=10))


def test_what_just_fits_is_not_refused() -> None:
    assert sequences(CLASSES, example("1 2 3"), context=5, too_long="refuse") == ((S, 1, 2, 3, E),)
    assert sequences(PAIRS, example("1 2 3", "4 5 6"), context=10, too_long="refuse") == ((S, 1, 2, 3, D, 4, 5, 6, E),)


def test_a_text_without_tokens_is_refused_with_its_row() -> None:
    with pytest.raises(UserError, match=r"data\.tsv:7: a text gives no tokens"):
        sequences(PAIRS, example("1", "words"))


@pytest.mark.parametrize(("task", "smallest"), [(CLASSES, 3), (PAIRS, 6), (SIMILAR, 6), (CHOICES, 6)])
def test_a_context_without_room_for_a_token_of_each_part_is_refused(task: Task, smallest: int) -> None:
    item = example(*["1"] * (1 if task in (CLASSES, CHOICES) else 2), choices=("2", "3", "4")[: task.choices])
    assert len(sequences(task, item, context=smallest)) == task.sequences
    with pytest.raises(UserError, match=f"model.context is {smallest - 1}; kind {task.kind} needs {smallest}"):
        sequences(task, item, context=smallest - 1)


@pytest.mark.parametrize("special", [(99, 101, 102), (100, 100, 102)])
def test_special_tokens_that_are_tokens_of_texts_or_of_each_other_are_refused(special: tuple[int, int, int]) -> None:
    with pytest.raises(UserError, match="three different ids, each at least 100"):
        encode_examples([example("1")], CLASSES, Numbers(), SpecialTokens(*special), 32)


def test_a_batch_pads_after_the_extract_token_and_knows_what_follows_each_token() -> None:
    items = [example("7 8 9", target=0), example("5", target=1)]
    encoded = encode_examples(items, CLASSES, Numbers(), SpecialTokens(S, D, E), 32)
    batch = collate(encoded, CLASSES)
    assert batch.tokens.tolist() == [[[S, 7, 8, 9, E]], [[S, 5, E, 0, 0]]]
    assert batch.following.tolist() == [[[7, 8, 9, E, -100]], [[5, E, -100, -100, -100]]]
    assert batch.extract.tolist() == [[4], [2]]
    assert batch.targets is not None
    assert (batch.targets.tolist(), batch.targets.dtype) == ([0, 1], np.int64)
    assert {batch.tokens.dtype, batch.following.dtype, batch.extract.dtype} == {np.dtype(np.int64)}


def test_delimiters_are_predicted_as_any_real_token_and_both_orders_are_there() -> None:
    encoded = encode_examples([example("7", "8 9", target=2.5)], SIMILAR, Numbers(), SpecialTokens(S, D, E), 32)
    batch = collate(encoded, SIMILAR, length=8)
    assert batch.tokens.tolist() == [[[S, 7, D, 8, 9, E, 0, 0], [S, 8, 9, D, 7, E, 0, 0]]]
    assert batch.following.tolist() == [[[7, D, 8, 9, E, -100, -100, -100], [8, 9, D, 7, E, -100, -100, -100]]]
    assert batch.extract.tolist() == [[5, 5]]
    assert batch.targets is not None
    assert (batch.targets.tolist(), batch.targets.dtype) == ([2.5], np.float32)


def test_choices_of_different_lengths_share_a_batch() -> None:
    items = [example("1", choices=("2", "3 4", "5"), target=2), example("1 2 3", choices=("6", "7", "8"), target=0)]
    batch = collate(encode_examples(items, CHOICES, Numbers(), SpecialTokens(S, D, E), 32), CHOICES)
    assert batch.tokens.shape == (2, 3, 7)
    assert batch.extract.tolist() == [[4, 5, 4], [6, 6, 6]]
    assert np.take_along_axis(batch.tokens, batch.extract[..., None], -1).tolist() == [[[E]] * 3] * 2
    assert np.count_nonzero(batch.following != -100) == batch.extract.sum()


def test_data_to_predict_make_a_batch_without_targets() -> None:
    encoded = encode_examples([example("1", target=None)], CLASSES, Numbers(), SpecialTokens(S, D, E), 32)
    assert collate(encoded, CLASSES).targets is None


def test_a_batch_shorter_than_its_sequences_is_refused() -> None:
    encoded = encode_examples([example("1 2 3")], CLASSES, Numbers(), SpecialTokens(S, D, E), 32)
    with pytest.raises(ValueError, match="length is 4; the longest sequence has 5 tokens"):
        collate(encoded, CLASSES, length=4)
