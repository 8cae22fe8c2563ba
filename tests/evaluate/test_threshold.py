import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgpt.evaluate.threshold import best_threshold, cross_fitted, matthews_of
from fastgpt.tasks.metrics import METRICS

pairs = st.lists(st.tuples(st.integers(-4, 4).map(float), st.integers(0, 1)), min_size=2, max_size=14)


def arrays(values: list[tuple[float, int]]) -> tuple[np.ndarray, np.ndarray]:
    scores, targets = zip(*values, strict=True)
    return np.array(scores), np.array(targets)


def test_the_threshold_worked_by_hand_is_the_lowest_of_equals() -> None:
    # from 0.5 on three of four are right and none is left out; from 2 on both are, and one is left out: equally good
    scores, targets = np.array([-1.0, 0.0, 0.5, 1.0, 2.0, 3.0]), np.array([0, 0, 1, 0, 1, 1])
    assert best_threshold(scores, targets) == 0.5
    assert matthews_of((scores >= 0.5).astype(int), targets) == pytest.approx((3 * 2 - 1 * 0) / np.sqrt(4 * 3 * 3 * 2))


@settings(max_examples=25)
@given(pairs)
def test_no_threshold_has_a_higher_correlation_by_scikit_learn(values: list[tuple[float, int]]) -> None:
    scores, targets = arrays(values)
    found = best_threshold(scores, targets)
    worth = {t: METRICS["matthews"](list((scores >= t).astype(int)), list(targets)) for t in set(scores)}
    best = max(worth.values())
    assert found == min(t for t, value in worth.items() if value > best - 1e-12)
    assert matthews_of((scores >= found).astype(int), targets) == pytest.approx(best, abs=1e-12)


@settings(max_examples=25)
@given(pairs, st.integers(0, 5))
def test_no_prediction_knows_its_own_target(values: list[tuple[float, int]], seed: int) -> None:
    scores, targets = arrays(values)
    predictions, _ = cross_fitted(scores, targets, seed)
    for index in range(len(values)):
        other = targets.copy()
        other[index] = 1 - other[index]
        assert cross_fitted(scores, other, seed)[0][index] == predictions[index]


def test_classes_that_lie_apart_are_told_apart_whatever_the_halves() -> None:
    scores = np.concatenate([np.linspace(-3, -1, 40), np.linspace(1, 3, 40)])
    targets = np.repeat([0, 1], 40)
    for seed in range(3):
        predictions, thresholds = cross_fitted(scores, targets, seed)
        # the lowest acceptable score of a half may lie above one of the other's
        assert matthews_of(predictions, targets) > 0.9
        assert all(1 <= threshold < 1.5 for threshold in thresholds)


def test_scores_that_say_nothing_reach_no_more_than_chance() -> None:
    chance = np.random.default_rng(0)
    found = []
    for seed in range(20):
        scores, targets = chance.normal(size=400), chance.integers(2, size=400)
        found.append(matthews_of(cross_fitted(scores, targets, seed)[0], targets))
    # a threshold chosen on what it is judged by would give 0.1; the mean of 20 has a deviation of 0.05 / sqrt(20)
    assert abs(np.mean(found)) < 0.04
