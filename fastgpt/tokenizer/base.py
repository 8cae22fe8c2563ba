"""What every tokenizer can do."""

from collections.abc import Iterable, Sequence
from os import PathLike
from typing import Protocol

END_OF_TEXT = "<|endoftext|>"


class Tokenizer(Protocol):
    """Text to token ids and back; one special token stands between documents."""

    @property
    def vocab_size(self) -> int:
        """How many ids there are, the special token's included: ids are 0 to vocab_size - 1."""

    @property
    def end_of_text(self) -> int:
        """The id of the special token `<|endoftext|>`."""

    def encode(self, text: str) -> list[int]:
        """The ids of `text`. What looks like the special token in it is encoded as plain text."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, as `encode` gives them."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; bytes that are not UTF-8, as in a cut character, become U+FFFD."""

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The exact bytes of `ids`, the special token left out."""

    def save(self, folder: str | PathLike[str]) -> None:
        """Write files to `folder` that `load_tokenizer` and transformers read."""

    def fingerprint(self) -> str:
        """A SHA-256 in hexadecimal over all that decides the ids: equal tokenizers have equal fingerprints."""
