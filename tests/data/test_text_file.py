import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastgpt.data.text_file import PIECE_BYTES, text_documents
from fastgpt.errors import UserError


def documents(content: bytes) -> list[str]:
    return list(text_documents(io.BytesIO(content), "book.txt"))


def test_a_short_file_is_one_document_as_it_is() -> None:
    assert documents("One.\r\nTwo. 한국어\n\n\nno line end".encode()) == ["One.\r\nTwo. 한국어\n\n\nno line end"]


@pytest.mark.parametrize("content", [b"", b"\n", b" \r\n\t\n", b"\xef\xbb\xbf", b"<|endoftext|>\n<|endoftext|>"])
def test_blank_text_is_no_document(content: bytes) -> None:
    assert documents(content) == []


def test_a_byte_order_mark_is_left_out() -> None:
    assert documents(b"\xef\xbb\xbfone") == ["one"]


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_a_separator_alone_on_a_line_parts_documents(end: bytes) -> None:
    content = end.join([b"<|endoftext|>", b"one", b"", b"<|endoftext|>", b" <|endoftext|>", b"two", b"<|endoftext|>"])
    assert documents(content) == [f"one{end.decode()}{end.decode()}", f"two{end.decode()}"]


def test_a_separator_within_a_line_is_text() -> None:
    content = b"see <|endoftext|>\n<|endoftext|> here\n"
    assert documents(content) == [content.decode()]


def test_a_separator_after_a_cut_within_a_line_is_text() -> None:
    content = b"x" * PIECE_BYTES + b"<|endoftext|>\n"
    assert "".join(documents(content)) == content.decode()


@pytest.mark.parametrize(
    ("content", "byte", "offset"),
    [
        (b"caf\xe9\n", "0xe9", 3),
        (b"\xef\xbb\xbfab\xff", "0xff", 5),
        (b"one\n<|endoftext|>\n\xc3", "0xc3", 18),
        ((b"x" * 79 + b"\n") * 2000 + b"\xf0\x9f", "0xf0", 160_000),
        (b"x" * 300_001 + b"\x80", "0x80", 300_001),
        ("hello".encode("utf-16"), "0xff", 0),
    ],
)
def test_bytes_that_are_not_utf8_are_refused_with_their_place(content: bytes, byte: str, offset: int) -> None:
    with pytest.raises(UserError, match=f"book.txt: not UTF-8 text: byte {byte} at offset {offset};"):
        documents(content)


def test_a_long_text_is_cut_at_blank_lines() -> None:
    paragraph = ("words " * 12 + "\n") * 20 + "\n"
    pieces = documents((paragraph * 300).encode())
    assert len(pieces) > 4
    assert all(piece.endswith("\n\n") and 40_000 < len(piece) <= PIECE_BYTES for piece in pieces[:-1])
    assert "".join(pieces) == paragraph * 300


def test_a_long_text_without_blank_lines_is_cut_at_line_ends() -> None:
    text = ("words " * 12 + "\n") * 6000
    pieces = documents(text.encode())
    assert len(pieces) > 4 and "".join(pieces) == text
    assert all(piece.endswith("\n") and len(piece) < 1.1 * PIECE_BYTES for piece in pieces)


def test_an_endless_line_is_cut_before_a_word() -> None:
    text = "word " * 100_000
    pieces = documents(text.encode())
    assert len(pieces) > 4 and "".join(pieces) == text
    assert all(piece.startswith(" word") for piece in pieces[1:])


@pytest.mark.parametrize("character", ["a", "é", "한", "😀"])
@pytest.mark.parametrize("shift", range(4))
def test_an_endless_line_without_spaces_is_cut_between_characters(character: str, shift: int) -> None:
    text = "." * shift + character * (4 * PIECE_BYTES // len(character.encode()))
    pieces = documents(text.encode())
    assert len(pieces) >= 4 and "".join(pieces) == text
    assert max(len(piece.encode()) for piece in pieces) <= 2 * PIECE_BYTES


lines = st.text(st.sampled_from(" \n\r\tab한😀\x85\u2028\ufeff"), max_size=50)


@given(st.lists(st.tuples(lines, st.integers(1, 4000)), max_size=6))
def test_the_pieces_of_a_file_are_its_text(parts: list[tuple[str, int]]) -> None:
    text = ".".join(line * times for line, times in parts)
    pieces = documents(b"\xef\xbb\xbf" + text.encode())
    assert all(piece in text and not piece.isspace() for piece in pieces)
    assert "".join("".join(pieces).split()) == "".join(text.split()), "only blank pieces may be missing"
