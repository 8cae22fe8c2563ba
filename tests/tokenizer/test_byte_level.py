import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgpt.errors import UserError
from fastgpt.tokenizer import END_OF_TEXT, Tokenizer, load_tokenizer, train_tokenizer
from fastgpt.tokenizer.byte_level import SEGMENT_CHARACTERS, ByteLevelBPE, byte_characters, segments

TEXTS = [
    "It's the cat's; they'll see we've 1234 cats.\n\nAnd   more\tspace \n",
    "나는 학교에 간다. 오늘 날씨가 좋다. naïve café Ünïcode 😀👩‍👩‍👧 \u00a0\u2028\u0085 x",
    "def f(x):\r\n    return x  # tabs\t\there\r\n",
] * 3


@pytest.fixture(scope="module")
def small() -> Tokenizer:
    return train_tokenizer(iter(TEXTS), 400)


@pytest.fixture(scope="module")
def gpt2(real_data: Path) -> Tokenizer:
    return load_tokenizer(real_data / "tokenizers" / "gpt2")


def test_every_byte_has_its_own_printable_character() -> None:
    characters = byte_characters()
    assert sorted(characters.values()) == list(range(256))
    assert characters["A"] == 65 and characters["Ġ"] == 32 and characters["Ċ"] == 10
    assert all(len(character) == 1 and not character.isspace() for character in characters)


@settings(max_examples=300, deadline=None)
@given(text=st.text())
def test_any_text_comes_back_byte_for_byte(small: Tokenizer, text: str) -> None:
    ids = small.encode(text)
    assert small.decode_bytes(ids) == text.encode()
    assert small.decode(ids) == text
    assert all(0 <= index < small.vocab_size and index != small.end_of_text for index in ids)


@settings(max_examples=100, deadline=None)
@given(texts=st.lists(st.text(alphabet="ab \n'<|endoftext|>é\r1한"), max_size=4))
def test_a_batch_is_its_texts_one_by_one(small: Tokenizer, texts: list[str]) -> None:
    assert small.encode_batch(texts) == [small.encode(text) for text in texts]


@pytest.mark.parametrize("text", [END_OF_TEXT, f"a{END_OF_TEXT}b", END_OF_TEXT * 3, f" {END_OF_TEXT}\n"])
def test_the_special_token_cannot_be_smuggled_in_as_text(small: Tokenizer, text: str) -> None:
    ids = small.encode(text)
    assert small.end_of_text not in ids
    assert small.decode(ids) == text


def test_decoding_leaves_the_special_token_out(small: Tokenizer) -> None:
    ids = [small.end_of_text, *small.encode("one"), small.end_of_text, *small.encode(" two")]
    assert small.decode_bytes(ids) == b"one two"


def test_half_a_character_decodes_to_its_bytes_and_to_the_replacement_character(small: Tokenizer) -> None:
    half = small.encode("\U0001f9ff")[:-1]
    assert "\U0001f9ff".encode().startswith(small.decode_bytes(half))
    assert small.decode(half).endswith("\ufffd")


def test_an_id_past_the_vocabulary_decodes_to_the_replacement_character(small: Tokenizer) -> None:
    assert small.decode([*small.encode("a"), small.vocab_size, small.vocab_size + 50, -1]) == "a\ufffd\ufffd\ufffd"


def test_half_a_surrogate_pair_is_refused_with_its_place(small: Tokenizer) -> None:
    with pytest.raises(UserError, match=r"surrogate.*at character 3"):
        small.encode("abc\ud800")


@settings(max_examples=200, deadline=None)
@given(text=st.text(alphabet="a b\n.'é한\t\u00a0\r0"))
def test_long_texts_are_cut_where_the_tokens_do_not_change(small: Tokenizer, text: str) -> None:
    assert isinstance(small, ByteLevelBPE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastgpt.tokenizer.byte_level.SEGMENT_CHARACTERS", 1)
        assert small.encode(text) == small._library.encode(text).ids


def test_a_long_text_is_encoded_in_segments_with_the_same_tokens(small: Tokenizer) -> None:
    text = "".join(TEXTS) * 700
    parts = list(segments(text))
    assert len(parts) > 2 and "".join(parts) == text
    assert all(len(part) < 2 * SEGMENT_CHARACTERS for part in parts)
    assert isinstance(small, ByteLevelBPE)
    assert small.encode(text) == small._library.encode(text).ids


def test_a_long_text_without_a_space_is_still_encoded(small: Tokenizer) -> None:
    text = "가" * (SEGMENT_CHARACTERS + 7)
    assert small.decode(small.encode(text)) == text


def test_encoding_is_that_of_transformers_with_the_files_of_gpt2(gpt2: Tokenizer, real_data: Path) -> None:
    from transformers import GPT2Tokenizer

    folder = real_data / "tokenizers" / "gpt2"
    peer = GPT2Tokenizer(vocab=str(folder / "encoder.json"), merges=str(folder / "vocab.bpe"))
    assert (gpt2.vocab_size, gpt2.end_of_text) == (50257, 50256)
    names = ["lm/wikitext-2/valid.txt", "lm/tinyshakespeare/input.txt", "korean/nsmc/ratings_test.txt"]
    for name in names:
        text = (real_data / name).read_text(encoding="utf-8")[:100_000]
        assert gpt2.encode(text) == peer(text)["input_ids"]
    assert gpt2.encode("Hello world") == [15496, 995]


def test_the_fingerprint_is_the_same_for_the_same_tokenizer_and_no_other(small: Tokenizer, tmp_path: Path) -> None:
    small.save(tmp_path)
    code = "import sys; from fastgpt.tokenizer import load_tokenizer; print(load_tokenizer(sys.argv[1]).fingerprint())"
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == small.fingerprint()
    assert re.fullmatch("[0-9a-f]{64}", small.fingerprint())
    assert train_tokenizer(iter(TEXTS), 290).fingerprint() != small.fingerprint()
    model = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    swapped = [tuple(merge) for merge in [model["merges"][1], model["merges"][0], *model["merges"][2:]]]
    assert ByteLevelBPE(model["vocab"], swapped).fingerprint() != small.fingerprint()
