"""Documents in plain text, read in constant memory however long the file and its lines are."""

from collections.abc import Iterator
from typing import BinaryIO

from fastgpt.errors import UserError
from fastgpt.tokenizer import END_OF_TEXT

PIECE_BYTES = 1 << 16
BLANK_LINE_BYTES = PIECE_BYTES * 3 // 4  # from this size on, a blank line ends the piece
LAST_WORD_BYTES = 1 << 10  # how far from the end a cut in an endless line looks for a space

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
SEPARATOR = END_OF_TEXT.encode()


def text_documents(file: BinaryIO, name: str) -> Iterator[str]:
    """The documents of a UTF-8 file: what stands between lines that are `<|endoftext|>` and nothing else.

    A longer document is cut into pieces of about 64 KiB (at most 128) at a blank line, or else at a line end, or
    within an endless line before a space or between two characters; the pieces together are the text, byte for byte.
    White space alone is no document. Raises UserError with `name` and the byte offset of what is not UTF-8.
    """
    piece = bytearray()
    offset = 0  # of the piece in the file
    at_line_start = True
    while line := file.readline(PIECE_BYTES):
        if offset == 0 and not piece and line.startswith(BYTE_ORDER_MARK):
            line = line.removeprefix(BYTE_ORDER_MARK)
            offset = len(BYTE_ORDER_MARK)
        if at_line_start and line.strip() == SEPARATOR:
            yield from document(piece, name, offset)
            offset += len(piece) + len(line)
            piece.clear()
            continue
        piece += line
        at_line_start = line.endswith(b"\n")
        if len(piece) >= PIECE_BYTES or (len(piece) >= BLANK_LINE_BYTES and line.isspace()):
            end = len(piece) if at_line_start else cut_in_line(piece)
            yield from document(piece[:end], name, offset)
            offset += end
            del piece[:end]
    yield from document(piece, name, offset)


def document(piece: bytes | bytearray, name: str, offset: int) -> Iterator[str]:
    """The text of a piece, unless it is blank."""
    text = decode(piece, name, offset)
    if text and not text.isspace():
        yield text


def decode(piece: bytes | bytearray, name: str, offset: int) -> str:
    """UTF-8 to text; `offset` is where the piece begins in the file."""
    try:
        return piece.decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{name}: not UTF-8 text: byte {piece[error.start]:#04x} at offset {offset + error.start}; "
            f"convert it first, for example: iconv -f LATIN1 -t UTF-8"
        ) from None


def cut_in_line(piece: bytearray) -> int:
    """Where to end a piece whose line goes on: before its last word, or else after its last whole character."""
    space = piece.rfind(b" ", len(piece) - LAST_WORD_BYTES)
    if space > 0:
        return space
    lead = len(piece) - 1
    while lead > len(piece) - 4 and piece[lead] & 0xC0 == 0x80:  # a continuation byte
        lead -= 1
    width = 4 if piece[lead] >= 0xF0 else 3 if piece[lead] >= 0xE0 else 2 if piece[lead] >= 0xC0 else 1
    return lead if lead + width > len(piece) else len(piece)
