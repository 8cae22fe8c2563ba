"""Data sets that are published in a form other than a table; a bad item comes as its error, with its place."""

import bz2
import json
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastgpt.errors import UserError
from fastgpt.tasks.example import Example
from fastgpt.tasks.rows import Cells, Row, json_rows, lines, read_text
from fastgpt.tasks.table import cell, checked_choices, checked_class, checked_texts, shown

JSON_SUFFIXES = (".jsonl", ".json")
COPA_QUESTIONS = {"cause": "What was the CAUSE of this?", "effect": "What happened as a RESULT?"}
HELLASWAG_LINES = 6
HELLASWAG_ENDINGS = 4
RACE_OPTIONS = {"A": 0, "B": 1, "C": 2, "D": 3}
TREC_CLASSES = {"ABBR": 0, "DESC": 1, "ENTY": 2, "HUM": 3, "LOC": 4, "NUM": 5}
IMDB_FOLDERS = {"neg": 0, "pos": 1}


def read_copa(path: Path, labelled: bool) -> Iterator[Example | UserError]:
    """COPA (Roemmele et al. 2011): the XML of its authors, or the JSON lines of SuperGLUE.

    The context is the premise; the question is the one that the authors put to people: what was its cause, what its
    result.
    """
    if path.suffix in JSON_SUFFIXES:
        return items(json_rows(path, read_text(path)), copa_row, labelled)
    return copa_items(path, labelled)


def copa_row(row: Row, labelled: bool) -> Example:
    """An item of SuperGLUE's COPA."""
    premise, *choices = checked_texts(row, ["premise", "choice1", "choice2"])
    question = copa_question(cell(row, "question"), f"{row.place}: question")
    target = checked_class(cell(row, "label"), {"0": 0, "1": 1}, f"{row.place}: label") if labelled else None
    return Example((premise, question), tuple(choices), target, row.place)


def copa_items(path: Path, labelled: bool) -> Iterator[Example | UserError]:
    """The items of COPA's own XML."""
    text = read_text(path)
    if "<!ENTITY" in text:  # which can grow without bound
        raise UserError(f"{path}: XML that declares entities is not read")
    try:
        root = ET.fromstring(text)
    except ET.ParseError as problem:
        raise UserError(f"{path}:{problem.position[0]}: not XML: {problem}") from None
    for number, item in enumerate(root.iter("item"), 1):
        place = f"{path}: item {item.get('id', f'number {number}')}"
        row = Row(dict([*((child.tag, child.text or "") for child in item), *item.items()]), place)
        try:
            premise, *choices = checked_texts(row, ["p", "a1", "a2"])
            question = copa_question(cell(row, "asks-for"), f"{place}: asks-for")
            key = "most-plausible-alternative"
            target = checked_class(cell(row, key), {"1": 0, "2": 1}, f"{place}: {key}") if labelled else None
            yield Example((premise, question), tuple(choices), target, place)
        except UserError as problem:
            yield problem


def copa_question(value: Any, where: str) -> str:
    """What COPA asks of a premise."""
    if value not in COPA_QUESTIONS:
        raise UserError(f"{where} is {shown(value)}; allowed: {', '.join(COPA_QUESTIONS)}")
    return COPA_QUESTIONS[value]


def read_hellaswag(path: Path, labelled: bool) -> Iterator[Example | UserError]:
    """HellaSwag (Zellers et al. 2019): its JSON lines, or six lines an item (activity: context, answer, endings)."""
    if path.suffix in JSON_SUFFIXES:
        return items(json_rows(path, read_text(path)), hellaswag_row, labelled)
    return hellaswag_items(path, labelled)


def hellaswag_row(row: Row, labelled: bool) -> Example:
    """An item of HellaSwag's JSON lines."""
    activity, context = checked_texts(row, ["activity_label", "ctx"])
    endings = checked_choices(cell(row, "endings"), HELLASWAG_ENDINGS, f"{row.place}: endings")
    return Example((f"{activity}: {context}",), endings, ending(row, labelled), row.place)


def hellaswag_items(path: Path, labelled: bool) -> Iterator[Example | UserError]:
    """The items of the form in lines, whose place is the first of their lines."""
    if path.suffix == ".bz2":
        try:
            text = bz2.decompress(path.read_bytes()).decode()
        except (OSError, ValueError, EOFError) as problem:
            raise UserError(f"{path}: not a bz2 file of UTF-8 text: {problem}") from None
    else:
        text = read_text(path)
    found = text.removesuffix("\n").split("\n")
    if len(found) % HELLASWAG_LINES:
        raise UserError(
            f"{path}: {len(found)} lines; an item has {HELLASWAG_LINES}, so their number is a multiple of it"
        )
    for start in range(0, len(found), HELLASWAG_LINES):
        context, label, *endings = found[start : start + HELLASWAG_LINES]
        row = Row({"context": context, "label": label}, f"{path}:{start + 1}")
        try:
            parts = tuple(checked_texts(row, ["context"]))
            choices = checked_choices(endings, HELLASWAG_ENDINGS, f"{row.place}: endings")
            yield Example(parts, choices, ending(row, labelled), row.place)
        except UserError as problem:
            yield problem


