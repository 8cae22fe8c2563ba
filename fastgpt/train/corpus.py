"""The token shards that a run trains on: prepared at first use, checked before every use."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from fastgpt.config import Config
from fastgpt.data.manifest import MANIFEST_FILE
from fastgpt.data.prepare import prepare_cached
from fastgpt.data.progress import shown_progress
from fastgpt.data.shards import TokenShards
from fastgpt.engine.ranks import Ranks
from fastgpt.errors import UserError
from fastgpt.files import sha256
from fastgpt.train.display import Display


class Corpus(NamedTuple):
    """Token shards.

    `fingerprint` is of their content. Their bytes are being read to see whether they are still those that were
    prepared: to call `verified`, on rank 0, waits for that, and raises UserError where they are not.
    """

    folder: Path
    fingerprint: str
    verified: Callable[[], None]


def prepare_corpus(config: Config, ranks: Ranks, display: Display) -> Corpus:
    """The corpus of a run; rank 0 does the work.

    Raises:
        UserError: there is nothing to train on, or it does not fit the model.
    """

    reading: Future[None] | None = None

    def work() -> list[str]:
        nonlocal reading
        folder = _prepared(config)
        shards = TokenShards.open(folder, "train", verify=False)
        validation = TokenShards.open(folder, "validation", verify=False)
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
        if config.data.verify:
            reading = _in_background(shards.verify, validation.verify)
        return [str(folder), sha256(folder / MANIFEST_FILE)]

    folder, fingerprint = ranks.on_first(work)

    def verified() -> None:
        if reading:
            reading.result()

    return Corpus(Path(folder), fingerprint, verified)


def _in_background(*works: Callable[[], None]) -> Future[None]:
    """Begin to do one after the other in a thread."""

    def work() -> None:
        for each in works:
            each()

    pool = ThreadPoolExecutor(1)
    future = pool.submit(work)
    pool.shutdown(wait=False)
    return future


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
