"""Training a byte-level BPE on text."""

import json
from collections.abc import Iterator

from fastgpt.errors import UserError
from fastgpt.tokenizer.base import END_OF_TEXT, Tokenizer
from fastgpt.tokenizer.byte_level import ByteLevelBPE, refuse_surrogates

MINIMUM_VOCAB_SIZE = 257  # 256 bytes and the special token


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE with GPT-2's pattern, learned from `texts`: the same texts give the same tokenizer.

    It has at most `vocab_size` entries, the special token's (id 0) included, and fewer where the texts have no pair
    left that occurs twice. Raises UserError for a `vocab_size` under 257.
    """
    if vocab_size < MINIMUM_VOCAB_SIZE:
        raise UserError(
            f"a byte-level BPE has at least {MINIMUM_VOCAB_SIZE} entries (256 bytes and {END_OF_TEXT}); "
            f"vocab_size is {vocab_size}"
        )
    from tokenizers import Tokenizer as Library
    from tokenizers import models, pre_tokenizers, trainers

    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator(encodable(texts), trainer)
    model = json.loads(library.to_str())["model"]
    return ByteLevelBPE(model["vocab"], [(left, right) for left, right in model["merges"]])


def encodable(texts: Iterator[str]) -> Iterator[str]:
    """The texts, refused where UTF-8 cannot hold them."""
    for text in texts:
        refuse_surrogates(text)
        yield text
