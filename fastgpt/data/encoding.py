"""Encoding documents in worker processes: any number of them gives the same tokens in the same order."""

import os
import signal
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fastgpt.errors import UserError
from fastgpt.tokenizer import Tokenizer, load_tokenizer

AHEAD = 2  # batches in flight for each worker


class TextBatch(NamedTuple):
    """Some documents in a row, by split."""

    train: list[str]
    validation: list[str]


class Encoded(NamedTuple):
    """Documents as tokens: `ids` of all, one after another, each document led by end-of-text."""

    ids: npt.NDArray[np.integer]
    lengths: npt.NDArray[np.int64]  # (documents,) tokens
    bytes: int  # of UTF-8 text


class EncodedBatch(NamedTuple):
    """A TextBatch as tokens."""

    train: Encoded
    validation: Encoded


def encode_in_order(
    batches: Iterator[TextBatch], tokenizer_folder: Path, dtype: str, workers: int
) -> Iterator[EncodedBatch]:
    """The batches as tokens, in their order, by `workers` processes; with one, in this process.

    Few batches are held at any time, so memory does not grow with the text.
    """
    if workers == 1:
        tokenizer = load_tokenizer(tokenizer_folder)
        yield from (encode_batch(batch, tokenizer, dtype) for batch in batches)
        return
    pool = ProcessPoolExecutor(
        workers, mp_context=get_context("spawn"), initializer=start_worker, initargs=(tokenizer_folder, dtype)
    )
    waiting: deque[Future[EncodedBatch]] = deque()
    try:
        for batch in batches:
            waiting.append(pool.submit(encode_in_worker, batch))
            if len(waiting) >= AHEAD * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise UserError(
            f"one of {workers} worker processes died, perhaps for want of memory; try again with fewer workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def encode_batch(batch: TextBatch, tokenizer: Tokenizer, dtype: str) -> EncodedBatch:
    """The documents of both splits as tokens."""
    return EncodedBatch(*(encode_documents(texts, tokenizer, dtype) for texts in batch))


def encode_documents(texts: list[str], tokenizer: Tokenizer, dtype: str) -> Encoded:
    """The documents as tokens, each led by end-of-text, so that every token of text has one before it."""
    documents = [[tokenizer.end_of_text, *ids] for ids in tokenizer.encode_batch(texts)]
    ids = np.array([index for document in documents for index in document], np.dtype(dtype).newbyteorder("<"))
    lengths = np.array([len(document) for document in documents], np.int64)
    return Encoded(ids, lengths, sum(len(text.encode()) for text in texts))


class Worker(NamedTuple):
    """What a worker process keeps between batches."""

    tokenizer: Tokenizer
    dtype: str


worker: Worker | None = None  # set once in each worker process


def start_worker(tokenizer_folder: Path, dtype: str) -> None:
    """Make this process a worker: one thread, silent at Ctrl-C, and gone when its parent is."""
    global worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=leave_with_parent, daemon=True).start()
    worker = Worker(load_tokenizer(tokenizer_folder), dtype)


def leave_with_parent() -> None:
    """End this process when its parent ends; a pool's workers otherwise wait for work for ever."""
    parent = parent_process()
    assert parent is not None, "only a worker waits for its parent"
    wait([parent.sentinel])
    os._exit(1)


def encode_in_worker(batch: TextBatch) -> EncodedBatch:
    """`encode_batch` with what this worker keeps."""
    assert worker is not None, "a worker is started before it is given work"
    return encode_batch(batch, worker.tokenizer, worker.dtype)
