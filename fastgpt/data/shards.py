"""Reading a folder of token shards: one split as one long, memory-mapped stream of token ids."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fastgpt.data.manifest import TOKENIZER_FOLDER, Manifest, read_manifest
from fastgpt.errors import UserError
from fastgpt.files import sha256
from fastgpt.tokenizer import Tokenizer, load_tokenizer

BOUNDARY_DTYPE = np.dtype("<u8")

Tokens = npt.NDArray[np.integer]


class TokenShards:
    """The stream of one split's token ids. Every document begins with the end-of-text token, so the stream does.

    Nothing is read before it is asked for: the files are mapped into memory.
    """

    def __init__(self, folder: Path, split: str, manifest: Manifest) -> None:
        self.folder = folder
        self.split = split
        self.manifest = manifest
        self._split = manifest.splits[split]
        self.dtype = np.dtype(manifest.dtype).newbyteorder("<")
        self._arrays = [map_file(folder / shard.file, self.dtype) for shard in self._split.shards]
        self._starts = np.cumsum([0, *(shard.tokens for shard in self._split.shards)])  # (shards + 1,)

    @classmethod
    def open(cls, folder: str | PathLike[str], split: str, *, verify: bool = True) -> "TokenShards":
        """Open the "train" or the "validation" split of `folder`.

        The sizes of the files are checked, and their SHA-256 too where `verify` is set (which reads them all).
        Raises UserError with the file at fault and what was expected and found.
        """
        folder = Path(folder)
        manifest = read_manifest(folder)
        if split not in manifest.splits:
            raise UserError(f"{folder}: no split {split!r}; it has {' and '.join(manifest.splits)}")
        check_sizes(folder, manifest, split)
        shards = cls(folder, split, manifest)
        if verify:
            shards.verify()
        return shards

    def verify(self) -> None:
        """Read all files; raises UserError for the first one with another SHA-256 than the manifest says."""
        files = files_of(self.manifest, self.split)
        with ThreadPoolExecutor(min(len(files), os.cpu_count() or 1)) as pool:
            checksums = pool.map(sha256, [self.folder / file.name for file in files])
            for file, found in zip(files, checksums, strict=True):
                if found != file.sha256:
                    raise UserError(
                        f"{self.folder / file.name}: its bytes have changed: expected SHA-256 {file.sha256}, "
                        f"found {found}; prepare the text again"
                    )

    def __len__(self) -> int:
        return self._split.tokens

    @property
    def bytes(self) -> int:
        """The UTF-8 bytes of text that the tokens stand for."""
        return self._split.bytes

    @property
    def documents(self) -> int:
        """How many documents the stream holds."""
        return self._split.documents

    @property
    def vocab_size(self) -> int:
        """Every id is below it."""
        return self.manifest.vocab_size

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the ids; raises UserError where its files have changed since."""
        folder = self.folder / TOKENIZER_FOLDER
        tokenizer = load_tokenizer(folder)
        if tokenizer.fingerprint() != self.manifest.tokenizer:
            raise UserError(
                f"{folder}: not the tokenizer that made these shards: expected fingerprint {self.manifest.tokenizer}, "
                f"found {tokenizer.fingerprint()}; prepare the text again"
            )
        return tokenizer

    def document_starts(self) -> npt.NDArray[np.uint64]:
        """The position of each document's first token, (documents,), rising, the first 0."""
        return map_file(self.folder / self._split.boundaries.file, BOUNDARY_DTYPE)

    def slice(self, start: int, stop: int) -> Tokens:
        """The ids at positions start to stop - 1, read-only, in the dtype of the files; shards are joined."""
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"positions {start} to {stop} are not all in a stream of {len(self)} tokens")
        parts = [
            array[max(start - first, 0) : stop - first]
            for array, (first, last) in zip(self._arrays, pairwise(self._starts.tolist()), strict=True)
            if start < last and stop > first
        ]
        return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, self.dtype), *parts])

    def gather(self, starts: npt.NDArray[np.int64], length: int) -> npt.NDArray[np.int64]:
        """The `length` ids from each of `starts` (n,) on, as (n, length)."""
        rows = np.empty((len(starts), length), np.int64)
        shards = np.searchsorted(self._starts, starts, side="right") - 1
        offsets = starts - self._starts[shards]
        for row, (shard, offset) in enumerate(zip(shards.tolist(), offsets.tolist(), strict=True)):
            ids = self._arrays[shard][offset : offset + length]
            if len(ids) < length:
                start = int(starts[row])
                ids = self.slice(start, start + length)
            rows[row] = ids
        return rows


def map_file(path: Path, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """A raw file as a read-only array; an empty one cannot be mapped."""
    if path.stat().st_size == 0:
        return np.empty(0, dtype)
    return np.memmap(path, dtype, mode="r").view(np.ndarray)  # plain: memmap's own slicing is several times slower


class ExpectedFile(NamedTuple):
    """What the manifest says of a file."""

    name: str
    bytes: int
    sha256: str


def files_of(manifest: Manifest, split: str) -> list[ExpectedFile]:
    """The files of a split."""
    itemsize = np.dtype(manifest.dtype).itemsize
    content = manifest.splits[split]
    files = [ExpectedFile(shard.file, shard.tokens * itemsize, shard.sha256) for shard in content.shards]
    boundaries = content.boundaries
    return [*files, ExpectedFile(boundaries.file, content.documents * BOUNDARY_DTYPE.itemsize, boundaries.sha256)]


def check_sizes(folder: Path, manifest: Manifest, split: str) -> None:
    """Raise UserError for the first file of a split that is missing or has another size."""
    for file in files_of(manifest, split):
        path = folder / file.name
        try:
            found = path.stat().st_size
        except OSError as error:
            raise UserError(
                f"{path}: expected a file of {file.bytes} bytes: {error.strerror}; prepare the text again"
            ) from None
        if found != file.bytes:
            raise UserError(f"{path}: expected {file.bytes} bytes, found {found}; prepare the text again")


def decoded_bytes(shards: TokenShards, start: int, stop: int) -> Iterator[bytes]:
    """The text of positions start to stop - 1, in blocks, so that it need not be held whole."""
    tokenizer = shards.tokenizer()
    block = 1 << 20
    for position in range(start, stop, block):
        yield tokenizer.decode_bytes(shards.slice(position, min(position + block, stop)).tolist())
