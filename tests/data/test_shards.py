import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastgpt.data.manifest import MANIFEST_FILE
from fastgpt.data.shards import TokenShards
from fastgpt.errors import UserError
from fastgpt.tokenizer import Tokenizer, train_tokenizer

WriteShards = Callable[..., TokenShards]
STREAM = np.random.default_rng(5).integers(270, size=1000)


@pytest.fixture
def shards(write_shards: WriteShards) -> TokenShards:
    """1000 tokens in seven documents and in shards of 300, 300, 300 and 100."""
    return write_shards(*np.split(STREAM, [1, 2, 299, 300, 301, 950]), shard_tokens=300)


def test_the_stream_is_what_was_written(shards: TokenShards, tokenizer: Tokenizer) -> None:
    assert len(shards) == 1000
    assert shards.documents == 7
    assert shards.bytes == len(tokenizer.decode_bytes(STREAM.tolist()))
    assert shards.vocab_size == 270
    assert shards.document_starts().tolist() == [0, 1, 2, 299, 300, 301, 950]
    assert sorted(path.name for path in shards.folder.glob("train-*")) == [
        "train-00000.bin",
        "train-00001.bin",
        "train-00002.bin",
        "train-00003.bin",
        "train-documents.bin",
    ]
    assert (shards.folder / "train-00000.bin").read_bytes() == STREAM[:300].astype("<u2").tobytes()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(bounds=st.tuples(st.integers(0, 1000), st.integers(0, 1000)).map(sorted))
def test_a_slice_is_that_of_the_whole_stream_across_shards(shards: TokenShards, bounds: list[int]) -> None:
    start, stop = bounds
    np.testing.assert_array_equal(shards.slice(start, stop), STREAM[start:stop])
    assert shards.slice(start, stop).dtype == np.dtype("<u2")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(length=st.integers(1, 700), data=st.data())
def test_gathered_rows_are_slices(shards: TokenShards, length: int, data: st.DataObject) -> None:
    starts = data.draw(st.lists(st.integers(0, 1000 - length), max_size=5))
    rows = shards.gather(np.array(starts, np.int64), length)
    assert rows.shape == (len(starts), length) and rows.dtype == np.int64
    for row, start in zip(rows, starts, strict=True):
        np.testing.assert_array_equal(row, STREAM[start : start + length])


@pytest.mark.parametrize(("start", "stop"), [(-1, 5), (0, 1001), (5, 4), (1001, 1001)])
def test_a_slice_outside_the_stream_is_an_error(shards: TokenShards, start: int, stop: int) -> None:
    with pytest.raises(IndexError, match="stream of 1000 tokens"):
        shards.slice(start, stop)


def test_the_shards_cannot_be_written_to(shards: TokenShards) -> None:
    with pytest.raises(ValueError, match="read-only"):
        shards.slice(0, 10)[0] = 1


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65536, "uint16"), (65537, "uint32")])
def test_ids_take_two_bytes_where_they_fit_and_four_where_not(
    write_shards: WriteShards, vocab_size: int, dtype: str
) -> None:
    ids = [0, 1, vocab_size - 1]
    shards = write_shards(ids, vocab_size=vocab_size)
    assert shards.manifest.dtype == dtype
    assert shards.slice(0, 3).tolist() == ids
    assert (shards.folder / "train-00000.bin").stat().st_size == 3 * np.dtype(dtype).itemsize


def test_an_empty_split_is_an_empty_stream(write_shards: WriteShards) -> None:
    shards = write_shards()
    assert (len(shards), shards.documents, shards.bytes) == (0, 0, 0)
    assert shards.slice(0, 0).tolist() == [] and shards.document_starts().tolist() == []


def test_the_tokenizer_comes_with_the_shards(shards: TokenShards, tokenizer: Tokenizer) -> None:
    assert shards.tokenizer().fingerprint() == tokenizer.fingerprint()
    train_tokenizer(iter(["other"]), 270).save(shards.folder / "tokenizer")
    with pytest.raises(UserError, match=rf"not the tokenizer .*expected fingerprint {tokenizer.fingerprint()}, found"):
        shards.tokenizer()


FILES = ["train-00000.bin", "train-00003.bin", "train-documents.bin"]


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("name", FILES)
def test_a_cut_file_is_named_with_both_sizes(shards: TokenShards, name: str, verify: bool) -> None:
    path = shards.folder / name
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=f"{name}: expected {size} bytes, found {size - 1}; prepare the text again"):
        TokenShards.open(shards.folder, "train", verify=verify)


