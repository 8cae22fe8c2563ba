import gzip
import json
import os
from pathlib import Path

import pytest

from fastgpt.data.sources import corpus_fingerprint, open_corpus, read_documents
from fastgpt.errors import UserError


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def line(text: str) -> bytes:
    return json.dumps({"text": text}).encode() + b"\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "corpus"
    write(root / "b.txt", "plain")
    write(root / "a" / "z.jsonl", line("first") + line("second"))
    write(root / "a" / "y.JSONL.GZ", gzip.compress(line("packed")))
    write(root / "readme.md", "not text for training")
    write(root / ".hidden.txt", b"\xff")
    write(root / ".git" / "c.txt", b"\xff")
    write(root / "d.txt" / "e.txt", "in a folder with an extension")
    write(root / "empty.txt", "")
    return root


def test_a_folder_is_read_recursively_in_sorted_order_without_other_files(folder: Path) -> None:
    assert list(read_documents(folder)) == ["packed", "first", "second", "plain", "in a folder with an extension"]


@pytest.mark.parametrize(
    ("name", "texts"),
    [("b.txt", ["plain"]), ("a/z.jsonl", ["first", "second"]), ("a/y.JSONL.GZ", ["packed"])],
)
def test_one_file_is_read_by_its_extension(folder: Path, name: str, texts: list[str]) -> None:
    assert list(read_documents(folder / name)) == texts
    assert list(read_documents(str(folder / name))) == texts


def test_links_are_followed_but_not_in_circles(folder: Path, tmp_path: Path) -> None:
    write(tmp_path / "elsewhere" / "linked.txt", "linked")
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    (folder / "a" / "round").symlink_to(folder)
    (folder / "broken.txt").symlink_to(tmp_path / "nowhere.txt")
    texts = list(read_documents(folder))
    assert texts.count("linked") == 1 and texts.count("plain") == 1


def test_position_and_size_tell_how_far_the_reading_has_come(folder: Path) -> None:
    corpus = open_corpus(folder)
    positions = [corpus.position for _ in corpus.documents()]
    assert positions == sorted(positions) and positions[0] > 0
    read = ["b.txt", "a/z.jsonl", "a/y.JSONL.GZ", "d.txt/e.txt", "empty.txt"]
    assert corpus.position == corpus.size == sum((folder / name).stat().st_size for name in read)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", "no such file or folder; text is given as .txt, .jsonl, .jsonl.gz files, or a folder"),
        ("stdlbi", "no such file or folder.*the word stdlib"),
        ("readme.md", "not a text file; text is given as"),
        (".git/x", "no such file"),
    ],
)
def test_a_path_without_text_is_refused_with_what_is_accepted(folder: Path, name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_corpus(folder / name)


def test_a_folder_without_text_files_is_refused_with_what_is_accepted(tmp_path: Path) -> None:
    write(tmp_path / "a.csv", "x")
    with pytest.raises(UserError, match=r"no text in this folder; .*\.txt, \.jsonl, \.jsonl\.gz"):
        list(read_documents(tmp_path))


def test_a_pipe_is_not_a_text_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(UserError, match="not a text file"):
        open_corpus(tmp_path / "pipe.txt")


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xef\xbb\xbf"])
def test_text_files_without_text_are_refused(tmp_path: Path, content: bytes) -> None:
    write(tmp_path / "a.txt", content)
    with pytest.raises(UserError, match=r"a.txt: no text in it"):
        list(read_documents(tmp_path / "a.txt"))
    with pytest.raises(UserError, match="no text in its text files"):
        list(read_documents(tmp_path))


def test_a_broken_file_in_a_folder_is_named(folder: Path) -> None:
    write(folder / "a" / "x.jsonl", line("good") + b"{\n")
    with pytest.raises(UserError, match=r"corpus/a/x.jsonl:2: not a line of JSON"):
        list(read_documents(folder))


def damaged_gzips() -> dict[str, bytes]:
    packed = gzip.compress(b"".join(line(f"{i} some text {i * i}") for i in range(3000)))
    flipped = bytearray(packed)
    flipped[len(packed) // 2] ^= 0xFF
    return {
        "cut": packed[: len(packed) // 2],
        "cut in the trailer": packed[:-4],
        "flipped": bytes(flipped),
        "not gzip": b'{"text": "a"}\n',
    }


@pytest.mark.parametrize("damage", damaged_gzips())
def test_a_damaged_gzip_file_is_refused(tmp_path: Path, damage: str) -> None:
    path = write(tmp_path / "a.jsonl.gz", damaged_gzips()[damage])
    with pytest.raises(UserError, match=r"a.jsonl.gz(:\d+)?: (damaged or cut gzip file|not )"):
        list(read_documents(path))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "x").chmod(0)
    with pytest.raises(UserError, match=r"a.txt: cannot be read: Permission denied"):
        list(read_documents(tmp_path))


def test_the_fingerprint_follows_names_and_content_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    before = corpus_fingerprint(folder)
    (folder / "readme.md").write_text("changed", encoding="utf-8")
    os.utime(folder / "b.txt", (1, 1))
    assert corpus_fingerprint(folder) == before
    assert corpus_fingerprint(folder, "body") != before
    (folder / "b.txt").write_text("plaiN", encoding="utf-8")
    changed = corpus_fingerprint(folder)
    (folder / "b.txt").rename(folder / "bb.txt")
    renamed = corpus_fingerprint(folder)
    assert len({before, changed, renamed}) == 3


def test_the_fingerprint_covers_every_segment_of_a_large_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastgpt.data.sources.SEGMENT_BYTES", 1000)
    path = tmp_path / "a.txt"
    seen = set()
    for place in (0, 999, 1000, 4567, 9999):
        content = bytearray(b"x" * 10_000)
        content[place] = ord("y")
        path.write_bytes(content)
        seen.add(corpus_fingerprint(path))
    assert len(seen) == 5
    assert corpus_fingerprint(path, "body") == corpus_fingerprint(path), "the key is of no consequence for .txt"
