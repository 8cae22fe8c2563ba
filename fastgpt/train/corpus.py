"""The token shards that a run trains on: prepared at first use, checked before every use."""

from pathlib import Path

from fastgpt.checkpoint.files import sha256
from fastgpt.config import Config
from fastgpt.data.manifest import MANIFEST_FILE
from fastgpt.data.prepare import prepare_cached
from fastgpt.data.progress import shown_progress
from fastgpt.data.shards import TokenShards
from fastgpt.engine.ranks import Ranks
from fastgpt.errors import UserError
from fastgpt.train.display import Display


def prepare_corpus(config: Config, ranks: Ranks, display: Display) -> tuple[Path, str]:
    """The folder of token shards, and a fingerprint of its content; rank 0 does the work.

    Raises:
        UserError: there is nothing to train on, or it does not fit the model.
    """

    def work() -> list[str]:
        folder = _prepared(config)
        shards = TokenShards.open(folder, "train", verify=config.data.verify)
        validation = TokenShards.open(folder, "validation", verify=config.data.verify)
        if shards.vocab_size > config.model.vocab_size:
            raise UserError(
                f"model.vocab_size: {config.model.vocab_size} is smaller than the vocabulary of the tokens in {folder} "
                f"({shards.vocab_size}); it must be at least {shards.vocab_size}"
            )
        for split in (shards, validation):
            if len(split) < 2 or not split.bytes:
                raise UserError(f"{folder}: its {split.split} split has {len(split)} tokens; give more text")
        tokenizer = shards.tokenizer()
        if tokenizer.vocab_size > shards.vocab_size:
            raise UserError(
                f"{folder}: its tokenizer has {tokenizer.vocab_size} entries and its manifest says "
                f"{shards.vocab_size}; prepare the text again"
            )
        display.print(
            f"data: {len(shards):,} training tokens, {len(validation):,} validation tokens "
            f"({shards.documents:,} and {validation.documents:,} documents) in {folder}"
        )
        return [str(folder), sha256(folder / MANIFEST_FILE)]

    folder, fingerprint = ranks.on_first(work)
    return Path(folder), fingerprint


def _prepared(config: Config) -> Path:
    data = config.data
    cache = Path(data.cache) if data.cache else Path(config.out).parent / "cache"
    with shown_progress(f"preparing {data.path}") as progress:
        return prepare_cached(
            data.path,
            cache,
            tokenizer=data.tokenizer,
            vocab_size=config.model.vocab_size,
            text_key=data.text_key,
            validation_fraction=data.validation_fraction,
            seed=config.train.seed,
            progress=progress,
        )
