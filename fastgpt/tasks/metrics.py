"""How good predictions are, by the field's own definitions: those of scikit-learn and SciPy (the extra `finetune`)."""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from fastgpt.errors import UserError, did_you_mean
from fastgpt.extras import import_extra
from fastgpt.tasks.example import Task

Numbers = Sequence[int] | Sequence[float]


def accuracy(predictions: Numbers, targets: Numbers) -> float:
    """The part of the predictions that are right."""
    return float(_sklearn("accuracy").accuracy_score(targets, predictions))


def f1(predictions: Numbers, targets: Numbers) -> float:
    """The harmonic mean of precision and recall of class 1, of two classes; 0 where it is never right."""
    if not set(targets) | set(predictions) <= {0, 1}:
        raise UserError("f1 is for two classes, 0 and 1; for more use f1_macro")
    return float(_sklearn("f1").f1_score(targets, predictions, zero_division=0))


def f1_macro(predictions: Numbers, targets: Numbers) -> float:
    """The mean of the F1 of each class."""
    return float(_sklearn("f1_macro").f1_score(targets, predictions, average="macro", zero_division=0))


def matthews(predictions: Numbers, targets: Numbers) -> float:
    """Matthews' correlation of two classes or more; 0 where all predictions, or all targets, are one class."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a single class
        return float(_sklearn("matthews").matthews_corrcoef(targets, predictions))


def pearson(predictions: Numbers, targets: Numbers) -> float:
    """The linear correlation; NaN where predictions or targets are constant, of which it says nothing."""
    return _correlation("pearsonr", predictions, targets)


def spearman(predictions: Numbers, targets: Numbers) -> float:
    """The correlation of the ranks, equal values sharing theirs; NaN where either side is constant."""
    return _correlation("spearmanr", predictions, targets)


METRICS: dict[str, Callable[[Numbers, Numbers], float]] = {
    "accuracy": accuracy,
    "f1": f1,
    "f1_macro": f1_macro,
    "matthews": matthews,
    "pearson": pearson,
    "spearman": spearman,
}


CORRELATIONS = {"pearson", "spearman"}  # of scores; the others are of classes


def check_metrics(metrics: Sequence[str], task: Task, *, setting: str = "metrics") -> None:
    """See that the metrics are known, fit the task, and can be computed here.

    Raises UserError, naming the `setting`, where one does not, or is named twice, or its package is missing.
    """
    fitting = set(METRICS) - CORRELATIONS if task.score is None else CORRELATIONS
    if len(task.labels) > 2 or task.choices > 2:
        fitting = fitting - {"f1"}
    for name in metrics:
        if name not in METRICS:
            near = did_you_mean(name, METRICS)
            raise UserError(f"{setting}: {name!r} is not a metric; known: {', '.join(METRICS)}.{near}")
        if name not in fitting:
            raise UserError(f"{setting}: {name} is no metric of this task; use {', '.join(sorted(fitting))}")
        if metrics.count(name) > 1:
            raise UserError(f"{setting}: {name} is named twice")
        if name in CORRELATIONS:
            _stats(name)
        else:
            _sklearn(name)


def score(metrics: Sequence[str], predictions: Numbers, targets: Numbers) -> dict[str, float]:
    """Each of the metrics, by name: classes by their numbers, or scores.

    Raises UserError for a metric that is not known, no predictions, or as many as there are not targets, and where
    scikit-learn or SciPy is missing.
    """
    for name in metrics:
        if name not in METRICS:
            raise UserError(f"{name!r} is not a metric; known: {', '.join(METRICS)}.{did_you_mean(name, METRICS)}")
    if len(predictions) != len(targets) or not len(targets):
        raise UserError(f"{len(predictions)} predictions for {len(targets)} targets cannot be scored")
    return {name: METRICS[name](predictions, targets) for name in metrics}


def _sklearn(name: str) -> Any:
    return import_extra("sklearn.metrics", extra="finetune", purpose=f"the metric {name}")


def _stats(name: str) -> Any:
    return import_extra("scipy.stats", extra="finetune", purpose=f"the metric {name}")


def _correlation(name: str, predictions: Numbers, targets: Numbers) -> float:
    stats = _stats(name.removesuffix("r"))
    if len(set(predictions)) < 2 or len(set(targets)) < 2:
        return math.nan
    return float(getattr(stats, name)(predictions, targets).statistic)
