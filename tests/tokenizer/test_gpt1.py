"""GPT-1's text form, on what was worked out by hand, on an oracle, and on the ids of transformers 4."""

import json
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from fastgpt.errors import UserError
from fastgpt.tokenizer import Tokenizer, load_tokenizer
from fastgpt.tokenizer.files import read_tokenizer
from fastgpt.tokenizer.gpt1 import GPT1BPE, join, standardize

ALPHABET = "abcdehlnost.,'-\""
MERGES = [("h", "e</w>"), ("t", "he</w>"), ("c", "a"), ("ca", "t</w>"), ("n", "'"), ("n'", "t</w>"), ("l", "l")]
SAMPLE = "Mr. Darcy couldn't stay—she'd gone… \"Really?!\"\n\n  He paid $5.20 (in the U.S.A.)."


@pytest.fixture(scope="module")
def extras() -> None:
    for package in ("ftfy", "spacy"):
        pytest.importorskip(package, reason=f"{package} is not installed; it is of the extra gpt1")


@pytest.fixture(scope="module")
def small() -> GPT1BPE:
    tokens = ["<unk>", *ALPHABET, *(f"{letter}</w>" for letter in ALPHABET)]
    tokens += ["".join(merge) for merge in MERGES] + ["\n</w>"]
    return GPT1BPE({token: index for index, token in enumerate(tokens)}, MERGES)


@pytest.fixture(scope="module")
def published(real_data: Path, extras: None) -> Tokenizer:
    return load_tokenizer(real_data / "tokenizers" / "gpt1")


def tokens(tokenizer: GPT1BPE, text: str) -> list[str]:
    known = {index: token for token, index in tokenizer.vocab.items()}
    return [known[index] for index in tokenizer.encode(text)]


@pytest.mark.parametrize(
    ("text", "standard"),
    [
        ("one—two–three―four", "one - two - three - four"),
        ("wait… now", "wait... now"),
        ("it´s", "it's"),
        ("no!!! why?!", "no !!! why ? !"),
        ("a--b", "a -- b"),
        ('"so," he said;', '" so , " he said ;'),
        ("(a) [b] {c} d/e f_g h|i j*k l~m n+o", "( a ) [ b ] { c } d / e f _ g h | i j * k l ~ m n + o"),
        ("a\\b", "a\\b"),  # OpenAI's pattern leaves the backslash alone, that of transformers does not
        (" one \t two \n\n\r\n  three\xa0four ", "one two \n three four"),
        ("3.14 a.b c:d", "3.14 a.b c:d"),
    ],
)
def test_punctuation_is_set_apart_and_white_space_made_even(text: str, standard: str) -> None:
    assert standardize(text) == standard


def test_words_are_merged_in_the_order_of_the_merges(extras: None, small: GPT1BPE) -> None:
    assert tokens(small, "The cat") == ["the</w>", "cat</w>"]
    assert tokens(small, "he has cats") == ["he</w>", "h", "a", "s</w>", "ca", "t", "s</w>"]
    assert tokens(small, "all") == ["a", "l", "l</w>"]  # "ll" is merged within a word, "ll</w>" is not


def test_contractions_are_cut_as_spacy_cuts_them(extras: None, small: GPT1BPE) -> None:
    assert tokens(small, "the cats don't") == ["the</w>", "ca", "t", "s</w>", "d", "o</w>", "n't</w>"]


def test_a_line_end_is_a_token_and_a_character_that_is_not_known_is_unk(extras: None, small: GPT1BPE) -> None:
    assert tokens(small, "the\n\n  cat") == ["the</w>", "\n</w>", "cat</w>"]
    assert tokens(small, "cat x <unk>") == ["cat</w>", "<unk>", "<unk>", "<unk>", "n", "<unk>", "<unk>"]


def test_text_that_was_wrongly_decoded_is_repaired(extras: None, published: GPT1BPE) -> None:
    assert published.encode("cafÃ©") == published.encode("café") == [13550]


def test_half_a_surrogate_pair_is_refused(extras: None, small: GPT1BPE) -> None:
    with pytest.raises(UserError, match=r"lone surrogate .* at character 4"):
        small.encode_batch(["the cat", "the \ud800"])


def test_nothing_gives_no_tokens(extras: None, small: GPT1BPE) -> None:
    assert small.encode("") == small.encode(" \n ") == []
    assert small.encode_batch([]) == []


