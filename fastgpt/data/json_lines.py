"""Documents in JSON Lines: one object a line, its text at one key."""

import json
from collections.abc import Iterator
from typing import BinaryIO

from fastgpt.data.text_file import decode
from fastgpt.errors import UserError, did_you_mean

LINE_BYTES = 1 << 28  # a line is read whole


def json_documents(file: BinaryIO, name: str, text_key: str) -> Iterator[str]:
    """The strings at `text_key`, in order; blank lines and blank texts are passed over.

    Raises UserError with `name` and the line for anything else.
    """
    number = 0
    offset = 0
    while line := file.readline(LINE_BYTES):
        number += 1
        where = f"{name}:{number}"
        if len(line) == LINE_BYTES:
            raise UserError(f"{where}: the line is longer than {LINE_BYTES >> 20} MiB; cut its text into documents")
        content = decode(line, where, offset)
        offset += len(line)
        if number == 1:
            content = content.removeprefix("\N{BYTE ORDER MARK}")
        if not content or content.isspace():
            continue
        text = text_at(parse(content, where), text_key, where)
        if text and not text.isspace():
            yield text


def parse(line: str, where: str) -> object:
    """One line of JSON."""
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not a line of JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits; brackets without end
        raise UserError(f"{where}: not a line of JSON that can be read: {error}") from None


def text_at(record: object, text_key: str, where: str) -> str:
    """The text of one record."""
    if not isinstance(record, dict):
        raise UserError(f"{where}: must be a JSON object with the key {text_key!r}, got {record!r:.60}")
    if text_key not in record:
        hint = did_you_mean(text_key, record)
        raise UserError(f"{where}: no key {text_key!r}; its keys are: {', '.join(record)!s:.120}.{hint}")
    text = record[text_key]
    if not isinstance(text, str):
        raise UserError(f"{where}: {text_key!r} must be a string, got {text!r:.60}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: {text_key!r} has half a surrogate pair ({text[error.start]!r})") from None
    return text
