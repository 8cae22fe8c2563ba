"""GPT-2's byte-level BPE (Radford et al. 2019, section 2.2): every byte has a token, so any text can be encoded.

Text is split by GPT-2's pattern, each piece is written as UTF-8 bytes, each byte as one printable character, and the
characters are merged pair by pair in the order of the merge list. The `tokenizers` library does the work.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

from fastgpt.errors import UserError
from fastgpt.tokenizer.base import END_OF_TEXT

# The library needs some fifty bytes of memory for each character that it is given at once.
SEGMENT_CHARACTERS = 1 << 16
GROUP_CHARACTERS = 1 << 22

# In GPT-2's pattern white space comes first in a match or not at all: where white space begins, tokens may be cut.
CUT = re.compile(r"(?<=\S)[ \n]")

REPLACEMENT = "\N{REPLACEMENT CHARACTER}".encode()


def byte_characters() -> dict[str, int]:
    """The printable character that stands for each byte in GPT-2's files.

    Visible Latin-1 characters stand for themselves, and the other bytes, in order, for U+0100 and on.
    """
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


def segments(text: str) -> Iterator[str]:
    """Cut a long text where it cannot change the tokens; together the segments are the text."""
    start = 0
    while len(text) - start > SEGMENT_CHARACTERS and (cut := CUT.search(text, start + SEGMENT_CHARACTERS)):
        yield text[start : cut.start()]
        start = cut.start()
    yield text[start:]


def groups(texts: Sequence[str]) -> Iterator[list[tuple[int, str]]]:
    """The segments of all `texts`, each with the index of its text, in lists of bounded size."""
    group: list[tuple[int, str]] = []
    characters = 0
    for index, text in enumerate(texts):
        for segment in segments(text):
            group.append((index, segment))
            characters += len(segment)
            if characters >= GROUP_CHARACTERS:
                yield group
                group, characters = [], 0
    if group:
        yield group


class ByteLevelBPE:
    """A byte-level BPE given by its vocabulary and its merge list.

    `vocab` maps each token, written in byte characters, to its id, and `<|endoftext|>` to its own; `merges` are the
    pairs of tokens to join, the most urgent first. `where` names their origin in errors.
    Raises UserError where they do not make a lossless byte-level BPE.
    """

    def __init__(self, vocab: Mapping[str, int], merges: Sequence[tuple[str, str]], where: str = "tokenizer") -> None:
        check(vocab, merges, where)
        self.vocab = dict(vocab)
        self.merges = list(merges)
        self.end_of_text = self.vocab[END_OF_TEXT]
        bytes_of = byte_characters()
        self._bytes = [b""] * len(self.vocab)
        for token, index in self.vocab.items():
            if index != self.end_of_text:
                self._bytes[index] = bytes(bytes_of[character] for character in token)

    @property
    def vocab_size(self) -> int:
        """How many ids there are."""
        return len(self.vocab)

    def encode(self, text: str) -> list[int]:
        """The ids of `text`. What looks like the special token in it is encoded as plain text."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text; the library spreads the texts over the processor's cores.

        Raises UserError for a text that UTF-8 cannot hold (a lone surrogate).
        """
        ids: list[list[int]] = [[] for _ in texts]
        for group in groups(texts):
            try:
                encoded = self._library.encode_batch_fast([segment for _, segment in group], add_special_tokens=False)
            except TypeError:
                for text in texts:
                    refuse_surrogates(text)
                raise
            for (index, _), encoding in zip(group, encoded, strict=True):
                ids[index] += encoding.ids
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; bytes that are not UTF-8, as in a cut character, become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The exact bytes of `ids`, the special token left out.

        An id past the vocabulary, which a model with more rows than the tokenizer has can produce, becomes U+FFFD.
        """
        known = self._bytes
        return b"".join([known[index] if 0 <= index < len(known) else REPLACEMENT for index in ids])

    def save(self, folder: str | PathLike[str]) -> None:
        """Write tokenizer.json and tokenizer_config.json, which transformers' PreTrainedTokenizerFast reads."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._library.save(str(folder / "tokenizer.json"))
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": END_OF_TEXT,
            "eos_token": END_OF_TEXT,
            "unk_token": END_OF_TEXT,
            "clean_up_tokenization_spaces": False,
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")

    def fingerprint(self) -> str:
        """A SHA-256 in hexadecimal over vocabulary and merges, the same whatever files they were read from."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        content = [sorted(self.vocab.items(), key=lambda item: item[1]), self.merges]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    @cached_property
    def _library(self) -> Any:  # a tokenizers.Tokenizer; made when first needed, as it takes longer than the rest
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers

        library = Tokenizer(models.BPE(vocab=self.vocab, merges=self.merges))
        library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        library.decoder = decoders.ByteLevel()
        library.add_special_tokens([END_OF_TEXT])
        library.encode_special_tokens = True  # "special tokens in the input are text", in the library's words
        return library


def check(vocab: Mapping[str, int], merges: Sequence[tuple[str, str]], where: str) -> None:
    """Raise UserError unless `vocab` and `merges` can encode any bytes and give them back."""
    if END_OF_TEXT not in vocab:
        raise UserError(f"{where}: the vocabulary has no {END_OF_TEXT}; a GPT-2 tokenizer has it")
    if sorted(vocab.values()) != list(range(len(vocab))):
        raise UserError(f"{where}: the ids must be 0 to {len(vocab) - 1}, each once, for its {len(vocab)} tokens")
    alphabet = byte_characters()
    if missing := [character for character in alphabet if character not in vocab]:
        raise UserError(
            f"{where}: not a byte-level BPE: {len(missing)} of the 256 bytes have no token, first {missing[0]!r}"
        )
    for token in vocab:
        if token != END_OF_TEXT and (not token or any(character not in alphabet for character in token)):
            raise UserError(f"{where}: not a byte-level BPE: token {token!r} is not written in byte characters")
    for rank, (left, right) in enumerate(merges):
        if absent := [token for token in (left, right, left + right) if token not in vocab]:
            raise UserError(
                f"{where}: merge {rank + 1} ({left!r} {right!r}) needs {absent[0]!r}, not in the vocabulary"
            )


def refuse_surrogates(text: str) -> None:
    """Raise UserError where `text` has half a surrogate pair, which no UTF-8 file can hold."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"the text has a lone surrogate ({text[error.start]!r}) at character {error.start}; UTF-8 cannot hold it"
        ) from None