def test_decoding_gives_the_words_with_a_space_after_each(extras: None, small: GPT1BPE) -> None:
    ids = small.encode("The CAT\nall")
    assert small.decode(ids) == "the cat \nall "
    assert small.decode_bytes(ids) == b"the cat \nall "
    assert b"".join(small.decode_bytes([index]) for index in ids) == small.decode_bytes(ids)
    assert small.decode([small.end_of_text, *ids]) == small.decode(ids)
    assert small.decode([small.vocab_size, -1]) == "\ufffd\ufffd"
    assert small.encode(small.decode(ids)) == ids


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        # by OpenAIGPTTokenizer._tokenize of transformers 4.57.6, with ftfy 6.3.1 and spaCy 3.8
        (
            SAMPLE,
            """1682 10009 635 538 1558 260 520 656 1374 749 244 976 257 267 244 40477 487 3392 289 33468 7379 276 500
            481 25896 14 10311 275 239""",
        ),
        ("cafe\u0301 \u65e5 na\u00efve   \t x", "13550 0 24213 272"),
    ],
)
def test_the_published_tokenizer_gives_the_ids_of_transformers(published: Tokenizer, text: str, ids: str) -> None:
    assert published.encode(text) == [int(index) for index in ids.split()]


def test_the_published_tokenizer_has_the_papers_size(published: Tokenizer) -> None:
    assert isinstance(published, GPT1BPE)
    assert (published.vocab_size, len(published.merges), published.end_of_text) == (40478, 40000, 0)
    assert published.vocab["\n</w>"] == 40477


def test_a_sample_of_novels_is_encoded_as_by_a_plain_oracle(real_data: Path, published: GPT1BPE) -> None:
    import ftfy
    from spacy.lang.en import English

    words = English().tokenizer
    merges = [f"{left} {right}" for left, right in published.merges]
    oracle = cache(lambda word: merged(word, merges))
    for path in sorted((real_data / "lm" / "novels").glob("*.txt"))[::30]:
        text = path.read_text(encoding="utf-8-sig")[50_000:51_500]
        expected = []
        for word in words(standardize(ftfy.fix_text(text))):
            expected += [published.vocab.get(part, 0) for part in oracle(word.text.lower())]
        assert published.encode(text) == expected


def merged(word: str, merges: list[str]) -> list[str]:
    """The parts of a word by trying every merge in turn, as Sennrich et al. 2016 learn them: slow, and plain."""
    text = " ".join([*word[:-1], word[-1] + "</w>"]) if word.strip(" ") != "\n" else "\n</w>"
    for pair in merges:
        if pair in text:
            text = re.sub(rf"(?<!\S){re.escape(pair)}(?!\S)", pair.replace(" ", ""), text)
    return text.split(" ")


def test_a_pair_is_joined_from_the_left_wherever_it_stands() -> None:
    assert join(["a", "a", "a", "b", "a", "a"], ("a", "a")) == ["aa", "a", "b", "aa"]
    assert join(["a"], ("a", "a")) == ["a"]


@pytest.mark.parametrize(
    "names",
    [("encoder_bpe_40000.json", "vocab_40000.bpe"), ("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt")],
)
def test_the_vocabulary_tells_gpt1s_files_under_any_of_their_names(
    tmp_path: Path, small: GPT1BPE, names: tuple[str, str]
) -> None:
    small.save(tmp_path)
    for written, name in zip(("vocab.json", "merges.txt"), names, strict=True):
        (tmp_path / written).rename(tmp_path / name)
    read = read_tokenizer(tmp_path)
    assert isinstance(read, GPT1BPE)
    assert (read.vocab, read.merges, read.fingerprint()) == (small.vocab, small.merges, small.fingerprint())


def test_the_one_file_of_transformers_is_read_as_gpt1s(tmp_path: Path, small: GPT1BPE) -> None:
    from transformers import OpenAIGPTTokenizer

    small.save(tmp_path)
    theirs = OpenAIGPTTokenizer(vocab=str(tmp_path / "vocab.json"), merges=str(tmp_path / "merges.txt"))
    theirs.save_pretrained(tmp_path / "theirs")
    read = read_tokenizer(tmp_path / "theirs")
    assert isinstance(read, GPT1BPE)
    assert (read.vocab, read.merges) == (small.vocab, small.merges)


def test_another_vocabulary_or_another_form_has_another_fingerprint(small: GPT1BPE) -> None:
    other = GPT1BPE(small.vocab, small.merges[:-1])
    assert other.fingerprint() != small.fingerprint()
    assert len(small.fingerprint()) == 64


