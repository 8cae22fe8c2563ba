"""`fastgpt finetune` and `fastgpt predict` as a user runs them, on a task that a small model can learn."""

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import fastgpt
from fastgpt.cli import main
from fastgpt.finetune_config import SPECIAL_TOKENS
from fastgpt.model import GPT
from fastgpt.task_folder import OUTPUT_LAYER, load_task_model
from tests.train.examples import rewind, write_examples

Command = Callable[..., subprocess.CompletedProcess[str]]

SETTINGS = """\
out: {folder}/run
pretrained: given on the command line
task:
  table: {{kind: classification, format: jsonl, text: [text], label: label, labels: {{0: w, 1: v}}}}
  train: {folder}/train.jsonl
  validation: {folder}/validation.jsonl
  lm_weight: 0.05
train: {{epochs: 3, batch_size: 16, micro_batch_size: 8, lr: 1e-2, optimizer: adamw}}
engine: {{threads: 1, precision: fp32}}
"""
UPDATES, EPOCH = 30, 10


@pytest.fixture(scope="module")
def pretrained(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pretrained") / "run"
    words = ["engine.precision=fp32", "train.steps=2", "train.eval_every=null", "train.sample_tokens=0"]
    assert main(["train", str(tiny), f"out={folder}", *words]) == 0
    return folder


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of settings, its examples beside it."""
    folder = tmp_path_factory.mktemp("task")
    write_examples(folder / "train.jsonl", 170, seed=1)
    write_examples(folder / "validation.jsonl", 41, seed=2)
    path = folder / "task.yaml"
    path.write_text(SETTINGS.format(folder=folder))
    return path


@pytest.fixture(scope="module")
def run(pretrained: Path, settings: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    folder = tmp_path_factory.mktemp("tuned") / "run"
    words = [f"task.test={settings.parent / 'validation.jsonl'}", "train.keep=5"]
    assert main(["finetune", str(pretrained), str(settings), f"out={folder}", *words]) == 0
    return folder


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_it_learns_the_task_and_records_what_training_records(run: Path) -> None:
    rows = records(run)
    assert [r["step"] for r in rows if r["split"] == "train"] == list(range(1, UPDATES + 1))
    validations = [r for r in rows if r["split"] == "validation"]
    assert [r["step"] for r in validations] == [0, EPOCH, 2 * EPOCH, UPDATES]
    assert validations[0]["accuracy"] < 0.8 and validations[-1]["accuracy"] > 0.95
    assert validations[-1]["loss"] < 0.3 < validations[0]["loss"]
    keys = {"step", "split", "loss", "tokens", "learning_rate", "grad_norm", "tokens_per_second"}
    assert all(keys <= set(r) for r in rows if r["split"] == "train")
    # GPT-1's schedule: the first update has rate 0, then it falls in a line
    assert [r["learning_rate"] for r in rows if r["split"] == "train"][:3] == pytest.approx(
        [0, 1e-2 * 29 / 30, 1e-2 * 28 / 30]
    )
    assert list((run / "tensorboard").iterdir())


def test_the_best_model_is_kept_and_tested(run: Path) -> None:
    validations = [r for r in records(run) if r["split"] == "validation" and r["step"]]
    best = max(validations, key=lambda r: r["accuracy"])  # the first of equals
    kept = json.loads((run / "best" / "validation.json").read_text())
    summary = json.loads((run / "summary.json").read_text())
    assert kept == best == summary["best"]
    # the test examples are those of validation: the model that is tested is the best one
    assert summary["test"]["accuracy"] == best["accuracy"]
    assert summary["test"]["loss"] == pytest.approx(best["loss"], rel=1e-6)
    model, tokenizer = fastgpt.load_model(run)
    assert tokenizer is not None and model.config.vocab_size == 400 + SPECIAL_TOKENS


def test_the_same_command_again_has_nothing_to_do(
    run: Path, pretrained: Path, settings: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"task.test={settings.parent / 'validation.jsonl'}", "train.keep=5"]
    assert main(["finetune", str(pretrained), str(settings), f"out={run}", *words]) == 0
    assert f"{run}: finished at step {UPDATES}; nothing to do" in capsys.readouterr().out


@pytest.mark.parametrize("step", [EPOCH, 2 * EPOCH])
def test_a_run_goes_on_bit_for_bit(step: int, run: Path, pretrained: Path, settings: Path, tmp_path: Path) -> None:
    again = tmp_path / "run"
    rewind(run, again, step)
    with (again / "metrics.jsonl").open("a") as file:
        file.write('{"step": 31, "spl')  # as a crash leaves it
    words = [f"task.test={settings.parent / 'validation.jsonl'}", "train.keep=5", "--resume"]
    assert main(["finetune", str(pretrained), str(settings), f"out={again}", *words]) == 0
    timed = ("tokens_per_second", "examples_per_second")
    once, twice = ([{k: v for k, v in r.items() if k not in timed} for r in records(folder)] for folder in (run, again))
    assert once == twice
    for name in ("model.safetensors", "task_head.safetensors"):
        last = f"checkpoints/step-{UPDATES:08d}/model/{name}"
        for path in (last, f"best/{name}"):
            first, second = (load_file(folder / path) for folder in (run, again))
            assert all(torch.equal(tensor, second[key]) for key, tensor in first.items()), path


def test_it_predicts_what_it_has_learnt(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "new.jsonl"
    labels = write_examples(data, 29, seed=3, labelled=False)
    assert main(["predict", str(run), str(data), "--batch-size", "8", "--out", str(tmp_path / "out.jsonl")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [r["place"] for r in rows] == [f"{data}:{number}" for number in range(1, 30)]
    right = [row["prediction"] == "wv"[label] for row, label in zip(rows, labels, strict=True)]
    assert sum(right) >= 28
    for row in rows:
        assert set(row["probabilities"]) == {"w", "v"} and sum(row["probabilities"].values()) == pytest.approx(1)
        assert row["prediction"] == max(row["probabilities"], key=row["probabilities"].get)
    # to standard output, and with labels that are not asked for
    write_examples(data, 3, seed=3)
    assert main(["predict", str(run), str(data)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_a_model_of_another_task_is_started_from_without_its_output_layer(
    run: Path, settings: Path, tmp_path: Path
) -> None:
    scored = tmp_path / "scored.jsonl"
    chance = random.Random(4)
    rows = [{"a": f"w{i % 5} w7", "b": f"w{chance.randrange(5)} w{i % 3}", "score": i % 5} for i in range(40)]
    scored.write_text("".join(json.dumps(row) + "\n" for row in rows))
    other = tmp_path / "similar.yaml"
    other.write_text(
        f"""\
out: {tmp_path}/run
pretrained: x
task:
  table: {{kind: similarity, format: jsonl, text: [a, b], label: score, score: [0, 4]}}
  train: {scored}
  validation_fraction: 0.25
train: {{epochs: 1, batch_size: 4, micro_batch_size: 2, lr: 1e-3, eval_every: 3}}
engine: {{threads: 1, precision: fp32}}
"""
    )
    assert main(["finetune", str(run), str(other)]) == 0
    rows = records(tmp_path / "run")
    assert {"pearson", "spearman"} <= set(rows[-1]) and rows[-1]["examples"] == 10
    assert [r["step"] for r in rows if r["split"] == "validation"] == [0, 3, 6, 7]
    # the three special tokens are there already
    model, _ = fastgpt.load_model(tmp_path / "run")
    assert model.config.vocab_size == 400 + SPECIAL_TOKENS
    assert main(["predict", str(tmp_path / "run"), str(scored), "--out", str(tmp_path / "p.jsonl")]) == 0
    assert all(set(json.loads(row)) == {"place", "prediction"} for row in (tmp_path / "p.jsonl").open())


def test_a_task_of_before_there_were_hidden_layers_is_read(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(run / "best", folder)
    settings = json.loads((folder / "task.json").read_text())
    assert settings["output_layer"].pop("head_units") is None
    (folder / "task.json").write_text(json.dumps(settings))
    model, _, tuned = load_task_model(folder)
    assert tuned.shape.head_units is None and isinstance(model, GPT)


def test_gradual_unfreezing_trains_the_output_layer_first_and_lower_levels_more_slowly(
    pretrained: Path, settings: Path, tmp_path: Path
) -> None:
    words = ["train.unfreeze=gradual", "train.layer_lr_decay=2.6", "train.schedule=slanted", "train.warmup_share=0.1"]
    words += ["train.min_lr=1e-4", "train.keep=5", "task.pooling=concat", f"out={tmp_path / 'run'}"]
    assert main(["finetune", str(pretrained), str(settings), *words]) == 0
    source, _ = fastgpt.load_model(pretrained)
    start = {name: p.detach() for name, p in source.named_parameters()}
    folders = sorted((tmp_path / "run" / "checkpoints").glob("step-*"))
    first, second, third = (load_file(folder / "model" / "model.safetensors") for folder in folders)
    for name, value in start.items():
        rows = len(value) if name == "token_embedding.weight" else None  # the special tokens are new
        assert torch.equal(first[name][:rows], value), name
        top = name.startswith(("blocks.1.", "final_norm"))
        assert torch.equal(second[name][:rows], value) is not top, name
        below = name.startswith("blocks.0.")
        assert torch.equal(third[name][:rows], value) is not (top or below), name
    heads = [load_file(folder / "model" / "task_head.safetensors")["task_head.weight"] for folder in folders]
    assert heads[0].shape == (2, 3 * 32) and not torch.equal(heads[0], heads[1])


def test_an_output_layer_alone_learns_from_a_model_that_stays_as_it_is(
    run: Path, settings: Path, tmp_path: Path
) -> None:
    words = ["train.unfreeze=output", "task.lm_weight=0", f"out={tmp_path / 'run'}"]
    assert main(["finetune", str(run), str(settings), *words]) == 0
    before, after = (load_file(folder / "best" / "model.safetensors") for folder in (run, tmp_path / "run"))
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    # the features are those of a model that has learnt the task
    validations = [r for r in records(tmp_path / "run") if r["split"] == "validation"]
    assert validations[-1]["accuracy"] > 0.95
    assert validations[-1]["loss"] < 0.1 * validations[0]["loss"]


@pytest.mark.distributed
def test_two_ranks_fine_tune_as_one_process_does(
    run: Path, pretrained: Path, settings: Path, tmp_path: Path, command: Command
) -> None:
    folder = tmp_path / "ranks"
    outcome = command(
        *("torchrun", "--nproc-per-node", "2", "-m", "fastgpt", "finetune", pretrained, settings),
        *(f"out={folder}", "engine.zero_stage=3", f"task.test={settings.parent / 'validation.jsonl'}"),
    )
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    for ours, theirs in zip(records(run), records(folder), strict=True):
        assert theirs["loss"] == pytest.approx(ours["loss"], rel=2e-4, abs=1e-5), ours["step"]
    assert json.loads((folder / "summary.json").read_text())["test"]["accuracy"] > 0.95


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_run_of_one_process_goes_on_at_every_stage_with_levels_trained_unlike(
    stage: int, pretrained: Path, settings: Path, tmp_path: Path, command: Command
) -> None:
    words = ["train.unfreeze=gradual", "train.layer_lr_decay=2.6", "train.keep=5"]
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    assert main(["finetune", str(pretrained), str(settings), f"out={whole}", *words]) == 0
    rewind(whole, moved, 2 * EPOCH)
    outcome = command(
        *("torchrun", "--nproc-per-node", "2", "-m", "fastgpt", "finetune", pretrained, settings, f"out={moved}"),
        *(*words, f"engine.zero_stage={stage}", "--resume"),
    )
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    for ours, theirs in zip(records(whole), records(moved), strict=True):
        assert theirs["loss"] == pytest.approx(ours["loss"], rel=1e-5), ours["step"]


MISTAKES = {
    "a setting that is not there": (["train.epoch=3"], "train.epoch is not a setting. Did you mean train.epochs?"),
    "no data": (["task.table=null"], "task.data must name a data set, or else task.table"),
    "a data set that is not there": (["task.table=null", "task.data=sst"], "'sst' is not a data set"),
    "a file that is not there": (["task.train=none.jsonl"], "none.jsonl"),
    "a metric that is not there": (['task.metrics=["acuracy"]'], "Did you mean accuracy?"),
    "a metric named twice": (['task.metrics=["f1", "f1"]'], "task.metrics: f1 is named twice"),
    "more epochs than anybody waits for": (["train.epochs=100000000"], "train.epochs must be an integer of at least 1"),
    "a metric of other tasks": (['task.metrics=["pearson"]'], "pearson is no metric of this task"),
    "a batch that is not whole": (["train.batch_size=12"], "must be a multiple of train.micro_batch_size (8), not 12"),
    "a batch that the examples do not fill": (["train.batch_size=176"], "the task has 170 to train on"),
    "more examples than there are": (["task.examples=1000"], "1000 are asked for, and there are 170"),
    "more blocks than there are": (["task.transfer_blocks=3"], "has 2 blocks; 3 of them cannot be transferred"),
    "compiled blocks": (["engine.compile=true"], "engine.compile is for training on text"),
    "a floor above the peak": (["train.min_lr=1"], "train.min_lr must be at most train.lr"),
}


@pytest.mark.parametrize("words, told", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line_and_nothing_is_written(
    words: list[str], told: str, pretrained: Path, settings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["finetune", str(pretrained), str(settings), f"out={tmp_path / 'run'}", *words]) == 2
    (line,) = [text for text in capsys.readouterr().err.splitlines() if "fastgpt: error" in text]
    assert told in line
    assert not (tmp_path / "run").exists()


def test_a_slip_in_deepspeeds_keys_is_one_line(
    pretrained: Path, settings: Path, tmp_path: Path, command: Command
) -> None:
    words = ["engine.kind=deepspeed", "engine.deepspeed.gradient_cliping=1", f"out={tmp_path / 'run'}"]
    outcome = command(sys.executable, "-m", "fastgpt", "finetune", pretrained, settings, *words)
    assert outcome.returncode == 2
    (line,) = [text for text in outcome.stderr.splitlines() if "fastgpt: error" in text]
    assert "engine.deepspeed.gradient_cliping" in line
    assert not (tmp_path / "run").exists()


def test_other_mistakes_are_one_line_too(
    pretrained: Path, settings: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"text": "w1 " * 40, "label": 0}) + "\n")
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "w1", "label": 0}\n{"text": "w1", "label": 2}\n')
    other_head = tmp_path / "other"
    shutil.copytree(run / "best", other_head)
    save_file({"task_head.weight": torch.zeros(3, 32), "task_head.bias": torch.zeros(3)}, other_head / OUTPUT_LAYER)
    new = f"out={tmp_path / 'x'}"
    tune = ["finetune", pretrained, settings, new]
    cases: list[tuple[list[Any], str]] = [
        (["finetune", "nowhere", settings, new], "nowhere: no such folder"),
        ([*tune, f"task.train={bad}"], f"{bad}:2"),
        ([*tune, f"task.train={long}", "task.too_long=refuse"], f"{long}:1"),
        ([*tune[:3], f"out={run}", "train.lr=1e-3", "train.epochs=4"], "cannot go on with these settings"),
        (["predict", pretrained, bad], "was not fine-tuned"),
        (["predict", run, "nothing.jsonl"], "nothing.jsonl"),
        (["predict", run, bad, "--batch-size", "0"], "--batch-size must be at least 1"),
        (["predict", run, bad, "--out", tmp_path], "is a folder; give a file"),
        (["predict", run, bad, "--device", "tpu"], "--device: 'tpu' is not known"),
        (["predict", run, bad, "--backend", "tritn"], "--backend: 'tritn' is not a kernel backend"),
        (["predict", run, bad, "--out", tmp_path / "none" / "out"], f"its folder {tmp_path / 'none'} is not there"),
        ([*tune[:3], f"out={pretrained}"], f"{pretrained}: holds a run of `fastgpt train`"),
        (["predict", other_head, bad], "size mismatch for task_head."),
    ]
    for words, told in cases:
        assert main([str(word) for word in words]) == 2, told
        (line,) = [text for text in capsys.readouterr().err.splitlines() if "fastgpt: error" in text]
        assert told in line
    assert not (tmp_path / "x").exists()
