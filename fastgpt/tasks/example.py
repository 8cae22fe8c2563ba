"""What a task is, and one item of it."""

from enum import StrEnum
from typing import NamedTuple


class Kind(StrEnum):
    """The four forms of Radford et al. 2018, section 3.3."""

    CLASSIFICATION = "classification"
    PAIR = "pair"
    SIMILARITY = "similarity"
    CHOICE = "choice"


class Example(NamedTuple):
    """One item: texts, and what is to be predicted of them.

    `parts` is (text,) for classification, (premise, hypothesis) for a pair, two texts in either order for similarity,
    and (context,) or (context, question) for a choice, whose `choices` are the continuations. No text is empty.
    """

    parts: tuple[str, ...]
    choices: tuple[str, ...]
    target: int | float | None  # number of the class or of the right choice, or a score; None in data to predict
    place: str  # "file:row", for errors


class Task(NamedTuple):
    """What is to be predicted of the examples of a data set, and how that is scored."""

    kind: Kind
    metrics: tuple[str, ...]  # of `fastgpt.tasks.metrics`; the first is the one that tells the best model
    labels: tuple[str, ...] = ()  # names of the classes, by number
    score: tuple[float, float] | None = None  # lowest and highest, for regression
    choices: int = 0  # how many, for a choice

    @property
    def outputs(self) -> int:
        """Numbers that the head gives for each sequence: a logit a class, or one for a score or a choice."""
        return len(self.labels) or 1

    @property
    def sequences(self) -> int:
        """Token sequences that stand for one example."""
        return {Kind.SIMILARITY: 2, Kind.CHOICE: self.choices}.get(self.kind, 1)
