import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastgpt.data import json_lines
from fastgpt.data.json_lines import json_documents
from fastgpt.errors import UserError


def documents(content: bytes, text_key: str = "text") -> list[str]:
    return list(json_documents(io.BytesIO(content), "data.jsonl", text_key))


@given(st.lists(st.text()))
def test_the_texts_come_out_as_they_went_in(texts: list[str]) -> None:
    content = "\n".join(json.dumps({"id": 7, "text": text}) for text in texts).encode()
    assert documents(content) == [text for text in texts if text.strip()]


def test_blank_lines_byte_order_marks_and_windows_line_ends_do_no_harm() -> None:
    assert documents(b'\xef\xbb\xbf{"text": "a\\r\\n"}\r\n\r\n  \n{"text": "b"}') == ["a\r\n", "b"]


def test_a_line_separator_within_a_text_does_not_end_the_line() -> None:
    assert documents('{"text": "a\u2028b\u0085c"}\n'.encode()) == ["a\u2028b\u0085c"]


def test_another_key_can_be_read() -> None:
    assert documents(b'{"text": 1, "body": "b"}', "body") == ["b"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "not a line of JSON: .* at column 2"),
        (b'{"text": "a"} {"text": "b"}', "not a line of JSON: Extra data at column 15"),
        (b'{"text": "a', "not a line of JSON"),
        (b"plain text", "not a line of JSON"),
        (b"[" * 100_000, "not a line of JSON that can be read"),
        (b'{"n": ' + b"9" * 5000 + b', "text": "a"}', "not a line of JSON that can be read"),
        (b'["text"]', "must be a JSON object with the key 'text', got \\['text'\\]"),
        (b'"text"', "must be a JSON object"),
        (b"null", "must be a JSON object"),
        (b'{"txt": "a", "id": 3}', "no key 'text'; its keys are: txt, id. Did you mean txt\\?"),
        (b"{}", "no key 'text'"),
        (b'{"text": 5}', "'text' must be a string, got 5"),
        (b'{"text": null}', "'text' must be a string, got None"),
        (b'{"text": "a\\ud800"}', "'text' has half a surrogate pair"),
        (b'{"text": "\xff"}', "not UTF-8 text: byte 0xff at offset 24"),
    ],
)
def test_anything_else_is_refused_in_one_line_with_its_place(line: bytes, message: str) -> None:
    with pytest.raises(UserError, match=f"^data.jsonl:2: {message}") as raised:
        documents(b'{"text": "x"}\n' + line)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 300


def test_the_place_of_a_bad_byte_counts_the_byte_order_mark() -> None:
    with pytest.raises(UserError, match=r"data.jsonl:1: not UTF-8 text: byte 0xff at offset 3;"):
        documents(b"\xef\xbb\xbf\xff")


def test_a_line_without_end_is_refused_before_it_fills_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_lines, "LINE_BYTES", 1 << 20)
    with pytest.raises(UserError, match=r"data.jsonl:1: the line is longer than 1 MiB"):
        documents(b'{"text": "' + b"a" * (1 << 21))
