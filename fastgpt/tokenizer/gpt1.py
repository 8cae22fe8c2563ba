"""GPT-1's own text form (Radford et al. 2018, section 4.1), as in the code published with it.

That is openai/finetune-transformer-lm, text_utils.py.

ftfy repairs the text, `standardize` sets punctuation apart, spaCy's rules for English cut it into words, and each word
in lower case is merged pair by pair in the order of the merge list, from its characters, the last of them with `</w>`.
What is not in the vocabulary becomes `<unk>`. So the form keeps neither case nor white space, but for line ends.

ftfy and spaCy are the extra `gpt1`. spaCy's rules are those of a blank English pipeline, which OpenAI's model had too.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property, lru_cache
from itertools import pairwise
from os import PathLike
from pathlib import Path
from typing import Any

from fastgpt.errors import UserError
from fastgpt.extras import import_extra
from fastgpt.tokenizer.base import END_OF_TEXT
from fastgpt.tokenizer.byte_level import refuse_surrogates

UNKNOWN = "<unk>"
END_OF_WORD = "</w>"
NEWLINE = f"\n{END_OF_WORD}"
KNOWN_WORDS = 1 << 18  # whose tokens are kept: a language repeats its words

SUBSTITUTES = str.maketrans({"—": "-", "–": "-", "―": "-", "…": "...", "´": "'"})
# Not the backslash: OpenAI's pattern has one, but not in a raw string, so that there it means a plus sign.
PUNCTUATION = re.compile(r'(-+|~+|!+|"+|;+|\?+|\++|,+|\)+|\(+|/+|\*+|\[+|\]+|}+|{+|\|+|_+)')


def is_gpt1(vocab: Mapping[str, int]) -> bool:
    """Whether a vocabulary is one of words that end in `</w>`, as GPT-1's, and not of bytes."""
    return UNKNOWN in vocab and END_OF_TEXT not in vocab and any(token.endswith(END_OF_WORD) for token in vocab)


def standardize(text: str) -> str:
    """White space around runs of a punctuation mark, one sign for those alike, and one space for any run of them.

    A line end stays, between two spaces.
    """
    text = PUNCTUATION.sub(r" \1 ", text.translate(SUBSTITUTES))
    text = re.sub(r"\s*\n\s*", " \n ", text)
    return re.sub(r"[^\S\n]+", " ", text).strip()


class GPT1BPE:
    """GPT-1's tokenizer, given by its vocabulary and its merge list.

    GPT-1 has one special token, `<unk>`, and none between documents: `<unk>` stands there too. `where` names the
    tokenizer's origin in errors. Raises UserError where vocabulary and merges do not belong together.
    """

    def __init__(self, vocab: Mapping[str, int], merges: Sequence[tuple[str, str]], where: str = "tokenizer") -> None:
        check(vocab, merges, where)
        self.vocab = dict(vocab)
        self.merges = list(merges)
        self.end_of_text = self.vocab[UNKNOWN]
        self._ranks = {pair: rank for rank, pair in enumerate(self.merges)}
        self._texts = [""] * len(self.vocab)
        for token, index in self.vocab.items():
            self._texts[index] = "\n" if token == NEWLINE else token.replace(END_OF_WORD, " ")
        self._texts[self.end_of_text] = ""
        self._ids_of_word = lru_cache(KNOWN_WORDS)(self._merged)

    @property
    def vocab_size(self) -> int:
        """How many ids there are."""
        return len(self.vocab)

    def require(self) -> None:
        """Raise UserError, naming the extra, where ftfy or spaCy is missing."""
        _ = self._repair, self._english

    def encode(self, text: str) -> list[int]:
        """The ids of `text`. What looks like `<unk>` in it is encoded as plain text."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text.

        Raises UserError where ftfy or spaCy is missing, and for a text that UTF-8 cannot hold (a lone surrogate).
        """
        for text in texts:
            refuse_surrogates(text)
        with self._english.memory_zone():  # spaCy forgets the words of these texts
            return [[index for word in self._words(text) for index in self._ids_of_word(word)] for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """The standardized text of `ids` in lower case, a space after each word; `<unk>` is left out."""
        return self.decode_bytes(ids).decode()

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The text of `ids` as `decode` gives it, in UTF-8; an id past the vocabulary becomes U+FFFD."""
        known = self._texts
        return "".join(
            known[index] if 0 <= index < len(known) else "\N{REPLACEMENT CHARACTER}" for index in ids
        ).encode()

    def save(self, folder: str | PathLike[str]) -> None:
        """Write vocab.json and merges.txt, which transformers' OpenAIGPTTokenizer reads.

        From version 5 on transformers cuts words by BERT's rules in the place of spaCy's: some of its ids differ.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "vocab.json").write_text(json.dumps(self.vocab, ensure_ascii=False) + "\n", encoding="utf-8")
        merges = "".join(f"{left} {right}\n" for left, right in self.merges)
        (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}", encoding="utf-8", newline="\n")
        settings = {"tokenizer_class": "OpenAIGPTTokenizer", "unk_token": UNKNOWN}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")

    def fingerprint(self) -> str:
        """A SHA-256 in hexadecimal over vocabulary and merges.

        The versions of ftfy and spaCy are left out, so that tokens stay readable when those are upgraded.
        """
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        content = ["gpt1", sorted(self.vocab.items(), key=lambda item: item[1]), self.merges]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    @cached_property
    def _repair(self) -> Any:
        return import_extra("ftfy", extra="gpt1", purpose="GPT-1's tokenizer").fix_text

    @cached_property
    def _english(self) -> Any:  # spacy.Language, of which the tokenizer is used
        return import_extra("spacy", extra="gpt1", purpose="GPT-1's tokenizer").blank("en")

    def _words(self, text: str) -> list[str]:
        return [word.text.lower() for word in self._english.tokenizer(standardize(self._repair(text)))]

    def _merged(self, word: str) -> tuple[int, ...]:
        """The ids of one word, in lower case."""
        parts = [*word[:-1], word[-1] + END_OF_WORD]
        unmerged = len(self._ranks)
        while len(parts) > 1:
            best = min(pairwise(parts), key=lambda pair: self._ranks.get(pair, unmerged))
            if best not in self._ranks:
                break
            parts = join(parts, best)
        if "".join(parts) == f"\n {END_OF_WORD}":  # a line end with the space that spaCy may leave on it
            parts = [NEWLINE]
        return tuple(self.vocab.get(part, self.end_of_text) for part in parts)


def join(parts: list[str], pair: tuple[str, str]) -> list[str]:
    """The parts with every occurrence of the pair, from the left, as one part."""
    joined: list[str] = []
    i = 0
    while i < len(parts):
        size = 2 if tuple(parts[i : i + 2]) == pair else 1
        joined.append("".join(parts[i : i + size]))
        i += size
    return joined


def check(vocab: Mapping[str, int], merges: Sequence[tuple[str, str]], where: str) -> None:
    """Raise UserError unless the ids are whole and each merge is of tokens that there are."""
    if sorted(vocab.values()) != list(range(len(vocab))):
        raise UserError(f"{where}: the ids must be 0 to {len(vocab) - 1}, each once, for its {len(vocab)} tokens")
    if UNKNOWN not in vocab:
        raise UserError(f"{where}: the vocabulary has no {UNKNOWN}; GPT-1's has it")
    for rank, (left, right) in enumerate(merges):
        if absent := [token for token in (left, right, left + right) if token not in vocab]:
            raise UserError(
                f"{where}: merge {rank + 1} ({left!r} {right!r}) needs {absent[0]!r}, not in the vocabulary"
            )
