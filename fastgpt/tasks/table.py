"""Examples from a table, by what its columns hold."""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastgpt.config import TableConfig
from fastgpt.errors import UserError, did_you_mean
from fastgpt.tasks.example import Example, Kind, Task
from fastgpt.tasks.rows import Row, first_row, json_rows, read_text, table_rows

log = logging.getLogger(__name__)


def task_of(table: TableConfig, metrics: Sequence[str] = ()) -> Task:
    """What the table's examples ask for; by default accuracy, or for scores the correlations of STS-B."""
    return Task(
        kind=Kind(table.kind),
        metrics=tuple(metrics) or (("accuracy",) if table.score is None else ("pearson", "spearman")),
        labels=() if table.kind == "choice" else table.class_names,
        score=None if table.score is None else (table.score[0], table.score[1]),
        choices=table.number_of_choices,
    )


def read_table(path: Path, layouts: Sequence[TableConfig], labelled: bool) -> Iterator[Example | UserError]:
    """The examples of a file in the first of the `layouts` whose columns it has; a bad row comes as its error.

    Raises UserError where the whole file cannot be read, or lacks a column.
    """
    text = read_text(path, layouts[0].encoding)
    table = choose_layout(path, text, layouts, labelled)
    if table.format == "jsonl":
        rows = json_rows(path, text)
    else:
        rows = table_rows(path, text, quoted=table.format == "csv", header=table.header, widths=table.widths)
    classes = table.class_of if labelled else None
    skipped = 0
    for row in rows:
        try:
            if isinstance(row, UserError):
                raise row
            if left_out(row, table, labelled):
                skipped += 1
            else:
                yield example(row, table, classes)
        except UserError as problem:
            yield problem
    if skipped:
        log.info("%s: %d rows without a text or a label are left out, as this data set asks", path, skipped)


def left_out(row: Row, table: TableConfig, labelled: bool) -> bool:
    """Whether the table says to pass the row over."""
    if labelled and table.skip and table.label is not None:
        value = str(cell(row, table.label)).strip()
        if value in map(str, table.skip):
            return True
    return table.empty == "skip" and not all(texts(row, table.columns))


def choose_layout(path: Path, text: str, layouts: Sequence[TableConfig], labelled: bool) -> TableConfig:
    """The first layout that fits the file's header, or its JSON; one without header fits where no other does."""
    if len(layouts) > 1:
        is_json = text.lstrip().startswith("{")  # SciTail's JSON lines are called .txt
        layouts = [table for table in layouts if (table.format == "jsonl") == is_json] or layouts
    problems = []
    for table in sorted(layouts, key=lambda table: not table.header):
        if labelled and table.label is None:
            problems.append(UserError(f"{path}: no column of labels; it is data to predict"))
            continue
        if table.format == "jsonl" or not table.header:
            return table
        header = first_row(path, text, quoted=table.format == "csv")
        needed = [*table.columns, *([table.label] if labelled and table.label is not None else [])]
        if repeated := next((name for name in header if header.count(name) > 1), None):
            raise UserError(f"{path}:1: two columns are called {repeated!r}")
        missing = [str(name) for name in needed if name not in header]
        if not missing:
            return table
        near = did_you_mean(missing[0], header)
        problems.append(UserError(f"{path}:1: no column {missing[0]!r}; there are: {', '.join(header)}.{near}"))
    raise problems[0]


def example(row: Row, table: TableConfig, classes: Mapping[str, int] | None) -> Example:
    """The example of a row, without its target where `classes` is None. Raises UserError with the row's place."""
    parts = tuple(" ".join(checked_texts(row, entry if isinstance(entry, list) else [entry])) for entry in table.text)
    target = None if classes is None else target_of(row, table, classes)
    return Example(parts, choices_of(row, table), target, row.place)


def choices_of(row: Row, table: TableConfig) -> tuple[str, ...]:
    """The choices of a row, of which there must be as many as the task has."""
    if table.n_choices is None:
        return tuple(checked_texts(row, table.choices or []))
    (key,) = table.choices or []
    return checked_choices(cell(row, key), table.n_choices, f"{row.place}: {named(key)}")


def checked_choices(value: Any, count: int, where: str) -> tuple[str, ...]:
    """A list of so many texts, none of them empty."""
    if not isinstance(value, list) or not all(isinstance(choice, str) for choice in value):
        raise UserError(f"{where} must be a list of texts, not {shown(value)}")
    if len(value) != count:
        raise UserError(f"{where} has {len(value)} choices; this task has {count}")
    if blank := next((number for number, choice in enumerate(value, 1) if not choice.strip()), None):
        raise UserError(f"{where}: choice {blank} is empty")
    return tuple(choice.strip() for choice in value)


def target_of(row: Row, table: TableConfig, classes: Mapping[str, int]) -> int | float:
    """The class, the choice or the score of a row."""
    assert table.label is not None, "choose_layout takes a layout with a label"
    value = cell(row, table.label)
    if table.score is not None:
        return checked_score(value, (table.score[0], table.score[1]), f"{row.place}: {named(table.label)}")
    return checked_class(value, classes, f"{row.place}: {named(table.label)}")


def checked_class(value: Any, classes: Mapping[str, int], where: str) -> int:
    """The number of the class that `value` stands for."""
    key = value.strip() if isinstance(value, str) else str(value)
    if key not in classes:
        near = did_you_mean(key, classes)
        raise UserError(f"{where} is {shown(value)}; allowed: {', '.join(classes)}.{near}")
    return classes[key]


def checked_score(value: Any, limits: tuple[float, float], where: str) -> float:
    """A number within the limits."""
    low, high = limits
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not low <= number <= high:
        raise UserError(f"{where} is {shown(value)}; it must be a number of {low:g} to {high:g}")
    return number


def checked_texts(row: Row, columns: Sequence[str | int]) -> list[str]:
    """The texts in the columns, without white space at their ends. Raises UserError where one is empty."""
    found = texts(row, columns)
    for column, text in zip(columns, found, strict=True):
        if not text:
            raise UserError(f"{row.place}: {named(column)} is empty")
    return found


def texts(row: Row, columns: Sequence[str | int]) -> list[str]:
    """The texts in the columns, without white space at their ends."""
    found = []
    for column in columns:
        value = cell(row, column)
        if not isinstance(value, str):
            raise UserError(f"{row.place}: {named(column)} must be text, not {shown(value)}")
        found.append(value.strip())
    return found


def cell(row: Row, column: str | int) -> Any:
    """What stands in a column. Raises UserError where the row has no such column."""
    if column not in row.cells:
        near = did_you_mean(column, map(str, row.cells)) if isinstance(column, str) else ""
        raise UserError(f"{row.place}: no {named(column)}; there are: {', '.join(map(str, row.cells))}.{near}")
    return row.cells[column]


def named(column: str | int) -> str:
    """A column, in words."""
    return f"column {column}" if isinstance(column, int) else f"column {column!r}"


def shown(value: Any) -> str:
    """A value, shortened for a line."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
