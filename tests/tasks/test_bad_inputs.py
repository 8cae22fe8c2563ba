"""Bad input is told in one line: file and row, what is wrong, what is allowed."""

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from fastgpt.config import TableConfig
from fastgpt.errors import UserError
from fastgpt.tasks import load_examples

OWN = TableConfig(kind="classification", format="csv", text=["text"], label="label", labels=["no", "yes"])
SCORES = TableConfig(kind="pair", format="tsv", header=False, text=[1, 2], label=3, score=[0.0, 5.0])
CHOICES = TableConfig(kind="choice", format="jsonl", text=["q"], choices=["c"], n_choices=2, label="best")
COPA = '<?xml version="1.0"?>\n<corpus><item id="7" asks-for="{}" most-plausible-alternative="{}">{}</item></corpus>'
HELLASWAG = "Roof: A man.\n{}\none\ntwo\nthree\n{}\n"


def race(**changes: Any) -> str:
    passage = {"article": "He ran.", "questions": ["Who?"], "options": [["a", "b", "c", "d"]], "answers": ["A"]}
    return json.dumps(passage | changes)


# what is wrong -> (data, name of the file, its content, the error without its folder)
BAD: dict[str, tuple[str | TableConfig, str, str | bytes, str]] = {
    "unknown label": (
        OWN,
        "a.csv",
        "text,label\nfine,yse\n",
        "a.csv:2: column 'label' is 'yse'; allowed: no, yes. Did you mean yes?",
    ),
    "no label": (OWN, "a.csv", "text,label\nfine,\n", "a.csv:2: column 'label' is ''; allowed: no, yes."),
    "label of another data set": (
        "rte",
        "dev.tsv",
        "index\tsentence1\tsentence2\tlabel\n0\tA.\tB.\tneutral\n",
        "dev.tsv:2: column 'label' is 'neutral'; allowed: entailment, not_entailment.",
    ),
    "missing column": (
        OWN,
        "a.csv",
        "texts,label\nfine,yes\n",
        "a.csv:1: no column 'text'; there are: texts, label. Did you mean texts?",
    ),
    "missing key": (CHOICES, "a.jsonl", '{"q": "Who?", "best": 0}\n', "a.jsonl:1: no column 'c'; there are: q, best."),
    "column named twice": (OWN, "a.csv", "text,text,label\na,b,yes\n", "a.csv:1: two columns are called 'text'"),
    "too few columns": (OWN, "a.csv", "text,label\nfine,yes\nfine\n", "a.csv:3: 1 columns; the header names 2"),
    "too many columns": (
        "sst2",
        "train.tsv",
        "sentence\tlabel\na\ttab\t1\n",
        "train.tsv:2: 3 columns; the header names 2",
    ),
    "a tab in a sentence without header": ("cola", "t.tsv", "x\t1\t\tOne\ttwo.\n", "t.tsv:1: 5 columns; allowed: 4"),
    "empty text": (OWN, "a.csv", 'text,label\n"  ",yes\n', "a.csv:2: column 'text' is empty"),
    "half of a pair": (SCORES, "a.tsv", "one\t \t3\n", "a.tsv:1: column 2 is empty"),
    "score that is no number": (
        SCORES,
        "a.tsv",
        "a\tb\thigh\n",
        "a.tsv:1: column 3 is 'high'; it must be a number of 0 to 5",
    ),
    "score out of range": (SCORES, "a.tsv", "a\tb\t5.5\n", "a.tsv:1: column 3 is '5.5'; it must be a number of 0 to 5"),
    "score NaN": (SCORES, "a.tsv", "a\tb\tnan\n", "a.tsv:1: column 3 is 'nan'; it must be a number of 0 to 5"),
    "wrong number of choices": (
        CHOICES,
        "a.jsonl",
        '{"q": "Who?", "c": ["a", "b", "c"], "best": 0}\n',
        "a.jsonl:1: column 'c' has 3 choices; this task has 2",
    ),
    "choices that are no list": (
        CHOICES,
        "a.jsonl",
        '{"q": "Who?", "c": "a, b", "best": 0}\n',
        "a.jsonl:1: column 'c' must be a list of texts, not 'a, b'",
    ),
    "empty choice": (
        CHOICES,
        "a.jsonl",
        '{"q": "Who?", "c": ["a", ""], "best": 0}\n',
        "a.jsonl:1: column 'c': choice 2 is empty",
    ),
    "answer beyond the choices": (
        CHOICES,
        "a.jsonl",
        '{"q": "Who?", "c": ["a", "b"], "best": 2}\n',
        "a.jsonl:1: column 'best' is 2; allowed: 0, 1.",
    ),
    "text that is a number": (
        CHOICES,
        "a.jsonl",
        '{"q": 5, "c": ["a", "b"], "best": 0}\n',
        "a.jsonl:1: column 'q' must be text, not 5",
    ),
    "line that is not JSON": (CHOICES, "a.jsonl", '{"q": \n', "a.jsonl:1: not JSON: Expecting value"),
    "line that is no object": (CHOICES, "a.jsonl", "[1]\n", "a.jsonl:1: must be a JSON object, not list"),
    "unclosed quote": (
        OWN,
        "a.csv",
        'text,label\n"fine,yes\nmore,no\n',
        "a.csv:2: not a row of CSV: unexpected end of data",
    ),
    "bytes that are not UTF-8": (OWN, "a.csv", b"text,label\nfin\xe9,yes\n", "a.csv:2: not utf-8 text: byte 0xe9"),
    "empty file": (OWN, "a.csv", "", "a.csv: the file is empty"),
    "header alone": (OWN, "a.csv", "text,label\n", "a.csv: no examples"),
    "XML that is broken": ("copa", "c.xml", "<a>\n<b></a>", "c.xml:2: not XML: mismatched tag"),
    "XML that could grow": ("copa", "c.xml", '<!DOCTYPE a [<!ENTITY b "c">]><a/>', "c.xml: XML that declares entities"),
    "COPA without an alternative": (
        "copa",
        "c.xml",
        COPA.format("cause", "1", "<p>It rained.</p><a1>x</a1>"),
        "c.xml: item 7: no column 'a2'; there are: p, a1, id, asks-for, most-plausible-alternative.",
    ),
    "COPA with a third alternative": (
        "copa",
        "c.xml",
        COPA.format("cause", "3", "<p>It rained.</p><a1>x</a1><a2>y</a2>"),
        "c.xml: item 7: most-plausible-alternative is '3'; allowed: 1, 2.",
    ),
    "COPA that asks for something else": (
        "copa",
        "c.xml",
        COPA.format("reason", "1", "<p>It rained.</p><a1>x</a1><a2>y</a2>"),
        "c.xml: item 7: asks-for is 'reason'; allowed: cause, effect",
    ),
    "HellaSwag cut short": ("hellaswag", "h.txt", "Roof: A man.\n0\none\n", "h.txt: 3 lines; an item has 6"),
    "HellaSwag with an empty ending": (
        "hellaswag",
        "h.txt",
        HELLASWAG.format(0, ""),
        "h.txt:1: endings: choice 4 is empty",
    ),
    "HellaSwag with a fifth answer": (
        "hellaswag",
        "h.txt",
        HELLASWAG.format(4, "four"),
        "h.txt:1: label is '4'; allowed: 0, 1, 2, 3.",
    ),
    "bz2 that is none": ("hellaswag", "h.txt.bz2", "text", "h.txt.bz2: not a bz2 file of UTF-8 text"),
    "RACE with three options": (
        "race",
        "1.txt",
        race(options=[["a", "b", "c"]]),
        "1.txt: question 1: options has 3 choices; this task has 4",
    ),
    "RACE with an answer E": (
        "race",
        "1.txt",
        race(answers=["E"]),
        "1.txt: question 1: answer is 'E'; allowed: A, B, C, D.",
    ),
    "RACE with too few answers": (
        "race",
        "1.txt",
        race(answers=[]),
        "1.txt: questions, options and answers differ in number: 1, 1, 0",
    ),
    "TREC with a class of its own": (
        "trec",
        "t.label",
        "PLACE:city Where ?\n",
        "t.label:1: class is 'PLACE'; allowed: ABBR, DESC, ENTY, HUM, LOC, NUM.",
    ),
    "TREC without a question": ("trec", "t.label", "LOC:city\n", "t.label:1: column 'question' is empty"),
    "IMDb without its folders": ("imdb", "aclImdb/urls.txt", "x", "aclImdb/neg: no such folder"),
    "data set that is not known": ("sst-2", "a.tsv", "x", "'sst-2' is not a data set; known: cola, sst2,"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_data_is_told_in_one_line_with_its_place(tmp_path: Path, case: str) -> None:
    data, name, content, message = BAD[case]
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as raised:
        load_examples(path.parent if name.startswith("aclImdb") else path, data)
    line = str(raised.value)
    assert line.removeprefix(f"{tmp_path}/").startswith(message)
    assert "\n" not in line


def test_a_file_that_is_not_there_is_told_with_its_nearest_neighbour(tmp_path: Path) -> None:
    (tmp_path / "train.tsv").write_text("")
    with pytest.raises(UserError, match=r"trian.tsv: no such file. Did you mean train.tsv\?"):
        load_examples(tmp_path / "trian.tsv", "sst2")
    with pytest.raises(UserError, match="a folder; this data set is read from a file of it"):
        load_examples(tmp_path, "sst2")


def test_bad_rows_can_be_left_out_and_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text,label\none,yes\n,no\ntwo,maybe\nthree,no\n")
    _, examples = load_examples(path, OWN, bad_rows="skip")
    assert [example.parts[0] for example in examples] == ["one", "three"]
    assert f"2 of 4 rows are left out, first {path}:3: column 'text' is empty" in caplog.text
    assert caplog.records[0].levelno == logging.WARNING


# changes to OWN -> the error
TABLES: list[tuple[dict[str, Any], str]] = [
    ({"kind": "pair"}, "has 1 texts; kind pair has 2"),
    ({"text": [[]]}, "has an empty list of columns"),
    ({"choices": ["a", "b"]}, "are for kind choice, not classification"),
    ({"kind": "choice", "labels": None}, "must be at least 2 columns, or one with n_choices"),
    ({"kind": "choice", "choices": ["a", "b"], "labels": ["1"]}, "names 1 of 2 choices"),
    ({"kind": "choice", "choices": ["a"], "n_choices": 2}, "is for format jsonl; a cell of csv is one choice"),
    ({"kind": "choice", "choices": ["a", "b"], "n_choices": 2, "format": "jsonl"}, "goes with one column in choices"),
    ({"text": [1]}, "names column 1; with a header, and in jsonl, columns have names"),
    ({"header": False}, "names column 'text'; without a header columns are numbers, from 1"),
    ({"label": "text"}, "has column 'text' twice"),
    ({"score": [0.0, 1.0]}, "labels are for classes: leave one of them out"),
    ({"labels": None}, "must be a list of values of label, or value: name; for regression give score"),
    ({"labels": {"1": "yes", "2": "yes"}}, "must name at least 2 classes, not 1"),
    ({"labels": None, "score": [5.0, 0.0]}, "must be the lowest and the highest value, not [5.0, 0.0]"),
]


@pytest.mark.parametrize(("changes", "message"), TABLES)
def test_a_table_that_contradicts_itself_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(message)):
        TableConfig.model_validate(OWN.model_dump() | changes)
