"""Writing one split of a folder of token shards, in constant memory."""

import hashlib
from pathlib import Path
from typing import BinaryIO

import numpy as np

from fastgpt.data.encoding import Encoded
from fastgpt.data.manifest import Boundaries, Shard, Split
from fastgpt.data.shards import BOUNDARY_DTYPE


class HashedFile:
    """A file that is written once, from start to end, with the SHA-256 of what it holds."""

    def __init__(self, path: Path) -> None:
        self.name = path.name
        self._file: BinaryIO = path.open("xb")
        self._digest = hashlib.sha256()

    def write(self, data: bytes) -> None:
        """Append `data`."""
        self._file.write(data)
        self._digest.update(data)

    def close(self) -> str:
        """Close the file; its SHA-256 in hexadecimal."""
        self._file.close()
        return self._digest.hexdigest()


class SplitWriter:
    """Appends documents to NAME-00000.bin, NAME-00001.bin and so on, each of `shard_tokens` tokens but the last."""

    def __init__(self, folder: Path, name: str, shard_tokens: int) -> None:
        self._folder = folder
        self._name = name
        self._shard_tokens = shard_tokens
        self._boundaries = HashedFile(folder / f"{name}-documents.bin")
        self._shards: list[Shard] = []
        self._current: HashedFile | None = None
        self._current_tokens = 0
        self._bytes = 0
        self.tokens = 0
        self.documents = 0

    def add(self, encoded: Encoded) -> None:
        """Append some documents."""
        starts = self.tokens + np.cumsum(encoded.lengths) - encoded.lengths
        self._boundaries.write(starts.astype(BOUNDARY_DTYPE).tobytes())
        position = 0
        while position < len(encoded.ids):
            if self._current is None:
                self._current = HashedFile(self._folder / f"{self._name}-{len(self._shards):05}.bin")
            part = encoded.ids[position : position + self._shard_tokens - self._current_tokens]
            self._current.write(part.tobytes())
            self._current_tokens += len(part)
            position += len(part)
            if self._current_tokens == self._shard_tokens:
                self._finish_shard()
        self.tokens += len(encoded.ids)
        self.documents += len(encoded.lengths)
        self._bytes += encoded.bytes

    def finish(self) -> Split:
        """Close the files; what the manifest says about them."""
        self._finish_shard()
        boundaries = Boundaries(self._boundaries.name, self._boundaries.close())
        return Split(self.tokens, self._bytes, self.documents, tuple(self._shards), boundaries)

    def close(self) -> None:
        """Close the files of a split that is given up."""
        if self._current is not None:
            self._current.close()
        self._boundaries.close()

    def _finish_shard(self) -> None:
        if self._current is not None:
            self._shards.append(Shard(self._current.name, self._current_tokens, self._current.close()))
            self._current, self._current_tokens = None, 0
