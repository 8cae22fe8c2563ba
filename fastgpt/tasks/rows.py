"""The rows of a text file, each with its place; what is wrong with one row does not hide the others."""

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fastgpt.errors import UserError, did_you_mean

Cells = Mapping[str | int, Any]  # by the name of the column, or by its number from 1


class Row(NamedTuple):
    """A row's cells and where it stands, "file:line"."""

    cells: Cells
    place: str


def read_text(path: Path, encoding: str = "utf-8") -> str:
    """A whole file, a byte-order mark left out; line ends as they are. UserError names file and line."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        near = did_you_mean(path.name, (p.name for p in path.parent.glob("*"))) if path.parent.is_dir() else ""
        raise UserError(f"{path}: no such file.{near}") from None
    except IsADirectoryError:
        raise UserError(f"{path}: a folder; this data set is read from a file of it") from None
    except OSError as problem:
        raise UserError(f"{path}: cannot be read: {problem.strerror}") from None
    try:
        return content.decode("utf-8-sig" if encoding == "utf-8" else encoding)
    except UnicodeDecodeError as problem:
        line = content.count(b"\n", 0, problem.start) + 1
        raise UserError(f"{path}:{line}: not {encoding} text: byte {content[problem.start]:#04x}") from None


def lines(text: str) -> Iterator[tuple[int, str]]:
    """The lines that are not blank, with their numbers. Only a line feed, or one after a return, ends a line."""
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, line.removesuffix("\r")


def split_tsv(text: str) -> Iterator[tuple[int, list[str]]]:
    """Cells between tabs; a quotation mark is a character as any other."""
    return ((number, line.split("\t")) for number, line in lines(text))


def split_csv(text: str, path: Path) -> Iterator[tuple[int, list[str]]]:
    """Cells between commas, quoted as RFC 4180 has it, with the line on which each row begins."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    while True:
        start = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as problem:
            raise UserError(f"{path}:{start}: not a row of CSV: {problem}") from None
        if cells is None:
            return
        if any(cell.strip() for cell in cells):
            yield start, cells


def table_rows(
    path: Path, text: str, *, quoted: bool, header: bool, widths: Sequence[int]
) -> Iterator[Row | UserError]:
    """Rows of a csv (`quoted`) or tsv; one with too many or too few cells comes as its error."""
    rows = split_csv(text, path) if quoted else split_tsv(text)
    names: Sequence[str | int] | None = None
    for number, cells in rows:
        place = f"{path}:{number}"
        if header and names is None:
            names = cells
            continue
        if header and names is not None and len(cells) != len(names):
            yield UserError(f"{place}: {len(cells)} columns; the header names {len(names)}")
            continue
        if not header and widths and len(cells) not in widths:
            yield UserError(f"{place}: {len(cells)} columns; allowed: {', '.join(map(str, widths))}")
            continue
        yield Row(dict(zip(names if names is not None else range(1, len(cells) + 1), cells, strict=True)), place)


def json_rows(path: Path, text: str) -> Iterator[Row | UserError]:
    """The JSON object of each line."""
    for number, line in lines(text):
        place = f"{path}:{number}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as problem:
            yield UserError(f"{place}: not JSON: {problem}")
            continue
        if isinstance(value, dict):
            yield Row(value, place)
        else:
            yield UserError(f"{place}: must be a JSON object, not {type(value).__name__}")


def first_row(path: Path, text: str, *, quoted: bool) -> list[str]:
    """The cells of the first row. Raises UserError where there is none."""
    row = next(split_csv(text, path) if quoted else split_tsv(text), None)
    if row is None:
        raise UserError(f"{path}: the file is empty")
    return row[1]
