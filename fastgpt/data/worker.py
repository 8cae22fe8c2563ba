"""The program of a worker process: batches of text come in, batches of tokens go out, until the input ends.

It is a program of its own, and not a `multiprocessing` child, because those run the caller's script once more, which
a script must be written for, and stay behind when their parent is killed. This one sees its input end.

A message is the size of its parts, (3,) little-endian uint64, then the parts: a JSON value and two arrays.
"""

import json
import os
import signal
import struct
import sys
from typing import IO, Any

import numpy as np

from fastgpt.data.encoding import Encoded, EncodedBatch, TextBatch, encode_batch

SIZES = struct.Struct("<3Q")


def main(tokenizer_folder: str, dtype: str) -> None:
    """Answer every batch on standard input with its tokens on standard output."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    from fastgpt.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(tokenizer_folder)
    while (message := receive(sys.stdin.buffer)) is not None:
        send_encoded(sys.stdout.buffer, encode_batch(TextBatch(*message[0]), tokenizer, dtype))


def send_text(stream: IO[bytes], batch: TextBatch) -> None:
    """Send a batch to a worker."""
    send(stream, batch, b"", b"")


def send_encoded(stream: IO[bytes], batch: EncodedBatch) -> None:
    """Send the tokens of a batch to the parent."""
    for encoded in batch:
        send(stream, encoded.bytes, encoded.lengths.tobytes(), encoded.ids.tobytes())


def receive_encoded(stream: IO[bytes], dtype: str) -> EncodedBatch:
    """The tokens of a batch; raises EOFError where the worker has ended."""
    splits = []
    for _ in EncodedBatch._fields:
        message = receive(stream)
        if message is None:
            raise EOFError
        text_bytes, lengths, ids = message
        dtypes = np.dtype(np.int64), np.dtype(dtype).newbyteorder("<")
        splits.append(Encoded(np.frombuffer(ids, dtypes[1]), np.frombuffer(lengths, dtypes[0]), text_bytes))
    return EncodedBatch(*splits)


def send(stream: IO[bytes], value: Any, first: bytes, second: bytes) -> None:
    """Send one message."""
    head = json.dumps(value).encode()
    stream.write(SIZES.pack(len(head), len(first), len(second)) + head + first + second)
    stream.flush()


def receive(stream: IO[bytes]) -> tuple[Any, bytes, bytes] | None:
    """One message, or None where the stream ends before or within it."""
    sizes = stream.read(SIZES.size)
    if len(sizes) < SIZES.size:
        return None
    head, first, second = (stream.read(size) for size in SIZES.unpack(sizes))
    if (len(head), len(first), len(second)) != SIZES.unpack(sizes):
        return None
    return json.loads(head), first, second


if __name__ == "__main__":
    main(*sys.argv[1:])
