"""Where text comes from: a file, a folder of files, or the word `stdlib`, read as a stream of documents."""

import gzip
import hashlib
import os
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from os import PathLike
from pathlib import Path
from typing import BinaryIO, Protocol, cast

from fastgpt.data.json_lines import json_documents
from fastgpt.data.stdlib import stdlib_documents
from fastgpt.data.text_file import text_documents
from fastgpt.errors import UserError

STDLIB = "stdlib"
EXTENSIONS = (".txt", ".jsonl", ".jsonl.gz")
ACCEPTED = f"{', '.join(EXTENSIONS)} files, or a folder of them, or the word {STDLIB}"

SEGMENT_BYTES = 1 << 26  # files are hashed in segments, so that one large file occupies every core


class Corpus(Protocol):
    """Text that can be read again and again."""

    name: str
    size: int | None  # in the units of `position`, where known
    position: int  # how far the last reading has come, in bytes of the files

    def documents(self) -> Iterator[str]:
        """The documents from the first; raises UserError where there is none or one cannot be read."""

    def fingerprint(self) -> str:
        """A SHA-256 in hexadecimal over all that decides the documents."""


def open_corpus(path: str | PathLike[str], text_key: str = "text") -> Corpus:
    """The corpus at `path`; raises UserError where there is nothing to read there."""
    if str(path) == STDLIB:
        return Stdlib()
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; text is given as {ACCEPTED}")
    if path.is_dir():
        files = [path / name for name in text_files(path)]
        if not files:
            raise UserError(f"{path}: no text in this folder; text is given as {ACCEPTED}")
        return TextFiles(path, files, text_key)
    if not path.is_file() or not path.name.lower().endswith(EXTENSIONS):
        raise UserError(f"{path}: not a text file; text is given as {ACCEPTED}")
    return TextFiles(path, [path], text_key)


def read_documents(path: str | PathLike[str], text_key: str = "text") -> Iterator[str]:
    """The documents of a .txt, .jsonl or .jsonl.gz file, a folder of them, or `stdlib`, in constant memory.

    A folder is read recursively in the order of the sorted relative paths; hidden and other files are passed over.
    `text_key` is the key of the text in JSON Lines. Raises UserError for input that cannot be read or has no text.
    """
    yield from open_corpus(path, text_key).documents()


def corpus_fingerprint(path: str | PathLike[str], text_key: str = "text") -> str:
    """A SHA-256 in hexadecimal over the names and the content of the files (and `text_key` for JSON Lines)."""
    return open_corpus(path, text_key).fingerprint()


class TextFiles:
    """Text files below a folder, or one file."""

    def __init__(self, root: Path, files: list[Path], text_key: str) -> None:
        self.name = root.absolute().name.split(".")[0] or "text"
        self.size: int | None = sum(path.stat().st_size for path in files)
        self.position = 0
        self._root = root
        self._files = files
        self._text_key = text_key

    def documents(self) -> Iterator[str]:
        """The documents of all files in turn."""
        finished = count = 0
        for path in self._files:
            try:
                with path.open("rb") as file:
                    for text in self._documents_in(file, path):
                        self.position = finished + file.tell()
                        count += 1
                        yield text
                    finished += file.tell()
            except OSError as error:
                raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
        if count == 0:
            raise UserError(f"{self._root}: no text in {'it' if self._files == [self._root] else 'its text files'}")
        self.position = finished

    def _documents_in(self, file: BinaryIO, path: Path) -> Iterator[str]:
        """The documents of one file, by its extension."""
        name = path.name.lower()
        if name.endswith(".txt"):
            yield from text_documents(file, str(path))
        elif name.endswith(".jsonl"):
            yield from json_documents(file, str(path), self._text_key)
        else:
            try:
                with gzip.open(file) as plain:
                    yield from json_documents(cast(BinaryIO, plain), str(path), self._text_key)
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise UserError(f"{path}: damaged or cut gzip file: {error}") from None

    def fingerprint(self) -> str:
        """A SHA-256 over names, sizes and the SHA-256 of each segment, worked out on all cores."""
        json_lines = any(not path.name.lower().endswith(".txt") for path in self._files)
        total = hashlib.sha256(repr(("files", self._text_key if json_lines else None)).encode())
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for path in self._files:
                name = path.relative_to(self._root).as_posix() if path != self._root else path.name
                size = path.stat().st_size
                total.update(repr((name, size)).encode())
                for digest in pool.map(
                    lambda start, path=path: segment_sha256(path, start), range(0, size, SEGMENT_BYTES)
                ):
                    total.update(digest)
        return total.hexdigest()


class Stdlib:
    """The documentation and the sources of the running Python."""

    def __init__(self) -> None:
        self.name = STDLIB
        self.size: int | None = None
        self.position = 0

    def documents(self) -> Iterator[str]:
        """The documents."""
        self.position = 0
        for text in stdlib_documents():
            self.position += len(text)
            yield text

    def fingerprint(self) -> str:
        """A SHA-256 over the documents."""
        total = hashlib.sha256(b"stdlib")
        for text in stdlib_documents():
            total.update(hashlib.sha256(text.encode()).digest())
        return total.hexdigest()


def text_files(folder: Path) -> list[str]:
    """The relative paths of the text files below `folder`, sorted; links are followed, but not in circles."""
    found: list[str] = []
    seen: set[tuple[int, int]] = set()
    for current, folders, files in os.walk(folder, followlinks=True):
        status = Path(current).stat()
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        paths = [Path(current, name) for name in files if name.lower().endswith(EXTENSIONS) and name[0] != "."]
        found += [path.relative_to(folder).as_posix() for path in paths if path.is_file()]
    return sorted(found)


def segment_sha256(path: Path, start: int) -> bytes:
    """The SHA-256 of the segment of a file that begins at `start`."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(start)
        left = SEGMENT_BYTES
        while left and (block := file.read(min(left, 1 << 20))):
            digest.update(block)
            left -= len(block)
    return digest.digest()
