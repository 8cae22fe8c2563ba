"""Encoding in parallel: any number of processes gives the same tokens in the same order."""

import contextlib
import os
import queue
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import fastgpt
from fastgpt.data.encoding import EncodedBatch, TextBatch, encode_batch
from fastgpt.data.worker import receive_encoded, send_text
from fastgpt.errors import UserError
from fastgpt.tokenizer import load_tokenizer

Process = subprocess.Popen[bytes]

AHEAD = 2  # batches in flight for each worker
PACKAGES = Path(fastgpt.__file__).parents[1]


def encode_in_order(
    batches: Iterator[TextBatch], tokenizer_folder: Path, dtype: str, workers: int
) -> Iterator[EncodedBatch]:
    """The batches as tokens, in their order, by `workers` processes; with one, in this process.

    Few batches are held at any time, so memory does not grow with the text. Raises UserError where a worker dies.
    """
    if workers == 1:
        tokenizer = load_tokenizer(tokenizer_folder)
        yield from (encode_batch(batch, tokenizer, dtype) for batch in batches)
        return
    processes: list[Process] = []
    idle: queue.SimpleQueue[Process] = queue.SimpleQueue()

    def encode(batch: TextBatch) -> EncodedBatch:
        process = idle.get()
        try:
            return encode_in(process, batch, dtype)
        finally:
            idle.put(process)

    try:
        for _ in range(workers):
            processes.append(start_worker(tokenizer_folder, dtype))
            idle.put(processes[-1])
        with ThreadPoolExecutor(workers) as threads:
            yield from in_order(threads, encode, batches, AHEAD * workers)
    finally:
        for process in processes:
            close(process)


def in_order(
    threads: ThreadPoolExecutor, encode: Callable[[TextBatch], EncodedBatch], batches: Iterator[TextBatch], ahead: int
) -> Iterator[EncodedBatch]:
    """The results for all batches in their order, at most `ahead` of them begun."""
    waiting: deque[Future[EncodedBatch]] = deque()
    try:
        for batch in batches:
            waiting.append(threads.submit(encode, batch))
            if len(waiting) >= ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def start_worker(tokenizer_folder: Path, dtype: str) -> Process:
    """A process that runs `fastgpt.data.worker`, with its own pipes."""
    # -P: the working directory is not searched for modules, whatever lies in it
    command = [sys.executable, "-P", "-m", "fastgpt.data.worker", str(tokenizer_folder), dtype]
    search = os.pathsep.join([str(PACKAGES), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": search}
    )


def encode_in(process: Process, batch: TextBatch, dtype: str) -> EncodedBatch:
    """Have a worker encode a batch."""
    assert process.stdin is not None and process.stdout is not None, "a worker is started with pipes"
    try:
        send_text(process.stdin, batch)
        return receive_encoded(process.stdout, dtype)
    except (EOFError, BrokenPipeError):
        raise UserError(
            f"a worker process died (exit code {process.wait()}), perhaps for want of memory; "
            "try again with fewer workers"
        ) from None


def close(process: Process) -> None:
    """End a worker, which has nothing to lose, and close its pipes."""
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None, "a worker is started with pipes"
        with contextlib.suppress(BrokenPipeError):  # of a message that was not sent whole
            pipe.close()
