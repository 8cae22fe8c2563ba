"""From text to a folder of token shards: train or load a tokenizer, split by document, encode, write."""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from os import PathLike
from pathlib import Path

from fastgpt.data.atomic import TakenError, locked, new_folder, remove_unfinished
from fastgpt.data.encoding import TextBatch
from fastgpt.data.manifest import MANIFEST_FILE, SPLITS, TOKENIZER_FOLDER, VERSION, Manifest, dtype_for, read_manifest
from fastgpt.data.sources import Corpus, open_corpus
from fastgpt.data.splitting import SplitRule, even_sample
from fastgpt.data.workers import encode_in_order
from fastgpt.data.writer import SplitWriter
from fastgpt.errors import UserError
from fastgpt.tokenizer import END_OF_TEXT, MINIMUM_VOCAB_SIZE, Tokenizer, load_tokenizer, train_tokenizer

AUTO = "auto"
BATCH_CHARACTERS = 1 << 20
SHARD_TOKENS = 1 << 26

# (documents so far in this reading, bytes read so far, bytes to read in all or None where that is not known)
Progress = Callable[[int, int, int | None], None]


def prepare(
    path: str | PathLike[str],
    output: str | PathLike[str],
    *,
    tokenizer: str | PathLike[str] = AUTO,
    vocab_size: int,
    text_key: str = "text",
    validation_fraction: float = 0.01,
    seed: int = 0,
    shard_tokens: int = SHARD_TOKENS,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Write the text at `path` as token shards to the new folder `output`; what `read_documents` takes is taken.

    `tokenizer` is a folder of tokenizer files, or "auto": train a byte-level BPE of at most `vocab_size` entries on a
    sample of the training documents. `workers` processes encode (default: one for each core); their number does not
    change a byte of the output. A process that is killed leaves nothing at `output`. With "auto" the text is read
    twice, and the bytes that `progress` is told count both readings.

    Raises UserError for text that cannot be read or has fewer than two documents, a tokenizer that does not fit
    `vocab_size`, and an output that exists or cannot be written.
    """
    if workers is not None and workers < 1:
        raise UserError(f"workers must be at least 1, got {workers}")
    output = Path(output)
    corpus = open_corpus(path, text_key)
    rule = SplitRule(validation_fraction, seed)
    bpe = given_tokenizer(tokenizer, vocab_size)
    taken = UserError(f"{output}: already exists; remove it, or choose another folder")
    if output.exists():
        raise taken
    try:
        with locked(output) as alone:
            if alone:
                remove_unfinished(output)
            return write(corpus, output, bpe, vocab_size, rule, shard_tokens, workers, progress)
    except TakenError:
        raise taken from None
    except OSError as error:
        raise UserError(f"{output}: cannot be written: {error}") from None


def prepare_cached(
    path: str | PathLike[str],
    cache: str | PathLike[str],
    *,
    tokenizer: str | PathLike[str] = AUTO,
    vocab_size: int,
    text_key: str = "text",
    validation_fraction: float = 0.01,
    seed: int = 0,
    progress: Progress | None = None,
) -> Path:
    """The folder of token shards for `path`: itself if it is one, or one below `cache`, prepared if it is not there.

    The folder's name depends on the content of the text and on everything that decides the tokens. Processes that
    want the same folder at once wait for the first of them. Raises UserError as `prepare` does.
    """
    if (Path(path) / MANIFEST_FILE).is_file():
        check_fit(Path(path), tokenizer, vocab_size)
        return Path(path)
    corpus = open_corpus(path, text_key)
    rule = SplitRule(validation_fraction, seed)
    bpe = given_tokenizer(tokenizer, vocab_size)
    # a given tokenizer makes the same shards for any vocabulary that it fits into
    tokens = vocab_size if bpe is None else bpe.fingerprint()
    key = hashlib.sha256(json.dumps([VERSION, corpus.fingerprint(), tokens, validation_fraction, seed]).encode())
    folder = Path(cache) / f"{re.sub(r'[^A-Za-z0-9_-]', '_', corpus.name)}-{key.hexdigest()[:16]}"
    try:
        with locked(folder) as alone:
            if not (folder / MANIFEST_FILE).is_file():
                if alone:
                    remove_unfinished(folder)
                write(corpus, folder, bpe, vocab_size, rule, SHARD_TOKENS, None, progress)
    except TakenError:  # without locks another process was first, with the same content
        if not (folder / MANIFEST_FILE).is_file():
            raise UserError(f"{folder}: in the way of the prepared text; remove it") from None
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error}") from None
    return folder


def given_tokenizer(tokenizer: str | PathLike[str], vocab_size: int) -> Tokenizer | None:
    """The tokenizer that is to be used, or None where one is to be trained; checked against `vocab_size`."""
    if str(tokenizer) == AUTO:
        if vocab_size < MINIMUM_VOCAB_SIZE:
            raise UserError(
                f"vocab_size {vocab_size} is too small to train a tokenizer; a byte-level BPE has at least "
                f"{MINIMUM_VOCAB_SIZE} entries (256 bytes and {END_OF_TEXT})"
            )
        return None
    given = load_tokenizer(tokenizer)
    check_vocab_size(str(tokenizer), given.vocab_size, vocab_size)
    return given


def check_vocab_size(where: str, entries: int, vocab_size: int) -> None:
    """Raise UserError where a model of `vocab_size` has no row for some of the ids."""
    if entries > vocab_size:
        raise UserError(
            f"{where}: the tokenizer has {entries} entries, more than vocab_size {vocab_size}; "
            f"set vocab_size to {entries} or more"
        )


def check_fit(folder: Path, tokenizer: str | PathLike[str], vocab_size: int) -> None:
    """Raise UserError where a folder of token shards was made with another tokenizer than asked for."""
    manifest = read_manifest(folder)
    check_vocab_size(str(folder), manifest.vocab_size, vocab_size)
    given = given_tokenizer(tokenizer, vocab_size)
    if given is not None and given.fingerprint() != manifest.tokenizer:
        raise UserError(
            f"{folder}: its tokens were not made by the tokenizer in {tokenizer}; prepare the text again, "
            f"or set the tokenizer to {AUTO}"
        )


def write(
    corpus: Corpus,
    output: Path,
    tokenizer: Tokenizer | None,
    vocab_size: int,
    rule: SplitRule,
    shard_tokens: int,
    workers: int | None,
    progress: Progress | None,
) -> Manifest:
    """Write the shards; without a tokenizer, train one first."""
    with new_folder(output) as folder:
        readings = Readings(corpus, 2 if tokenizer is None else 1, progress)
        if tokenizer is None:
            sample = even_sample(rule.training(readings.documents()), rule.seed)
            tokenizer = train_tokenizer(iter(sample), vocab_size)
            del sample
        tokenizer.save(folder / TOKENIZER_FOLDER)
        dtype = dtype_for(tokenizer.vocab_size)
        writers = [SplitWriter(folder, name, shard_tokens) for name in SPLITS]
        try:
            batches = split_batches(readings.documents(), rule)
            count = len(os.sched_getaffinity(0)) if workers is None else workers
            for encoded in encode_in_order(batches, folder / TOKENIZER_FOLDER, dtype, count):
                for writer, documents in zip(writers, encoded, strict=True):
                    writer.add(documents)
            if sum(writer.documents for writer in writers) < 2:
                raise UserError(
                    f"{corpus.name}: the text is one document, but one is needed for training and one for validation; "
                    f"give more text, or put a line {END_OF_TEXT} between documents"
                )
            splits = dict(zip(SPLITS, [writer.finish() for writer in writers], strict=True))
        finally:
            for writer in writers:
                writer.close()
        manifest = Manifest(dtype, tokenizer.vocab_size, tokenizer.fingerprint(), splits)
        (folder / MANIFEST_FILE).write_text(manifest.to_json(), encoding="utf-8")
    return manifest


class Readings:
    """The one or two readings of a corpus, as one progress."""

    def __init__(self, corpus: Corpus, readings: int, progress: Progress | None) -> None:
        self._corpus = corpus
        self._total = None if corpus.size is None else readings * corpus.size
        self._done = 0
        self._progress = progress

    def documents(self) -> Iterator[str]:
        """The documents from the first, with a report about every BATCH_CHARACTERS and at the end."""
        count = characters = 0
        for text in self._corpus.documents():
            yield text
            count += 1
            characters += len(text)
            if characters >= BATCH_CHARACTERS:
                self._report(count)
                characters = 0
        self._report(count)
        self._done += self._corpus.position

    def _report(self, count: int) -> None:
        if self._progress is not None:
            self._progress(count, self._done + self._corpus.position, self._total)


def split_batches(documents: Iterator[str], rule: SplitRule) -> Iterator[TextBatch]:
    """The documents in batches of about BATCH_CHARACTERS, by split."""
    batch, characters = TextBatch([], []), 0
    for ordinal, text in enumerate(documents):
        (batch.validation if rule.is_validation(ordinal) else batch.train).append(text)
        characters += len(text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = TextBatch([], []), 0
    yield batch