def ending(row: Row, labelled: bool) -> int | None:
    """The number of the right ending."""
    allowed = {str(number): number for number in range(HELLASWAG_ENDINGS)}
    return checked_class(cell(row, "label"), allowed, f"{row.place}: label") if labelled else None


def read_race(path: Path, labelled: bool) -> Iterator[Example | UserError]:
    """RACE (Lai et al. 2017): a folder of passages, `middle` and `high` or one of them, or one passage's file."""
    if path.is_dir():
        files = sorted(file for file in path.rglob("*.txt") if file.is_file())
        if not files:
            raise UserError(f"{path}: no .txt files; RACE has one for each passage")
    else:
        files = [path]
    for file in files:
        yield from race_items(file, labelled)


def race_items(path: Path, labelled: bool) -> Iterator[Example | UserError]:
    """The questions on one passage."""
    try:
        content = json.loads(read_text(path))
    except UserError as problem:
        yield problem
        return
    except (ValueError, RecursionError) as problem:
        yield UserError(f"{path}: not JSON: {problem}")
        return
    try:
        if not isinstance(content, dict):
            raise UserError(f"{path}: must be a JSON object, not {type(content).__name__}")
        (article,) = checked_texts(Row(content, str(path)), ["article"])
        lists = [race_list(content, key, path) for key in ("questions", "options", *(["answers"] if labelled else []))]
        if len({len(values) for values in lists}) > 1:
            counts = ", ".join(str(len(values)) for values in lists)
            raise UserError(f"{path}: questions, options and answers differ in number: {counts}")
    except UserError as problem:
        yield problem
        return
    for number, (question, options, *answer) in enumerate(zip(*lists, strict=True), 1):
        place = f"{path}: question {number}"
        try:
            (text,) = checked_texts(Row({"question": question}, place), ["question"])
            choices = checked_choices(options, len(RACE_OPTIONS), f"{place}: options")
            target = checked_class(answer[0], RACE_OPTIONS, f"{place}: answer") if labelled else None
            yield Example((article, text), choices, target, place)
        except UserError as problem:
            yield problem


def race_list(content: Cells, key: str, path: Path) -> list[Any]:
    """A list of a passage's file."""
    value = cell(Row(content, str(path)), key)
    if not isinstance(value, list):
        raise UserError(f"{path}: {key} must be a list, not {shown(value)}")
    return value


def read_trec(path: Path, labelled: bool) -> Iterator[Example | UserError]:
    """TREC (Li and Roth 2002): `CLASS:detail question` in Latin-1, of which the six coarse classes are told apart.

    Without labels a line is the question alone.
    """
    for number, line in lines(read_text(path, "latin-1")):
        place = f"{path}:{number}"
        try:
            label, _, question = line.partition(" ") if labelled else ("", "", line)
            coarse = label.partition(":")[0]
            target = checked_class(coarse, TREC_CLASSES, f"{place}: class") if labelled else None
            (text,) = checked_texts(Row({"question": question}, place), ["question"])
            yield Example((text,), (), target, place)
        except UserError as problem:
            yield problem


def read_imdb_folder(path: Path, labelled: bool) -> Iterator[Example | UserError]:
    """IMDb (Maas et al. 2011): folders `neg` and `pos` of texts; without labels, all texts of a folder."""
    folders = {path / name: number for name, number in IMDB_FOLDERS.items()} if labelled else {path: None}
    for folder, target in folders.items():
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; IMDb's reviews lie in the folders neg and pos")
        files = sorted(folder.glob("*.txt"))
        if not files:
            raise UserError(f"{folder}: no .txt files")
        for file in files:
            try:
                (text,) = checked_texts(Row({"review": read_text(file)}, str(file)), ["review"])
                yield Example((text,), (), target, str(file))
            except UserError as problem:
                yield problem


def items(rows: Iterator[Row | UserError], read: Any, labelled: bool) -> Iterator[Example | UserError]:
    """What `read` makes of each row, or the row's error."""
    for row in rows:
        try:
            yield row if isinstance(row, UserError) else read(row, labelled)
        except UserError as problem:
            yield problem
