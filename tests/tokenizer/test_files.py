import json
from pathlib import Path
from typing import Any

import pytest

from fastgpt.errors import UserError
from fastgpt.tokenizer import Tokenizer, load_tokenizer, train_tokenizer

TEXT = "the cat sat on the mat; the cat's hat 한국어 한국어\r\n" * 4


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return train_tokenizer(iter([TEXT]), 300)


def saved(tokenizer: Tokenizer, folder: Path) -> dict[str, Any]:
    tokenizer.save(folder)
    return json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def save_pair(
    tokenizer: Tokenizer, folder: Path, vocab_name: str, merges_name: str, first: str = "#version: 0.2\n"
) -> None:
    model = saved(tokenizer, folder / "saved")["model"]
    (folder / vocab_name).write_text(json.dumps(model["vocab"]), encoding="utf-8")
    merges = "".join(f"{left} {right}\n" for left, right in model["merges"])
    (folder / merges_name).write_text(first + merges, encoding="utf-8")


def test_a_saved_tokenizer_is_read_back_the_same(trained: Tokenizer, tmp_path: Path) -> None:
    trained.save(tmp_path / "new" / "folder")
    loaded = load_tokenizer(tmp_path / "new" / "folder")
    assert loaded.fingerprint() == trained.fingerprint()
    assert (loaded.vocab_size, loaded.end_of_text) == (trained.vocab_size, trained.end_of_text)
    assert loaded.encode(TEXT) == trained.encode(TEXT)


@pytest.mark.parametrize("names", [("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt")])
@pytest.mark.parametrize("first", ["#version: 0.2\n", ""])
def test_the_two_forms_of_a_vocabulary_with_merges_are_read(
    trained: Tokenizer, tmp_path: Path, names: tuple[str, str], first: str
) -> None:
    save_pair(trained, tmp_path, *names, first=first)
    assert load_tokenizer(tmp_path).fingerprint() == trained.fingerprint()


def test_line_ends_of_windows_in_the_merges_do_no_harm(trained: Tokenizer, tmp_path: Path) -> None:
    save_pair(trained, tmp_path, "vocab.json", "merges.txt")
    merges = tmp_path / "merges.txt"
    merges.write_bytes(merges.read_bytes().replace(b"\n", b"\r\n"))
    assert load_tokenizer(tmp_path).fingerprint() == trained.fingerprint()


def test_merges_as_strings_in_an_older_tokenizer_json_are_read(trained: Tokenizer, tmp_path: Path) -> None:
    content = saved(trained, tmp_path)
    content["model"]["merges"] = [" ".join(merge) for merge in content["model"]["merges"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    assert load_tokenizer(tmp_path).fingerprint() == trained.fingerprint()


def test_transformers_reads_a_saved_tokenizer(trained: Tokenizer, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    trained.save(tmp_path)
    for peer in (AutoTokenizer.from_pretrained(tmp_path), PreTrainedTokenizerFast.from_pretrained(tmp_path)):
        assert peer(TEXT)["input_ids"] == trained.encode(TEXT)
        assert peer.decode(trained.encode(TEXT)) == TEXT
        assert (peer.eos_token_id, len(peer)) == (trained.end_of_text, trained.vocab_size)


def test_a_tokenizer_that_transformers_saved_is_read(trained: Tokenizer, tmp_path: Path) -> None:
    from transformers import GPT2Tokenizer

    save_pair(trained, tmp_path, "vocab.json", "merges.txt")
    peer = GPT2Tokenizer(vocab=str(tmp_path / "vocab.json"), merges=str(tmp_path / "merges.txt"))
    peer.save_pretrained(tmp_path / "theirs")
    assert (tmp_path / "theirs" / "tokenizer.json").is_file()
    assert load_tokenizer(tmp_path / "theirs").fingerprint() == trained.fingerprint()


def test_a_folder_without_tokenizer_files_is_refused_with_a_list_of_them(tmp_path: Path) -> None:
    accepted = "encoder_bpe_40000.json and vocab_40000.bpe, or encoder.json and vocab.bpe, or vocab.json and merges.txt"
    with pytest.raises(UserError, match=rf"needed: tokenizer.json, or {accepted}"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="not a folder"):
        load_tokenizer(tmp_path / "nowhere")


def change(content: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split("/")
    for parent in parents:
        content = content[parent]
    content[last] = value


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("model/type", "WordPiece", "model.type must be BPE"),
        ("model", None, "model.type must be BPE"),
        ("normalizer", {"type": "NFC"}, "normalizer"),
        ("pre_tokenizer", None, "pre_tokenizer must be ByteLevel"),
        ("pre_tokenizer/add_prefix_space", True, "pre_tokenizer must be ByteLevel without add_prefix_space"),
        ("pre_tokenizer/use_regex", False, "use_regex"),
        ("model/dropout", 0.1, "model.dropout is not supported"),
        ("model/ignore_merges", True, "model.ignore_merges is not supported"),
        ("model/vocab", [], "must be an object"),
        ("model/vocab/a", "1", "integer id"),
        ("model/vocab/a", True, "integer id"),
        ("model/vocab/a", 9999, r"ids must be 0 to \d+"),
        ("model/vocab/a", 5, r"ids must be 0 to \d+"),
        ("model/vocab/\u2028", 300, r"not written in byte characters"),
        ("model/merges", {}, "model.merges must be a list"),
        ("model/merges", ["a b c"], "merge 1 of model.merges must be two tokens"),
        ("model/merges", [["a", 1]], "merge 1 of model.merges must be two tokens"),
        ("model/merges", [["q", "z"]], r"merge 1 \('q' 'z'\) needs 'qz'"),
        (
            "added_tokens",
            [{"id": 300, "content": "<pad>"}],
            "may hold <|endoftext|> and nothing else".replace("|", r"\|"),
        ),
        ("added_tokens", [7], "added_tokens may hold"),
    ],
)
def test_a_damaged_or_foreign_tokenizer_json_is_refused_in_one_line(
    trained: Tokenizer, tmp_path: Path, path: str, value: Any, message: str
) -> None:
    content = saved(trained, tmp_path)
    if path == "model/vocab/\u2028":
        value = trained.vocab_size
    change(content, path, value)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UserError, match=message) as raised:
        load_tokenizer(tmp_path)
    assert "\n" not in str(raised.value) and "tokenizer.json" in str(raised.value)


def test_a_vocabulary_that_lacks_a_byte_is_refused_because_text_would_be_lost(tmp_path: Path) -> None:
    vocab = {"<|endoftext|>": 0, "a": 1}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    (tmp_path / "merges.txt").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match="255 of the 256 bytes have no token"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", "must hold a JSON object"),
        (b'{"a": "\xff"}', "not UTF-8 text: byte 0xff at 7"),
    ],
)
def test_a_file_that_is_not_json_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_tokenizer(tmp_path)


def test_a_merge_of_three_tokens_is_refused_with_its_line(trained: Tokenizer, tmp_path: Path) -> None:
    save_pair(trained, tmp_path, "vocab.json", "merges.txt", first="#version: 0.2\na b c\n")
    with pytest.raises(UserError, match=r"merges.txt:2: a merge is two tokens"):
        load_tokenizer(tmp_path)
