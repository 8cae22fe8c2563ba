"""Which documents are for validation, and which of the others a tokenizer is trained on."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

from fastgpt.errors import UserError

SAMPLE_CHARACTERS = 1 << 26  # of text that a tokenizer is trained on
LONGEST_SAMPLE_CHARACTERS = 1 << 20  # of one document


@dataclass(frozen=True)
class SplitRule:
    """One document of each `round(1 / fraction)` in a row is for validation, chosen by seed.

    In the first row it is one of the first two, so that any corpus of two documents or more has both splits.
    """

    fraction: float
    seed: int

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 0.5:
            raise UserError(f"validation_fraction must be above 0 and at most 0.5, got {self.fraction}")

    def is_validation(self, ordinal: int) -> bool:
        """Whether the document with this number, counting from 0, is for validation."""
        size = round(1 / self.fraction)
        row, place = divmod(ordinal, size)
        return place == chosen("validation", self.seed, row) % (2 if row == 0 else size)

    def training(self, documents: Iterator[str]) -> Iterator[str]:
        """The training documents among all."""
        return (text for ordinal, text in enumerate(documents) if not self.is_validation(ordinal))


def even_sample(documents: Iterator[str], seed: int, characters: int = SAMPLE_CHARACTERS) -> list[str]:
    """Documents from all over a corpus of any length, in order, together at most `characters` long.

    A document is in the sample while its hash is below a bound, and whenever the sample has grown too long the bound
    falls to the median: one reading, constant memory, and no preference for the beginning.
    """
    bound = 1 << 64
    sample: list[tuple[int, str]] = []
    length = 0
    for ordinal, text in enumerate(documents):
        mark = chosen("sample", seed, ordinal)
        if mark >= bound:
            continue
        sample.append((mark, text[:LONGEST_SAMPLE_CHARACTERS]))
        length += len(sample[-1][1])
        while length > characters and len(sample) > 1:
            bound = sorted(mark for mark, _ in sample)[len(sample) // 2]
            sample = [(mark, text) for mark, text in sample if mark < bound]
            length = sum(len(text) for _, text in sample)
    return [text for _, text in sample]


def chosen(purpose: str, seed: int, number: int) -> int:
    """A pseudo-random 64-bit number, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(f"{purpose} {seed} {number}".encode(), digest_size=8).digest())