@pytest.mark.parametrize("package", ["ftfy", "spacy"])
def test_a_missing_package_is_told_with_the_extra_that_brings_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: GPT1BPE, package: str
) -> None:
    small.save(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    message = rf"GPT-1's tokenizer needs {package}.*pip install 'fastgpt\[gpt1\]'"
    with pytest.raises(UserError, match=message) as raised:
        load_tokenizer(tmp_path)
    assert "\n" not in str(raised.value)
    unready = read_tokenizer(tmp_path)
    assert unready.decode([1, 2, small.vocab["e</w>"]]) == "abe "
    with pytest.raises(UserError, match=message):
        unready.encode("the cat")


def test_a_vocabulary_that_does_not_fit_is_refused(small: GPT1BPE) -> None:
    with pytest.raises(UserError, match="files: the vocabulary has no <unk>"):
        GPT1BPE({"a</w>": 0}, [], "files")
    with pytest.raises(UserError, match="ids must be 0 to 1, each once"):
        GPT1BPE({"<unk>": 0, "a</w>": 2}, [])
    with pytest.raises(UserError, match=r"merge 8 \('b' 'b'\) needs 'bb'"):
        GPT1BPE(small.vocab, [*MERGES, ("b", "b")])


def test_text_is_prepared_with_gpt1s_tokenizer(tmp_path: Path, extras: None, small: GPT1BPE) -> None:
    from fastgpt.data.prepare import prepare
    from fastgpt.data.shards import TokenShards

    small.save(tmp_path / "tokenizer")
    (tmp_path / "text.jsonl").write_text(
        "".join(json.dumps({"text": f"the cat, {'a' * n}"}) + "\n" for n in range(1, 30))
    )
    prepare(
        tmp_path / "text.jsonl",
        tmp_path / "shards",
        tokenizer=tmp_path / "tokenizer",
        vocab_size=small.vocab_size,
        validation_fraction=0.3,
        workers=1,
    )
    shards = TokenShards.open(tmp_path / "shards", "train")
    ids = shards.slice(0, 4).tolist()
    assert ids == [small.end_of_text, *(small.vocab[token] for token in ("the</w>", "cat</w>", ",</w>"))]


THEIRS = """
import sys
from pathlib import Path
import numpy as np
from transformers.models.openai.tokenization_openai import OpenAIGPTTokenizer
folder, novels, out = map(Path, sys.argv[1:])
theirs = OpenAIGPTTokenizer(str(folder / "encoder_bpe_40000.json"), str(folder / "vocab_40000.bpe"))
assert theirs.fix_text is not None, "without ftfy and spaCy"
ids = {}
for number, path in enumerate(sorted(novels.glob("*.txt"))):
    text = path.read_text(encoding="utf-8-sig")
    ids[path.name] = np.array(theirs.convert_tokens_to_ids(theirs._tokenize(text)), np.int32)
    if number < 3:
        ids["lower " + path.name] = np.array(theirs.convert_tokens_to_ids(theirs.tokenize(text)), np.int32)
np.savez(out, **ids)
"""


@pytest.mark.slow
def test_all_novels_are_encoded_as_by_transformers_4(
    real_data: Path, published: Tokenizer, tmp_path: Path, environment: dict[str, str]
) -> None:
    """The last version whose tokenizer is OpenAI's is 4; from 5 on it cuts words by BERT's rules.

    Its `_tokenize` is OpenAI's algorithm. Its `tokenize` first writes the text in lower case, which OpenAI's code does
    only after spaCy: there "Mr." is the token `mr.</w>`, here it is `mr</w>` and `.</w>`.
    """
    packages = ["transformers==4.57.6", "huggingface-hub<1.0", "tokenizers<0.23"]
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path / "packages")]
    installed = subprocess.run([*install, *packages], capture_output=True, text=True)
    if installed.returncode:
        pytest.skip(f"transformers 4 cannot be installed: {installed.stderr.strip().splitlines()[-1]}")
    novels = real_data / "lm" / "novels"
    path = f"{tmp_path / 'packages'}:{environment['PYTHONPATH']}"
    subprocess.run(
        [sys.executable, "-c", THEIRS, real_data / "tokenizers" / "gpt1", novels, tmp_path / "ids.npz"],
        env=environment | {"PYTHONPATH": path},
        check=True,
    )
    with np.load(tmp_path / "ids.npz") as theirs:
        assert len(theirs.files) > 80
        for name in theirs.files:
            text = (novels / name.removeprefix("lower ")).read_text(encoding="utf-8-sig")
            ids = published.encode(text.lower() if name.startswith("lower ") else text)
            assert np.array_equal(ids, theirs[name]), name
