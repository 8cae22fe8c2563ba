"""The metrics on numbers small enough to be worked out by hand."""

import math
import subprocess
import sys

import pytest

from fastgpt.errors import UserError
from fastgpt.tasks import METRICS, score

# of class 1: 2 right, 1 wrongly claimed, 1 missed; of class 0: 4 right
PREDICTED = [1, 1, 1, 0, 0, 0, 0, 0]
TARGETS = [1, 1, 0, 1, 0, 0, 0, 0]


def test_classes_are_scored_by_the_definitions() -> None:
    found = score(["accuracy", "f1", "f1_macro", "matthews"], PREDICTED, TARGETS)
    assert found["accuracy"] == 6 / 8
    assert found["f1"] == pytest.approx(2 / 3)  # precision and recall are both 2/3
    assert found["f1_macro"] == pytest.approx((2 / 3 + 4 / 5) / 2)
    assert found["matthews"] == pytest.approx((2 * 4 - 1 * 1) / math.sqrt(3 * 3 * 5 * 5))


def test_scores_are_correlated_by_value_and_by_rank() -> None:
    found = score(["pearson", "spearman"], [1.0, 2.0, 3.0, 10.0], [1.0, 3.0, 2.0, 4.0])
    # deviations (-3, -2, -1, 6) and (-1.5, 0.5, -0.5, 1.5): 13 / sqrt(50 * 5)
    assert found["pearson"] == pytest.approx(13 / math.sqrt(250))
    assert found["spearman"] == pytest.approx(1 - 6 * 2 / (4 * 15))


def test_one_class_for_all_scores_zero_and_not_a_warning(recwarn: pytest.WarningsRecorder) -> None:
    assert score(["matthews", "f1"], [0, 0, 0], [0, 1, 1]) == {"matthews": 0.0, "f1": 0.0}
    assert not recwarn.list


def test_constant_predictions_have_no_correlation() -> None:
    assert all(math.isnan(value) for value in score(["pearson", "spearman"], [2.0, 2.0, 2.0], [1.0, 2.0, 3.0]).values())


def test_what_cannot_be_scored_is_told() -> None:
    with pytest.raises(UserError, match=r"'acuracy' is not a metric; known: accuracy, .* Did you mean accuracy\?"):
        score(["acuracy"], [0], [0])
    with pytest.raises(UserError, match="1 predictions for 2 targets"):
        score(["accuracy"], [0], [0, 1])
    with pytest.raises(UserError, match="0 predictions for 0 targets"):
        score(["accuracy"], [], [])
    with pytest.raises(UserError, match="f1 is for two classes"):
        score(["f1"], [0, 2], [0, 1])


@pytest.mark.parametrize(("metric", "module"), [("accuracy", "sklearn.metrics"), ("pearson", "scipy.stats")])
def test_a_missing_package_is_told_with_the_extra_that_brings_it(
    monkeypatch: pytest.MonkeyPatch, metric: str, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        UserError, match=rf"the metric {metric} needs {module.split('.')[0]}.*'fastgpt\[finetune\]'"
    ) as raised:
        score([metric], [0, 1], [0, 1])
    assert "\n" not in str(raised.value)


def test_tasks_are_imported_without_pytorch_and_without_the_packages_of_the_extras() -> None:
    heavy = "{'torch', 'sklearn', 'scipy', 'spacy', 'ftfy', 'transformers'}"
    program = f"import sys, fastgpt.tasks; sys.exit(' '.join({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stderr.strip() == ""


def test_every_metric_is_the_same_whatever_the_order_of_the_examples() -> None:
    order = [3, 0, 7, 5, 1, 6, 2, 4]
    for name in METRICS:
        shuffled = score([name], [PREDICTED[i] for i in order], [TARGETS[i] for i in order])
        assert shuffled == pytest.approx(score([name], PREDICTED, TARGETS))
