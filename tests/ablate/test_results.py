"""Means, standard errors, tables and figures, of scores that are written down here."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from fastgpt.ablate.figures import layers_figure, zero_shot_figure
from fastgpt.ablate.results import RESULT, Scores, difference, keep_result, mean_of, result_of
from fastgpt.ablate.tables import (
    differences_table,
    layers_csv,
    layers_table,
    rows_csv,
    rows_table,
    zero_shot_csv,
    zero_shot_table,
)
from fastgpt.ablate.zero_shot import Curve, Point, curves
from fastgpt.ablate_config import AblateConfig
from tests.ablate.study import settings, study

SCORES = {
    ("full", "first", 1): 0.8,
    ("full", "first", 2): 0.9,
    ("full", "second", 1): 0.5,
    ("full", "second", 2): 0.5,
    ("no auxiliary LM", "first", 1): 0.7,
    ("no auxiliary LM", "first", 2): 0.9,
    ("no auxiliary LM", "second", 1): 0.6,
}


@pytest.fixture
def known(tmp_path: Path) -> tuple[AblateConfig, Scores]:
    """A study of which one fine-tuning is not done."""
    config, found = study(tmp_path, settings(tmp_path, layers={"tasks": ["first"], "blocks": [3]}))
    for place, score in SCORES.items():
        cell = found.cells[found.rows[place]]
        run = cell.folder / "run"
        run.mkdir(parents=True)
        summary = {"steps": 3, "best": {"accuracy": 0.0}, "test": {"accuracy": score, "loss": 1.0}}
        (run / "summary.json").write_text(json.dumps(summary))
        keep_result(cell, run, "accuracy")
    return config, Scores(found, config.seeds)


def test_the_standard_error_is_that_of_the_mean() -> None:
    found = mean_of([1.0, 2.0, 4.0])
    assert found is not None and found.error is not None
    assert found.mean == pytest.approx(7 / 3)
    # the squares of -4/3, -1/3 and 5/3 add up to 42/9
    assert found.error == pytest.approx(math.sqrt(42 / 9 / 2) / math.sqrt(3))
    assert mean_of([3.0]) == (3.0, None, 1)
    assert mean_of([]) is None


def test_a_difference_is_taken_seed_by_seed() -> None:
    found = difference({1: 0.5, 2: 0.9, 3: 1.0}, {1: 0.4, 2: 0.8})
    assert found is not None and found.error is not None
    assert (found.mean, found.values) == (pytest.approx(0.1), 2)
    assert found.error == pytest.approx(0.0, abs=1e-9)


def test_the_score_is_that_of_the_test_and_without_one_the_best_validation(
    known: tuple[AblateConfig, Scores], tmp_path: Path
) -> None:
    study = known[1].study
    cell = study.cells[study.rows["no auxiliary LM", "second", 2]]
    (tmp_path / "run").mkdir()
    cell.folder.mkdir(parents=True)
    (tmp_path / "run" / "summary.json").write_text(json.dumps({"steps": 3, "best": {"accuracy": 0.25}}))
    kept = keep_result(cell, tmp_path / "run", "accuracy")
    assert (kept["score"], kept["split"]) == (0.25, "validation")
    assert result_of(cell) == kept
    (cell.folder / RESULT).write_text(json.dumps(kept | {"fingerprint": "of something else"}))
    assert result_of(cell) is None


def test_the_table_has_means_and_says_which_are_of_fewer_seeds(known: tuple[AblateConfig, Scores]) -> None:
    assert rows_table(*known).splitlines() == [
        "|  | average | first (accuracy, test) | second (accuracy, test) |",
        "| --- | ---: | ---: | ---: |",
        "| full | 67.5 ± 2.5 | 85.0 ± 5.0 | 50.0 ± 0.0 |",
        "| no auxiliary LM | 65.0 (1 of 2 seeds) | 80.0 ± 10.0 | 60.0 (1 of 2 seeds) |",
    ]


def test_differences_are_those_of_the_same_seeds(known: tuple[AblateConfig, Scores]) -> None:
    assert differences_table(*known).splitlines()[2:] == [
        "| no auxiliary LM | +0.0 (1 of 2 seeds) | -5.0 ± 5.0 | +10.0 (1 of 2 seeds) |"
    ]


def test_csv_has_every_run_in_full(known: tuple[AblateConfig, Scores]) -> None:
    lines = rows_csv(*known).splitlines()
    assert lines[0] == "row,model,task,metric,split,seed,score"
    assert "full,small,first,accuracy,test,2,0.9" in lines
    assert len(lines) == 1 + len(SCORES)


def test_the_curve_over_layers_in_numbers_and_as_a_figure(known: tuple[AblateConfig, Scores], tmp_path: Path) -> None:
    assert layers_table(*known).splitlines()[2:] == ["| 3 | 85.0 ± 5.0 |"]
    assert layers_csv(*known).splitlines()[1:] == ["first,3,accuracy,test,1,0.8", "first,3,accuracy,test,2,0.9"]
    png, svg = layers_figure(*known, tmp_path / "layers")
    assert png.read_bytes().startswith(b"\x89PNG")
    assert "first (accuracy, test)" in svg.read_text()
    first = svg.read_bytes()
    layers_figure(*known, tmp_path / "layers")
    assert svg.read_bytes() == first


def points(tmp_path: Path, scores: dict[int, float]) -> list[Point]:
    """Points of one model that are scored, and one that is not."""
    found = []
    for step, score in scores.items():
        result = tmp_path / f"{step}.json"
        one: dict[str, Any] = {"heuristic": "sst2", "metric": "accuracy", "score": score, "random": 0.5}
        result.write_text(json.dumps({"heuristics": [one]}))
        found.append(Point("small", step, tmp_path, result))
    return [*found, Point("small", 900, tmp_path, tmp_path / "nothing.json")]


def test_heuristics_are_normalised_between_chance_and_the_best(tmp_path: Path) -> None:
    tree = settings(tmp_path, zero_shot={"heuristics": {"sst2": "x"}})
    config, _ = study(tmp_path, tree)
    scored = points(tmp_path, {0: 0.5, 300: 0.6, 600: 0.75})
    (curve,) = curves(config, scored, {"sst2": {"accuracy": 0.9}})
    assert curve.steps == [0, 300, 600]
    assert curve.normalised == pytest.approx([0.0, 0.25, 0.625])
    (own,) = curves(config, scored, {"sst2": {"f1": 0.9}})  # another metric is no measure of it
    assert own.best == 0.75
    tree["zero_shot"]["best"] = {"sst2": 1.0}
    (asked,) = curves(study(tmp_path, tree)[0], scored, {"sst2": {"accuracy": 0.9}})
    assert asked.normalised == pytest.approx([0.0, 0.2, 0.5])


def test_what_is_not_above_chance_is_no_measure(tmp_path: Path) -> None:
    tree = settings(tmp_path, zero_shot={"heuristics": {"sst2": "x"}})
    config, _ = study(tmp_path, tree)
    (own,) = curves(config, points(tmp_path, {0: 0.5, 300: 0.75}), {"sst2": {"accuracy": 0.48}})
    assert own.normalised == [0.0, 1.0]
    (none,) = curves(config, points(tmp_path, {0: 0.5, 300: 0.4}), {"sst2": {"accuracy": 0.5}})
    assert all(math.isnan(value) for value in none.normalised)
    assert zero_shot_table([none]).splitlines()[2:4] == ["| 0 | 50.0 |", "| 300 | 40.0 |"]
    assert zero_shot_csv([none]).splitlines()[2] == "small,sst2,accuracy,300,0.4,,0.5,0.5"
    zero_shot_figure([none], tmp_path / "none")


def test_a_damaged_result_is_done_again_and_an_undefined_one_is_shown_as_none(
    known: tuple[AblateConfig, Scores], caplog: pytest.LogCaptureFixture
) -> None:
    config, scores = known
    damaged, undefined = (scores.study.cells[scores.study.rows["full", "first", seed]] for seed in (1, 2))
    kept = json.loads((undefined.folder / RESULT).read_text())
    (undefined.folder / RESULT).write_text(json.dumps(kept | {"score": None}))
    for text in ('{"fing', "[]"):
        (damaged.folder / RESULT).write_text(text)
        assert result_of(damaged) is None
    assert f"{damaged.folder / RESULT}: damaged" in caplog.text
    scores = Scores(scores.study, config.seeds)
    assert rows_table(config, scores).splitlines()[2] == "| full | not measured | not measured | 50.0 ± 0.0 |"
    assert "full,small,first,accuracy,test,2," in rows_csv(config, scores).splitlines()


def test_a_figure_of_which_nothing_is_done_names_its_tasks_with_whatever_is_in_them(tmp_path: Path) -> None:
    tree = settings(tmp_path, layers={"tasks": [r"$\bad$"], "blocks": [3]})
    tree["tasks"][r"$\bad$"] = tree["tasks"].pop("first")
    config, found = study(tmp_path, tree)
    _, svg = layers_figure(config, Scores(found, config.seeds), tmp_path / "layers")
    assert r"$\bad$</text>" in svg.read_text()


def test_tasks_that_are_the_same_each_have_their_metric(tmp_path: Path) -> None:
    tree = settings(tmp_path)
    tree["tasks"]["second"] = tree["tasks"]["first"]
    config, found = study(tmp_path, tree)
    for cell in found.cells.values():
        (cell.folder / "run").mkdir(parents=True)
        (cell.folder / "run" / "summary.json").write_text(json.dumps({"steps": 3, "best": {"accuracy": 0.25}}))
        keep_result(cell, cell.folder / "run", "accuracy")
    head = rows_table(config, Scores(found, config.seeds)).splitlines()[0]
    assert head == "|  | average | first (accuracy, validation) | second (accuracy, validation) |"


def test_curves_of_heuristics_in_numbers_and_as_a_figure(tmp_path: Path) -> None:
    one = Curve("small", "sst2", "accuracy", [0, 10], [0.499, 0.75], chance=0.5, best=1.0)
    other = Curve("lstm", "sst2", "accuracy", [0], [0.25], chance=0.5, best=1.0)
    assert zero_shot_table([one, other]).splitlines() == [
        "| updates | small: sst2 (accuracy) | lstm: sst2 (accuracy) |",
        "| --- | ---: | ---: |",
        "| 0 | 49.9 (0.00) | 25.0 (-0.50) |",
        "| 10 | 75.0 (0.50) |  |",
        "| chance, best | 50.0, 100.0 | 50.0, 100.0 |",
    ]
    assert zero_shot_csv([other]).splitlines()[1].startswith("lstm,sst2,accuracy,0,0.25,-0.5,0.5,1.0")
    png, svg = zero_shot_figure([one, other], tmp_path / "zero-shot")
    assert png.read_bytes().startswith(b"\x89PNG") and "lstm: sst2 (accuracy)" in svg.read_text()
