"""Which fine-tunings a study has, and what is said of settings that cannot be."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from fastgpt_kernels import load_ops

from fastgpt.ablate.cells import study_of
from fastgpt.ablate.metrics import metrics_of
from fastgpt.ablate.models import study_models
from fastgpt.ablate.results import RESULT, Scores
from fastgpt.ablate.zero_shot import make_untrained, points
from fastgpt.checkpoint.manifest import Manifest, write_manifest
from fastgpt.config import ModelConfig
from fastgpt.errors import UserError
from fastgpt.load import load_model, save_model
from fastgpt.model import build_model
from fastgpt.tokenizer import train_tokenizer
from tests.ablate.study import model, read, settings, study, write_examples


def test_there_is_one_for_each_row_task_and_seed(tmp_path: Path) -> None:
    _, found = study(tmp_path, settings(tmp_path))
    assert len(found.cells) == 2 * 2 * 2
    assert len({cell.folder for cell in found.cells.values()}) == 8
    assert set(found.rows.values()) == set(found.cells)


def test_a_row_is_over_its_task_and_a_task_over_all(tmp_path: Path) -> None:
    tree = settings(tmp_path)
    tree["tasks"]["second"]["train"]["lr"] = 2e-3
    tree["rows"]["fast"] = {"train": {"lr": 3e-3}}
    _, found = study(tmp_path, tree)

    def rate(row: str, task: str) -> float:
        return found.cells[found.rows[row, task, 1]].settings.train.lr

    assert [rate("full", "first"), rate("full", "second"), rate("fast", "second")] == [1e-3, 2e-3, 3e-3]
    of_second = found.cells[found.rows["fast", "second", 2]].settings
    assert (of_second.train.epochs, of_second.train.batch_size, of_second.train.seed) == (2, 8, 2)
    assert of_second.pretrained == "somewhere"


def test_the_curve_over_layers_shares_what_the_rows_have_already(tmp_path: Path) -> None:
    tree = settings(tmp_path, layers={"tasks": ["first"]})
    tree["rows"]["no pre-training"] = {"task": {"transfer_blocks": -1}}
    tree["layers"]["blocks"] = [-1, 0, 3]
    _, found = study(tmp_path, tree)
    assert len(found.cells) == 3 * 2 * 2 + 2  # the embeddings alone, with each seed
    assert found.layers["first", 3, 1] == found.rows["full", "first", 1]
    assert found.layers["first", -1, 2] == found.rows["no pre-training", "first", 2]
    assert found.cells[found.layers["first", 0, 2]].settings.task.transfer_blocks == 0


def test_the_curve_has_every_number_of_blocks_unless_some_are_named(tmp_path: Path) -> None:
    _, found = study(tmp_path, settings(tmp_path, layers={"tasks": ["first"]}), blocks=2)
    assert sorted({blocks for _, blocks, _ in found.layers}) == [0, 1, 2]


def test_other_examples_or_another_model_make_other_fine_tunings(tmp_path: Path) -> None:
    tree = settings(tmp_path)
    before = set(study(tmp_path, tree)[1].cells)
    assert set(study(tmp_path, tree)[1].cells) == before
    assert not before & set(study(tmp_path, tree, fingerprint="b")[1].cells)
    write_examples(tmp_path / "validation.jsonl", 26)
    assert not before & set(study(tmp_path, tree)[1].cells)


def test_threads_and_checkpoints_make_no_other_fine_tuning(tmp_path: Path) -> None:
    tree = settings(tmp_path)
    before = set(study(tmp_path, tree)[1].cells)
    tree["finetune"]["engine"]["threads"] = 2
    tree["finetune"]["train"]["save_every"] = 1
    assert set(study(tmp_path, tree)[1].cells) == before


MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"rows": {"full": {"train": {"lrr": 1}}}}, r"study.yaml:\d+: train.lrr is not a setting. Did you mean train.lr\?"),
    ({"rows": {"full": {"train": {"lr": -1}}}}, r"study.yaml:\d+: train.lr must be a number above 0, not -1"),
    ({"rows": {"full": {"model": "smal"}}}, r"study.yaml:\d+: rows.full.model must be .*Did you mean small\?"),
    ({"rows": {"full": 3}}, r"study.yaml:\d+: rows.full must be a group of keys and values, not 3"),
    (
        {"rows": {"full": {"model": ["small"]}}},
        r"study.yaml:\d+: rows.full.model must be one of small, not \['small'\]",
    ),
    ({"rows": {"full": {"train": None}}}, r"study.yaml:\d+: train must be a group of settings: .*, not null"),
    ({"rows": {"full": {"train": 3}}}, r"study.yaml:\d+: train must be a group of settings: .*, not 3"),
    ({"finetune": {"model": "small"}}, r"study.yaml:\d+: model is not a setting"),
    ({"rows": {"full": {"task": 3}}}, r"study.yaml:\d+: task must be a group of settings: .*, not 3"),
    ({"rows": {}}, r"study.yaml:\d+: rows must be a group of keys and values, not empty, not {}"),
    (
        {"layers": {"tasks": ["first"], "blocks": []}},
        r"study.yaml:\d+: layers.blocks must be a list, not empty or null",
    ),
    ({"layers": {"tasks": ["first", "first"]}}, r"study.yaml:\d+: layers.tasks has one twice: first"),
    ({"rows": {"full": {"pretrained": "x"}}}, r"study.yaml:\d+: pretrained is not set here: .*'model'"),
    ({"rows": {"full": {"train": {"seed": 1}}}}, r"study.yaml:\d+: train.seed is not set here: seeds lists them"),
    ({"finetune": {"out": "x"}}, r"study.yaml:\d+: out is not set here"),
    ({"seeds": [1, 1]}, r"study.yaml:\d+: seeds has one twice: 1, 1"),
    ({"seeds": [-1]}, r"study.yaml:\d+: seeds must be"),
    ({"models": {"small": 3}}, r"study.yaml:\d+: models.small must be text, not empty or a group .*, not 3"),
    ({"layers": {"tasks": ["frist"]}}, r"study.yaml:\d+: layers.tasks must be some of .*Did you mean first\?"),
    ({"layers": {"tasks": ["first"], "blocks": [4]}}, r"study.yaml:\d+: layers.blocks must be at most 3"),
    ({"zero_shot": {"heuristics": {"cola": "x"}, "best": {"cloa": 1}}}, r"zero_shot.best.cloa is not .* mean cola\?"),
    ({"job": 2}, r"study.yaml:\d+: job is not a setting. Did you mean jobs\?"),
]


@pytest.mark.parametrize(("more", "message"), MISTAKES, ids=lambda value: str(value)[:40] if value else "")
def test_a_mistake_is_told_in_one_line_with_its_place(more: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as problem:
        study(tmp_path, settings(tmp_path, **more))
    assert re.search(message, str(problem.value)), str(problem.value)
    assert "\n" not in str(problem.value)


def test_a_missing_file_of_examples_is_told_with_the_line_that_names_it(tmp_path: Path) -> None:
    tree = settings(tmp_path)
    tree["tasks"]["first"]["task"] = tree["tasks"]["first"]["task"] | {"train": "nowhere.jsonl"}
    with pytest.raises(UserError, match=r"study.yaml:\d+: task.train: nowhere.jsonl: no such file"):
        study(tmp_path, tree)


def test_words_of_the_command_line_reach_into_tasks_and_rows(tmp_path: Path) -> None:
    words = ("tasks.first.train.epochs=7", "rows.no auxiliary LM.task.lm_weight=0.25", "seeds=[5]")
    config, places = read(tmp_path, settings(tmp_path), words)
    found = study_of(config, {"small": model()}, places)
    cell = found.cells[found.rows["no auxiliary LM", "first", 5]].settings
    assert (cell.train.epochs, cell.task.lm_weight) == (7, 0.25)
    config, places = read(tmp_path, settings(tmp_path), ("rows.full.train.epochs=no",))
    with pytest.raises(UserError, match=r"command line: train\.epochs must be an integer"):
        study_of(config, {"small": model()}, places)


def test_a_word_may_name_what_has_dots_in_its_name(tmp_path: Path) -> None:
    tree = settings(tmp_path)
    tree["rows"] |= {"ULMFiT v1.0": {}, "ULMFiT v1": {}}
    words = ("rows.ULMFiT v1.0.train.epochs=7", "rows.ULMFiT v1.train.epochs=5")
    config, _ = read(tmp_path, tree, words)
    assert config.rows["ULMFiT v1.0"] == {"train": {"epochs": 7}}
    assert config.rows["ULMFiT v1"] == {"train": {"epochs": 5}}


def test_a_fine_tuning_stays_where_it_was_done_when_its_row_is_called_otherwise(tmp_path: Path) -> None:
    tree = settings(tmp_path)
    _, before = study(tmp_path, tree)
    cell = before.cells[before.rows["full", "first", 2]]
    cell.folder.mkdir(parents=True)
    (cell.folder / RESULT).write_text(json.dumps({"fingerprint": cell.fingerprint, "task": "first", "score": 0.5}))
    tree["rows"] = {"everything": {}}
    tree["tasks"] = {"renamed": tree["tasks"]["first"]}
    config, after = study(tmp_path, tree)
    scores = Scores(after, config.seeds)
    assert scores.row("everything", "renamed") == {2: 0.5}
    assert scores.results[cell.fingerprint]["task"] == "renamed"


def test_names_become_folders_in_the_study_whatever_is_in_them(tmp_path: Path) -> None:
    tree = settings(tmp_path)
    rows = ["a b", "a-b", "\N{HANGUL SYLLABLE HAN}" * 300, "../../x", "..", "*"]
    tree["rows"] = {name: {"train": {"epochs": 3 + i}} for i, name in enumerate(rows)}
    tree["models"] = {"../../up": SMALL}
    config, places = read(tmp_path, tree)
    (outside,) = study_models(config, places).values()
    assert outside.folder.parent == tmp_path / "study" / "models"
    _, found = study(tmp_path, tree)
    folders = {cell.folder for cell in found.cells.values()}
    assert len(folders) == len(rows) * len(config.seeds)  # the tasks differ in what the rows set
    for folder in folders:
        assert folder.resolve().parents[2] == (tmp_path / "study" / "cells").resolve()
        folder.mkdir(parents=True)


def metrics(folder: Path, rows: dict[str, Any]) -> list[str]:
    config, places = read(folder, settings(folder, rows=rows))
    found = study_of(config, {"small": model()}, places)
    of_each = metrics_of(config, found, places)
    assert set(of_each) == set(found.cells)
    return [of_each[found.rows[row, "first", 1]] for row in rows]


def test_each_fine_tuning_is_scored_by_its_own_first_metric(tmp_path: Path) -> None:
    both = {"task": {"metrics": ["f1", "accuracy"]}}
    assert metrics(tmp_path, {"full": both, "b": both | {"train": {"epochs": 9}}}) == ["f1", "f1"]
    assert metrics(tmp_path, {"full": {}, "b": {"task": {"metrics": ["accuracy", "f1"]}}}) == ["accuracy", "accuracy"]


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"metrics": ["f1"]}, r"study.yaml:\d+: first is scored by accuracy and f1 in the rows 'full' and 'b'"),
        ({"metrics": ["f2"]}, r"study.yaml:\d+: task.metrics: 'f2' is not a metric"),
        (
            {"test": "validation.jsonl"},
            r"study.yaml:\d+: first has a task.test in only one of the rows 'full' and 'b'",
        ),
        ({"table": None, "data": "sst"}, r"study.yaml:\d+: task.data: 'sst' is not a data set; .* Did you mean sst2\?"),
    ],
)
def test_rows_that_cannot_be_compared_are_refused(task: dict[str, Any], message: str, tmp_path: Path) -> None:
    if "test" in task:
        task = {"test": str(tmp_path / task["test"])}
    with pytest.raises(UserError, match=message):
        metrics(tmp_path, {"full": {}, "b": {"task": task}})


SMALL = {
    "model": {"n_layer": 2, "n_head": 2, "n_embd": 32, "context": 32, "vocab_size": 400},
    "data": {"path": "text"},
    "train": {"steps": 4, "batch_tokens": 512, "micro_batch_size": 2, "lr": 0.01},
}


def test_a_model_is_trained_by_settings_in_the_study_or_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text(yaml.safe_dump({"out": "anywhere", **SMALL}))
    one, of_file = read(tmp_path, settings(tmp_path))
    other, of_study = read(tmp_path, settings(tmp_path, models={"small": SMALL}))
    (a,), (b,) = study_models(one, of_file).values(), study_models(other, of_study).values()
    assert a == b and a.blocks == 2 and a.folder == tmp_path / "study" / "models" / f"small-{a.fingerprint[:8]}"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"train": {**SMALL["train"], "step": 4}},
            r"study.yaml:\d+: train.step is not a setting. Did you mean train.steps\?",
        ),
        ({"out": "x"}, r"study.yaml:\d+: out is not set here: the study names the folders"),
        ({"data": None}, r"study.yaml:\d+: data must be a group of settings: path"),
    ],
)
def test_a_mistake_in_a_models_settings_is_told_with_its_line(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    config, places = read(tmp_path, settings(tmp_path, models={"small": SMALL | change}))
    with pytest.raises(UserError, match=message):
        study_models(config, places)


def test_zero_shot_needs_the_checkpoints_of_a_training_that_is_the_studys(tmp_path: Path) -> None:
    zero_shot = {"heuristics": {"sst2": "x"}}
    config, places = read(tmp_path, settings(tmp_path, models={"small": SMALL}, zero_shot=zero_shot))
    with pytest.raises(UserError, match=r"study.yaml:3: models.small: its train.save_every must be set"):
        study_models(config, places)
    saving = SMALL | {"train": {**SMALL["train"], "save_every": 3}}
    config, places = read(tmp_path, settings(tmp_path, models={"small": saving}, zero_shot=zero_shot))
    (found,) = study_models(config, places).values()
    assert found.training is not None and found.training.train.keep >= 2  # those of updates 3 and 4


@pytest.mark.parametrize("init", [False, True])
def test_a_model_before_its_first_update_is_what_its_training_starts_with(init: bool, tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["the cat saw the dog"] * 3, vocab_size=265)
    shape = ModelConfig.model_validate(SMALL["model"])
    start, end = (build_model(shape, load_ops("torch"), seed=seed) for seed in (8, 9))
    save_model(tmp_path / "start", start.state_dict(), shape, tokenizer)
    train = {**SMALL["train"], "seed": 8} | ({"init": str(tmp_path / "start"), "seed": 7} if init else {})
    config, places = read(tmp_path, settings(tmp_path, models={"small": SMALL | {"train": train}}))
    (found,) = study_models(config, places).values()
    save_model(found.folder, end.state_dict(), shape, tokenizer)
    make_untrained(found)
    written, its_tokenizer = load_model(found.folder / "untrained")
    assert its_tokenizer is not None
    for name, value in start.state_dict().items():
        assert torch.equal(value, written.state_dict()[name])


def test_a_model_that_is_there_is_pinned_and_must_have_a_tokenizer(tmp_path: Path) -> None:
    shape = ModelConfig.model_validate(SMALL["model"])
    state = build_model(shape, load_ops("torch")).state_dict()
    tokenizer = train_tokenizer(["the cat saw the dog"] * 3, vocab_size=265)
    save_model(tmp_path / "run/checkpoints/step-00000004/model", state, shape, tokenizer)
    write_manifest(tmp_path / "run/checkpoints/step-00000004", Manifest(4, {}, {}))
    save_model(tmp_path / "mute", state, shape, None)
    config, places = read(tmp_path, settings(tmp_path, models={"small": f"{tmp_path}/run"}))
    (found,) = study_models(config, places).values()
    # a training that goes on would have later fine-tunings start from other weights
    assert found.folder == tmp_path / "run/checkpoints/step-00000004/model"
    written = tmp_path / "hf" / "config.json"
    shutil.copytree(found.folder, written.parent)
    named, of_named = read(tmp_path, settings(tmp_path, models={"small": f"{tmp_path}/hf"}))
    assert study_models(named, of_named)["small"].fingerprint == found.fingerprint
    written.write_text(written.read_text().replace('"n_head": 2', '"n_head": 4'))  # the same weights are another model
    assert study_models(named, of_named)["small"].fingerprint != found.fingerprint
    config, places = read(tmp_path, settings(tmp_path, models={"small": f"{tmp_path}/mute"}))
    with pytest.raises(UserError, match=r"study.yaml:3: models.small: .*mute: it has no tokenizer"):
        study_models(config, places)


def test_the_curve_over_updates_is_that_of_an_undisturbed_training_and_what_lacks_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    small = SMALL | {"train": {**SMALL["train"], "steps": 9, "save_every": 4}}
    tree = settings(tmp_path, models={"small": small}, zero_shot={"heuristics": {"sst2": "x"}})
    config, places = read(tmp_path, tree)
    (found,) = study_models(config, places).values()
    for step in (4, 5, 7, 8, 9):  # 5 and 7 are of interruptions
        (found.folder / f"checkpoints/step-{step:08d}").mkdir(parents=True)
        write_manifest(found.folder / f"checkpoints/step-{step:08d}", Manifest(step, {}, {}))
    (found.folder / "summary.json").write_text("{}")
    assert found.training is not None and found.training.train.keep >= 5
    assert [point.step for point in points(config, {"small": found}, "digest")] == [0, 4, 8, 9]
    assert not caplog.records
    shutil.rmtree(found.folder / "checkpoints/step-00000004")
    assert [point.step for point in points(config, {"small": found}, "digest")] == [0, 8, 9]
    assert "no checkpoint is kept after 4 updates" in caplog.text