@pytest.mark.parametrize("name", FILES)
def test_a_longer_file_is_refused_too(shards: TokenShards, name: str) -> None:
    with (shards.folder / name).open("ab") as file:
        file.write(b"\0\0")
    with pytest.raises(UserError, match=f"{name}: expected"):
        TokenShards.open(shards.folder, "train", verify=False)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(shards: TokenShards, name: str) -> None:
    (shards.folder / name).unlink()
    with pytest.raises(UserError, match=f"{name}: expected a file of \\d+ bytes: No such file"):
        TokenShards.open(shards.folder, "train", verify=False)


@pytest.mark.parametrize("name", FILES)
def test_one_flipped_bit_is_found_by_verifying(shards: TokenShards, name: str) -> None:
    path = shards.folder / name
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    TokenShards.open(shards.folder, "train", verify=False)
    TokenShards.open(shards.folder, "validation")
    with pytest.raises(UserError, match=f"{name}: its bytes have changed: expected SHA-256 [0-9a-f]{{64}}, found"):
        TokenShards.open(shards.folder, "train")


def edit(folder: Path, keys: str, value: Any) -> None:
    """Set, or with `...` remove, what stands at the dotted `keys` of the manifest."""
    path = folder / MANIFEST_FILE
    manifest = json.loads(path.read_text(encoding="utf-8"))
    *parents, last = [int(key) if key.isdigit() else key for key in keys.split(".")]
    place = manifest
    for key in parents:
        place = place[key]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    path.write_text(json.dumps(manifest), encoding="utf-8")


KEYS = [
    *("format", "version", "dtype", "vocab_size", "tokenizer", "splits", "splits.train", "splits.validation"),
    *("splits.train.tokens", "splits.train.bytes", "splits.train.documents", "splits.train.shards"),
    *("splits.train.shards.1.file", "splits.train.shards.1.tokens", "splits.train.shards.1.sha256"),
    *("splits.train.boundaries", "splits.validation.boundaries.file", "splits.train.boundaries.sha256"),
]


@pytest.mark.parametrize("key", KEYS)
def test_a_key_that_is_missing_from_the_manifest_is_named(shards: TokenShards, key: str) -> None:
    edit(shards.folder, key, ...)
    with pytest.raises(UserError, match=f"manifest.json: {key} is missing; prepare the text again"):
        TokenShards.open(shards.folder, "train")


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("value", [None, -1, 1.5, True, "x y", [3], {"a": []}])
def test_a_value_of_a_wrong_type_in_the_manifest_is_named(shards: TokenShards, key: str, value: Any) -> None:
    edit(shards.folder, key, value)
    with pytest.raises(UserError, match=f"manifest.json: {key}[. ]") as raised:
        TokenShards.open(shards.folder, "train")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["../other.bin", "/etc/passwd", "a/b.bin", "..", ".", "", ".hidden", "a\\b", "a\n"])
def test_a_file_name_in_the_manifest_cannot_leave_the_folder(shards: TokenShards, name: str) -> None:
    edit(shards.folder, "splits.train.shards.0.file", name)
    with pytest.raises(UserError, match=r"splits.train.shards.0.file must be the plain name of a file in this folder"):
        TokenShards.open(shards.folder, "train")


def test_a_sum_that_does_not_match_its_shards_is_refused(shards: TokenShards) -> None:
    edit(shards.folder, "splits.train.tokens", 999)
    with pytest.raises(UserError, match=r"splits.train.tokens must be 1000, the sum over its shards, got 999"):
        TokenShards.open(shards.folder, "train")


def test_a_manifest_of_a_later_version_is_refused(shards: TokenShards) -> None:
    edit(shards.folder, "version", 2)
    with pytest.raises(UserError, match=r"version must be 1, the one that this fastgpt reads, got 2"):
        TokenShards.open(shards.folder, "train")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"[]", b"7"])
def test_a_manifest_that_is_no_manifest_is_refused(shards: TokenShards, content: bytes) -> None:
    (shards.folder / MANIFEST_FILE).write_bytes(content)
    with pytest.raises(UserError, match=r"manifest.json: (not JSON|the whole must be an object)"):
        TokenShards.open(shards.folder, "train")


def test_a_folder_without_a_manifest_is_no_folder_of_shards(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a folder of token shards"):
        TokenShards.open(tmp_path, "train")


def test_an_unknown_split_is_refused_with_those_there_are(shards: TokenShards) -> None:
    with pytest.raises(UserError, match="no split 'test'; it has train and validation"):
        TokenShards.open(shards.folder, "test")
