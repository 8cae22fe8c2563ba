"""manifest.json of a folder of token shards: what the folder holds, checked when it is read.

The format, version 1: shard files hold the token ids of a split one after another, raw, little-endian, in the
manifest's dtype; the boundary file holds the position of each document's first token in the split, raw, as
little-endian uint64; `tokenizer/` holds the tokenizer's files.
"""

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastgpt.errors import UserError

MANIFEST_FILE = "manifest.json"
TOKENIZER_FOLDER = "tokenizer"
FORMAT = "fastgpt token shards"
VERSION = 1
DTYPES = ("uint16", "uint32")
SPLITS = ("train", "validation")

FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")  # no separators and no "..": it stays in the folder
SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Shard:
    """One file of token ids."""

    file: str
    tokens: int
    sha256: str


@dataclass(frozen=True)
class Boundaries:
    """The file of document starts."""

    file: str
    sha256: str


@dataclass(frozen=True)
class Split:
    """One stream of tokens: its shards in order; `bytes` counts the UTF-8 text that the tokens stand for."""

    tokens: int
    bytes: int
    documents: int
    shards: tuple[Shard, ...]
    boundaries: Boundaries


@dataclass(frozen=True)
class Manifest:
    """The whole folder; `tokenizer` is the fingerprint of the tokenizer that made the ids."""

    dtype: str
    vocab_size: int
    tokenizer: str
    splits: dict[str, Split]

    def to_json(self) -> str:
        """The text of manifest.json."""
        return json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)}, indent=2) + "\n"


def dtype_for(vocab_size: int) -> str:
    """The smallest of the dtypes that holds every id."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def read_manifest(folder: Path) -> Manifest:
    """Read and check `folder`/manifest.json; raises UserError with the file and the key at fault."""
    path = folder / MANIFEST_FILE
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{folder}: not a folder of token shards, for it has no {MANIFEST_FILE}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON: {error}; prepare the text again") from None
    reader = Reader(path, content, "")
    if (found := reader.value("format")) != FORMAT:
        raise reader.error("format", f"must be {FORMAT!r}", found)
    if (version := reader.count("version")) != VERSION:
        raise reader.error("version", f"must be {VERSION}, the one that this fastgpt reads", version)
    splits = reader.child("splits")
    return Manifest(
        dtype=reader.choice("dtype", DTYPES),
        vocab_size=reader.count("vocab_size", minimum=1),
        tokenizer=reader.text("tokenizer", SHA256, "64 hexadecimal digits"),
        splits={name: read_split(splits.child(name)) for name in SPLITS},
    )


def read_split(reader: "Reader") -> Split:
    """One split of a manifest."""
    shards = tuple(
        Shard(shard.file_name("file"), shard.count("tokens", minimum=1), shard.sha256("sha256"))
        for shard in reader.children("shards")
    )
    boundaries = reader.child("boundaries")
    split = Split(
        tokens=reader.count("tokens"),
        bytes=reader.count("bytes"),
        documents=reader.count("documents"),
        shards=shards,
        boundaries=Boundaries(boundaries.file_name("file"), boundaries.sha256("sha256")),
    )
    if (total := sum(shard.tokens for shard in shards)) != split.tokens:
        raise reader.error("tokens", f"must be {total}, the sum over its shards", split.tokens)
    return split


@dataclass(frozen=True)
class Reader:
    """Typed access to one JSON object of a manifest; `prefix` is where it stands in the file."""

    path: Path
    content: Any
    prefix: str

    def error(self, key: str, expected: str, found: Any) -> UserError:
        """The error for a value at `key`."""
        return UserError(f"{self.path}: {self.prefix}{key} {expected}, got {found!r:.80}; prepare the text again")

    def value(self, key: str) -> Any:
        """Whatever stands at `key`."""
        if not isinstance(self.content, dict):
            where = self.prefix.removesuffix(".") or "the whole"
            raise UserError(f"{self.path}: {where} must be an object, got {self.content!r:.80}; prepare the text again")
        if key not in self.content:
            raise UserError(f"{self.path}: {self.prefix}{key} is missing; prepare the text again")
        return self.content[key]

    def child(self, key: str) -> "Reader":
        """The object at `key`."""
        return Reader(self.path, self.value(key), f"{self.prefix}{key}.")

    def children(self, key: str) -> list["Reader"]:
        """The objects in the list at `key`."""
        values = self.value(key)
        if not isinstance(values, list):
            raise self.error(key, "must be a list", values)
        return [Reader(self.path, value, f"{self.prefix}{key}.{i}.") for i, value in enumerate(values)]

    def count(self, key: str, minimum: int = 0) -> int:
        """A whole number."""
        value = self.value(key)
        if type(value) is not int or value < minimum:
            raise self.error(key, f"must be a whole number of at least {minimum}", value)
        return value

    def choice(self, key: str, allowed: tuple[str, ...]) -> str:
        """One of the `allowed` words."""
        value = self.value(key)
        if value not in allowed:
            raise self.error(key, f"must be {' or '.join(allowed)}", value)
        return str(value)

    def text(self, key: str, pattern: re.Pattern[str], description: str) -> str:
        """A string in which `pattern` matches the whole."""
        value = self.value(key)
        if not isinstance(value, str) or not pattern.fullmatch(value):
            raise self.error(key, f"must be {description}", value)
        return value

    def sha256(self, key: str) -> str:
        """A checksum."""
        return self.text(key, SHA256, "64 hexadecimal digits")

    def file_name(self, key: str) -> str:
        """The name of a file in the manifest's own folder."""
        return self.text(key, FILE_NAME, "the plain name of a file in this folder")
