import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastgpt.errors import UserError
from fastgpt.tokenizer import END_OF_TEXT, MINIMUM_VOCAB_SIZE, train_tokenizer

TEXT = Path(__file__).read_text(encoding="utf-8")


@pytest.mark.parametrize("vocab_size", [MINIMUM_VOCAB_SIZE, 258, 300, 500])
def test_a_trained_tokenizer_has_the_entries_asked_for(vocab_size: int) -> None:
    assert train_tokenizer(iter([TEXT] * 2), vocab_size).vocab_size == vocab_size


@pytest.mark.parametrize("texts", [[], ["a"], ["ab", "cd"], [END_OF_TEXT * 5], [" \n"]])
def test_little_text_gives_fewer_entries_never_more(texts: list[str]) -> None:
    tokenizer = train_tokenizer(iter(texts), 1000)
    assert MINIMUM_VOCAB_SIZE <= tokenizer.vocab_size <= 1000
    assert tokenizer.decode(tokenizer.encode("any text at all, 한국어")) == "any text at all, 한국어"


def test_a_vocabulary_without_room_for_every_byte_is_refused() -> None:
    with pytest.raises(UserError, match=r"at least 257 entries.*vocab_size is 256"):
        train_tokenizer(iter([TEXT]), 256)


def test_training_learns_what_occurs_often() -> None:
    tokenizer = train_tokenizer(iter(["lorem ipsum lorem ipsum"] * 9), 300)
    assert len(tokenizer.encode(" lorem ipsum")) == 2


def test_the_same_texts_give_the_same_tokenizer_in_another_process() -> None:
    code = (
        "import pathlib, sys; from fastgpt.tokenizer import train_tokenizer\n"
        "text = pathlib.Path(sys.argv[1]).read_text(encoding='utf-8')\n"
        "print(train_tokenizer(iter([text]), 600).fingerprint())"
    )
    result = subprocess.run([sys.executable, "-c", code, __file__], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == train_tokenizer(iter([TEXT]), 600).fingerprint()


def test_an_error_of_the_text_reaches_the_caller() -> None:
    def texts() -> Iterator[str]:
        yield TEXT
        raise UserError("bad text")

    with pytest.raises(UserError, match="bad text"):
        train_tokenizer(texts(), 300)
    with pytest.raises(UserError, match="surrogate"):
        train_tokenizer(iter(["a\udfff"]), 300)
