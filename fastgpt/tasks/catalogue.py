"""The data sets by name, each in the forms in which it is published, and how they are read."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from fastgpt.config import TableConfig
from fastgpt.errors import UserError, did_you_mean
from fastgpt.tasks.example import Example, Kind, Task
from fastgpt.tasks.published import (
    HELLASWAG_ENDINGS,
    RACE_OPTIONS,
    TREC_CLASSES,
    read_copa,
    read_hellaswag,
    read_imdb_folder,
    read_race,
    read_trec,
)
from fastgpt.tasks.table import read_table, task_of

log = logging.getLogger(__name__)

Labels = list[str | int] | dict[str | int, str]
Read = Callable[[Path, bool], Iterator[Example | UserError]]


class DataSet(NamedTuple):
    """What a data set asks for, and how its files are read; `files` says which, for people."""

    task: Task
    read: Read
    files: str


def load_examples(
    path: str | Path,
    data: str | TableConfig,
    *,
    labelled: bool = True,
    bad_rows: Literal["refuse", "skip"] = "refuse",
) -> tuple[Task, list[Example]]:
    """The examples of a file (RACE, IMDb: of a folder) in their order, and what they ask for.

    Args:
        path: where the data lie.
        data: a name of `DATA_SETS`, or what the columns of a table hold.
        labelled: read what is to be predicted; False reads data to predict, with or without it.
        bad_rows: "skip" leaves out rows that cannot be read, and logs how many and the first.

    Raises:
        UserError: one line for a file or row that cannot be read: where it stands, what is wrong, what is allowed.
    """
    path = Path(path)
    source = tabular([data], "") if isinstance(data, TableConfig) else data_set(data)
    examples: list[Example] = []
    bad: list[UserError] = []
    for item in source.read(path, labelled):
        if isinstance(item, Example):
            examples.append(item)
        elif bad_rows == "refuse":
            raise item
        else:
            bad.append(item)
    if bad:
        log.warning("%s: %d of %d rows are left out, first %s", path, len(bad), len(bad) + len(examples), bad[0])
    if not examples:
        raise UserError(f"{path}: no examples")
    return source.task, examples


def data_set(name: str, *, setting: str | None = None) -> DataSet:
    """The data set of this name. Raises UserError with the setting and the nearest name where there is none."""
    if name not in DATA_SETS:
        near = did_you_mean(name, DATA_SETS)
        where = f"{setting}: " if setting else ""
        raise UserError(f"{where}{name!r} is not a data set; known: {', '.join(DATA_SETS)}.{near}")
    return DATA_SETS[name]


def tabular(layouts: list[TableConfig], files: str, metrics: tuple[str, ...] = ()) -> DataSet:
    """A data set in tables; the layouts agree in all but their columns."""
    return DataSet(task_of(layouts[0], metrics), lambda path, labelled: read_table(path, layouts, labelled), files)


def classified(labels: Labels, **columns: Any) -> TableConfig:
    """A table of single texts with classes."""
    return TableConfig(kind="classification", labels=labels, **columns)


def entailment(labels: Labels, **columns: Any) -> TableConfig:
    """A table of premises and hypotheses."""
    return TableConfig(kind="pair", labels=labels, **columns)


def read_imdb(path: Path, labelled: bool) -> Iterator[Example | UserError]:
    """IMDb from its folders, or from a CSV of it."""
    return read_imdb_folder(path, labelled) if path.is_dir() else read_table(path, IMDB, labelled)


CORRELATIONS = ("pearson", "spearman")
TWO_WAY: Labels = ["entailment", "not_entailment"]
THREE_WAY: list[str | int] = ["entailment", "neutral", "contradiction"]
SENTIMENT: Labels = {"0": "negative", "1": "positive"}
STS_SCORES: dict[str, Any] = {"kind": "similarity", "score": [0.0, 5.0], "format": "tsv"}

COLA: Labels = {"0": "unacceptable", "1": "acceptable"}
DUPLICATE: Labels = {"0": "different", "1": "duplicate"}
AG_NEWS: Labels = {"1": "World", "2": "Sports", "3": "Business", "4": "Sci/Tech"}
SCITAIL: Labels = {"entails": "entailment", "entailment": "entailment", "neutral": "neutral"}
SICK: Labels = {str(name).upper(): str(name) for name in THREE_WAY}
NLI_COLUMNS: dict[str, Any] = {"text": ["sentence1", "sentence2"], "label": "gold_label"}
SICK_COLUMNS: dict[str, Any] = {"text": ["sentence_A", "sentence_B"], "format": "tsv"}
STORY: list[str | int] = [f"InputSentence{number}" for number in range(1, 5)]

IMDB = [
    classified(SENTIMENT, text=["text"], label="label", format="csv"),
    classified(["negative", "positive"], text=["review"], label="sentiment", format="csv"),
]

DATA_SETS: dict[str, DataSet] = {
    "cola": tabular(
        [
            classified(COLA, text=["sentence"], format="tsv"),  # the test file of GLUE
            classified(COLA, text=[4], label=2, format="tsv", header=False, widths=[4]),
        ],
        "train.tsv, dev.tsv",
        ("matthews", "accuracy"),
    ),
    "sst2": tabular([classified(SENTIMENT, text=["sentence"], label="label", format="tsv")], "train.tsv, dev.tsv"),
    "mrpc": tabular(
        [
            TableConfig(
                kind="similarity", text=["#1 String", "#2 String"], label="Quality", labels=DUPLICATE, format="tsv"
            )
        ],
        "msr_paraphrase_train.txt, msr_paraphrase_test.txt; train.tsv, dev.tsv",
        ("f1", "accuracy"),
    ),
    "stsb": tabular(
        [
            TableConfig(text=["sentence1", "sentence2"], label="score", **STS_SCORES),
            TableConfig(text=[6, 7], label=5, header=False, widths=[7, 9], **STS_SCORES),
        ],
        "train.tsv, dev.tsv; sts-train.csv, sts-dev.csv, sts-test.csv",
        CORRELATIONS,
    ),
    "qqp": tabular(
        [
            TableConfig(
                kind="similarity", text=["question1", "question2"], label="is_duplicate", labels=DUPLICATE, format="tsv"
            )
        ],
        "train.tsv, dev.tsv",
        ("f1", "accuracy"),
    ),
    "mnli": tabular(
        [
            entailment(THREE_WAY, format="tsv", skip=["-"], **NLI_COLUMNS),
            entailment(THREE_WAY, format="jsonl", skip=["-"], **NLI_COLUMNS),
        ],
        "train.tsv, dev_matched.tsv, dev_mismatched.tsv; multinli_1.0_*.txt, multinli_1.0_*.jsonl",
    ),
    "qnli": tabular(
        [entailment(TWO_WAY, text=["question", "sentence"], label="label", format="tsv")], "train.tsv, dev.tsv"
    ),
    "rte": tabular(
        [entailment(TWO_WAY, text=["sentence1", "sentence2"], label="label", format="tsv")], "train.tsv, dev.tsv"
    ),
    "snli": tabular(
        [
            entailment(THREE_WAY, format="tsv", skip=["-"], **NLI_COLUMNS),
            entailment(THREE_WAY, format="jsonl", skip=["-"], **NLI_COLUMNS),
        ],
        "snli_1.0_*.txt, snli_1.0_*.jsonl",
    ),
    "scitail": tabular(
        [
            entailment(SCITAIL, format="tsv", **NLI_COLUMNS),
            entailment(SCITAIL, format="jsonl", **NLI_COLUMNS),
            entailment(SCITAIL, text=[1, 2], label=3, format="tsv", header=False, widths=[3]),
        ],
        "scitail_1.0_*.tsv; scitail_1.0_*.txt",
    ),
    "sick": tabular(
        [
            entailment(THREE_WAY, text=["premise", "hypothesis"], label="label", format="csv"),
            entailment(SICK, label="entailment_judgment", **SICK_COLUMNS),
            entailment(SICK, label="entailment_label", **SICK_COLUMNS),
        ],
        "SICK_train.txt, SICK_trial.txt, SICK_test_annotated.txt; a csv of premise, hypothesis, label",
    ),
    "storycloze": tabular(
        [
            TableConfig(
                kind="choice",
                text=[STORY],
                choices=["RandomFifthSentenceQuiz1", "RandomFifthSentenceQuiz2"],
                label="AnswerRightEnding",
                labels=["1", "2"],
                format="csv",
            )
        ],
        "cloze_test_val__spring2016 - cloze_test_ALL_val.csv",
    ),
    "race": DataSet(Task(Kind.CHOICE, ("accuracy",), choices=len(RACE_OPTIONS)), read_race, "train, dev, test"),
    "copa": DataSet(
        Task(Kind.CHOICE, ("accuracy",), choices=2), read_copa, "copa-dev.xml, copa-test.xml; train.jsonl, val.jsonl"
    ),
    "hellaswag": DataSet(
        Task(Kind.CHOICE, ("accuracy",), choices=HELLASWAG_ENDINGS),
        read_hellaswag,
        "hellaswag_train.jsonl, hellaswag_val.jsonl",
    ),
    "trec": DataSet(
        Task(Kind.CLASSIFICATION, ("accuracy",), labels=tuple(TREC_CLASSES)),
        read_trec,
        "train_5500.label, TREC_10.label",
    ),
    "imdb": DataSet(task_of(IMDB[0]), read_imdb, "train, test; a csv of text, label or of review, sentiment"),
    "agnews": tabular(
        [
            classified(AG_NEWS, text=[["Title", "Description"]], label="Class Index", format="csv"),
            classified(AG_NEWS, text=[[2, 3]], label=1, format="csv", header=False, widths=[3]),
        ],
        "train.csv, test.csv",
    ),
    "nsmc": tabular(
        [classified(SENTIMENT, text=["document"], label="label", format="tsv", empty="skip")],
        "ratings_train.txt, ratings_test.txt",
    ),
    "kornli": tabular(
        [entailment(THREE_WAY, format="tsv", **NLI_COLUMNS)], "multinli.train.ko.tsv, xnli.dev.ko.tsv, xnli.test.ko.tsv"
    ),
    "korsts": tabular(
        [TableConfig(text=["sentence1", "sentence2"], label="score", **STS_SCORES)],
        "sts-train.tsv, sts-dev.tsv, sts-test.tsv",
        CORRELATIONS,
    ),
}
