"""Reading a tokenizer from the sets of files that it comes in: byte-level BPE, or GPT-1's."""

import json
from os import PathLike
from pathlib import Path
from typing import Any

from fastgpt.errors import UserError
from fastgpt.tokenizer.base import END_OF_TEXT, Tokenizer
from fastgpt.tokenizer.byte_level import ByteLevelBPE
from fastgpt.tokenizer.gpt1 import END_OF_WORD, GPT1BPE, UNKNOWN, is_gpt1

# (vocabulary, merges): as OpenAI published GPT-1 and GPT-2, and as transformers renamed them
PAIRS = (
    ("encoder_bpe_40000.json", "vocab_40000.bpe"),
    ("encoder.json", "vocab.bpe"),
    ("vocab.json", "merges.txt"),
)


def load_tokenizer(folder: str | PathLike[str]) -> Tokenizer:
    """A tokenizer that is ready to encode; its files as for `read_tokenizer`.

    Raises UserError as `read_tokenizer`, and where GPT-1's lacks the packages of the extra `gpt1`.
    """
    tokenizer = read_tokenizer(folder)
    if isinstance(tokenizer, GPT1BPE):
        tokenizer.require()
    return tokenizer


def read_tokenizer(folder: str | PathLike[str]) -> Tokenizer:
    """Read tokenizer.json, or a vocabulary with its merges by OpenAI's names for GPT-1 or GPT-2, or by transformers'.

    The vocabulary tells GPT-1's tokenizer, of words, from GPT-2's, of bytes.
    Raises UserError where the folder has none of these files, or they are neither of the two.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: not a folder; a tokenizer is a folder with tokenizer.json or GPT-2's files")
    if (folder / "tokenizer.json").is_file():
        return read_tokenizer_json(folder / "tokenizer.json")
    for vocab, merges in PAIRS:
        if (folder / vocab).is_file() and (folder / merges).is_file():
            return read_pair(folder / vocab, folder / merges)
    accepted = ", or ".join(["tokenizer.json", *(f"{vocab} and {merges}" for vocab, merges in PAIRS)])
    raise UserError(f"{folder}: no tokenizer files; needed: {accepted}")


def read_pair(vocab_path: Path, merges_path: Path) -> Tokenizer:
    """A vocabulary (JSON, token to id) and its merges (two tokens a line, an optional #version line first)."""
    lines = read_text(merges_path).split("\n")
    first = 1 if lines[0].startswith("#version") else 0
    merges: list[tuple[str, str]] = []
    for number, line in enumerate(lines[first:], first + 1):
        tokens = line.rstrip("\r").split(" ")
        if tokens == [""]:
            continue
        if len(tokens) != 2:
            raise UserError(f"{merges_path}:{number}: a merge is two tokens with a space between, got {line[:80]!r}")
        merges.append((tokens[0], tokens[1]))
    vocab = as_vocab(read_json(vocab_path), vocab_path)
    kind = GPT1BPE if is_gpt1(vocab) else ByteLevelBPE
    return kind(vocab, merges, str(vocab_path))


def read_tokenizer_json(path: Path) -> Tokenizer:
    """The tokenizers library's one-file format, where it holds GPT-1's BPE, or GPT-2's kind of byte-level BPE."""
    content = read_json(path)
    model = content.get("model")
    splitting = content.get("pre_tokenizer")
    if not isinstance(model, dict) or model.get("type") != "BPE":
        raise UserError(f"{path}: model.type must be BPE")
    if model.get("end_of_word_suffix") == END_OF_WORD and model.get("unk_token") == UNKNOWN:
        # GPT-1's as transformers keeps it. It cuts words by other rules, of BERT, which are not GPT-1's own.
        return GPT1BPE(as_vocab(model.get("vocab"), path), as_merges(model.get("merges"), path), str(path))
    if content.get("normalizer") is not None:
        raise UserError(f"{path}: a normalizer changes the text; a GPT-2 tokenizer has none")
    if not isinstance(splitting, dict) or (
        (splitting.get("type"), splitting.get("add_prefix_space"), splitting.get("use_regex", True))
        != ("ByteLevel", False, True)
    ):
        raise UserError(f"{path}: pre_tokenizer must be ByteLevel without add_prefix_space and with use_regex")
    for option in ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges"):
        if model.get(option):
            raise UserError(f"{path}: model.{option} is not supported; a GPT-2 tokenizer has none")
    vocab = as_vocab(model.get("vocab"), path)
    for token in content.get("added_tokens") or []:
        if not isinstance(token, dict) or token.get("content") != END_OF_TEXT or not isinstance(token.get("id"), int):
            raise UserError(f"{path}: added_tokens may hold {END_OF_TEXT} and nothing else, got {token!r:.120}")
        vocab[END_OF_TEXT] = token["id"]
    return ByteLevelBPE(vocab, as_merges(model.get("merges"), path), str(path))


def as_vocab(value: Any, path: Path) -> dict[str, int]:
    """A token-to-id mapping, checked."""
    if not isinstance(value, dict) or not all(type(index) is int for index in value.values()):
        raise UserError(f"{path}: the vocabulary must be an object that gives each token an integer id")
    return dict(value)


def as_merges(value: Any, path: Path) -> list[tuple[str, str]]:
    """A merge list of pairs, or, as older files have it, of strings with one space."""
    if not isinstance(value, list):
        raise UserError(f"{path}: model.merges must be a list")
    merges: list[tuple[str, str]] = []
    for number, merge in enumerate(value, 1):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(token, str) for token in pair):
            raise UserError(f"{path}: merge {number} of model.merges must be two tokens, got {merge!r:.80}")
        merges.append((pair[0], pair[1]))
    return merges


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file."""
    try:
        content = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: not JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: must hold a JSON object, got {type(content).__name__}")
    return content


def read_text(path: Path) -> str:
    """A UTF-8 file, whole; no line end is translated."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text: byte {error.object[error.start]:#04x} at {error.start}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
