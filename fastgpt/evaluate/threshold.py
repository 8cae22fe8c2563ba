"""Two classes told apart by a threshold on a score, each half of the examples by the threshold of the other."""

import numpy as np
import numpy.typing as npt

from fastgpt.data.sampler import Sampler

Floats = npt.NDArray[np.float64]
Classes = npt.NDArray[np.int64]


def cross_fitted(scores: Floats, targets: Classes, seed: int) -> tuple[Classes, list[float]]:
    """Predictions (n,), none of which knows its own target, and the thresholds of the two halves.

    Args:
        scores: (n,), n at least 2; class 1 is predicted from the threshold on.
        targets: (n,), classes 0 and 1.
        seed: chooses the halves.
    """
    order = Sampler(len(scores), seed).index(np.arange(len(scores)))
    halves = np.array_split(order, 2)
    predictions = np.zeros_like(targets)
    thresholds = []
    for half, other in zip(halves, reversed(halves), strict=True):
        threshold = best_threshold(scores[other], targets[other])
        predictions[half] = scores[half] >= threshold
        thresholds.append(threshold)
    return predictions, thresholds


def best_threshold(scores: Floats, targets: Classes) -> float:
    """The score from which on predicting class 1 has the highest Matthews correlation; the lowest of equals."""
    order = np.argsort(scores, kind="stable")
    ranked, right = scores[order], targets[order].astype(np.float64)
    found = right.sum() - np.cumsum(right) + right  # of class 1 from each score on
    wrong = np.arange(len(ranked), 0, -1) - found
    worth = matthews(found, wrong, right.sum() - found, len(right) - right.sum() - wrong)
    worth[1:][ranked[1:] == ranked[:-1]] = -np.inf  # no threshold lies between equal scores
    return float(ranked[worth.argmax()])


def matthews(true_1: Floats, false_1: Floats, false_0: Floats, true_0: Floats) -> Floats:
    """Matthews' correlation from how many were predicted rightly and wrongly as each class; 0 where it is undefined."""
    product = (true_1 + false_1) * (true_1 + false_0) * (true_0 + false_1) * (true_0 + false_0)
    return (true_1 * true_0 - false_1 * false_0) / np.sqrt(np.where(product > 0, product, np.inf))


def matthews_of(predictions: Classes, targets: Classes) -> float:
    """Matthews' correlation of predictions, as GLUE has it."""
    counts = [
        np.array(((predictions == predicted) & (targets == target)).sum(), np.float64)
        for predicted, target in ((1, 1), (1, 0), (0, 1), (0, 0))
    ]
    return float(matthews(*counts))
