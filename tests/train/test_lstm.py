"""An LSTM trains, generates, learns a task and resumes by the commands that a GPT does it by."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fastgpt_kernels import load_ops
from safetensors.torch import load_file

import fastgpt
from fastgpt.cli import main
from fastgpt.config import Config
from fastgpt.engine.prepare import prepare
from fastgpt.engine.ranks import Ranks
from fastgpt.model import LSTM
from fastgpt.model.build import new_model
from tests.train.examples import rewind, write_examples

Command = Callable[..., subprocess.CompletedProcess[str]]

SHAPE = ("model.kind=lstm", "model.n_head=null", "model.n_layer=1", "model.n_units=40")
PRETRAINING = (*SHAPE, "engine.precision=fp32", "train.steps=8", "train.save_every=4", "train.eval_every=4")
TASK = """\
out: {folder}/run
pretrained: given on the command line
task:
  table: {{kind: classification, format: jsonl, text: [text], label: label, labels: {{0: w, 1: v}}}}
  train: {folder}/train.jsonl
  validation: {folder}/validation.jsonl
  lm_weight: 0.01
  pooling: concat
  head_units: 16
train: {{epochs: 3, batch_size: 16, micro_batch_size: 8, lr: 3e-2, optimizer: adamw}}
engine: {{threads: 1, precision: fp32}}
"""
EPOCH = 5


def rows(folder: Path) -> list[dict[str, Any]]:
    """A run's records, without what depends on the clock."""
    timed = ("tokens_per_second", "examples_per_second")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in timed} for line in lines]


@pytest.fixture(scope="module")
def pretrained(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pretrained") / "run"
    assert main(["train", str(tiny), f"out={folder}", *PRETRAINING]) == 0
    return folder


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("task")
    write_examples(folder / "train.jsonl", 80, seed=1)
    write_examples(folder / "validation.jsonl", 24, seed=2)
    path = folder / "task.yaml"
    path.write_text(TASK.format(folder=folder))
    return path


@pytest.fixture(scope="module")
def tuned(pretrained: Path, settings: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tuned") / "run"
    assert main(["finetune", str(pretrained), str(settings), f"out={folder}", "train.keep=5"]) == 0
    return folder


def test_its_loss_falls_and_it_writes(pretrained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    losses = [row["loss"] for row in rows(pretrained) if row["split"] == "train"]
    assert losses[-1] < losses[0] - 0.2
    model, _ = fastgpt.load_model(pretrained)
    assert isinstance(model, LSTM) and model.config.n_units == 40 and model.config.n_head is None
    words = ["generate", str(pretrained), "--prompt", "w1 w2", "--max-tokens", "40", "--temperature", "0"]
    assert main(words) == 0
    assert capsys.readouterr().out.startswith("w1 w2")


def test_it_learns_a_task_through_a_hidden_layer_and_predicts(tuned: Path, settings: Path, tmp_path: Path) -> None:
    validations = [row for row in rows(tuned) if row["split"] == "validation"]
    assert validations[-1]["accuracy"] > 0.95 and validations[-1]["loss"] < validations[0]["loss"] / 2
    head = load_file(tuned / "best" / "task_head.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in head.items()} == {
        "task_head.hidden.weight": (16, 3 * 32),
        "task_head.hidden.bias": (16,),
        "task_head.output.weight": (2, 16),
        "task_head.output.bias": (2,),
    }
    data = settings.parent / "validation.jsonl"
    assert main(["predict", str(tuned), str(data), "--out", str(tmp_path / "out.jsonl")]) == 0
    found = [json.loads(line)["prediction"] for line in (tmp_path / "out.jsonl").open()]
    right = ["wv"[json.loads(line)["label"]] for line in data.open()]
    assert np.mean([a == b for a, b in zip(found, right, strict=True)]) == validations[-1]["accuracy"]


def test_training_and_fine_tuning_go_on_bit_for_bit(
    pretrained: Path, tuned: Path, tiny: Path, settings: Path, tmp_path: Path
) -> None:
    again, tuned_again = tmp_path / "pretrained", tmp_path / "tuned"
    rewind(pretrained, again, 4)
    assert main(["train", str(tiny), f"out={again}", *PRETRAINING, "--resume"]) == 0
    assert rows(again) == rows(pretrained)
    rewind(tuned, tuned_again, EPOCH)
    words = [str(pretrained), str(settings), f"out={tuned_again}", "train.keep=5", "--resume"]
    assert main(["finetune", *words]) == 0
    assert rows(tuned_again) == rows(tuned)
    for name in ("model.safetensors", "task_head.safetensors"):
        first, second = (load_file(folder / "best" / name) for folder in (tuned, tuned_again))
        assert all(torch.equal(tensor, second[key]) for key, tensor in first.items()), name


def test_layers_are_taken_over_and_unfrozen_level_by_level(pretrained: Path, settings: Path, tmp_path: Path) -> None:
    words = ["train.unfreeze=gradual", "train.keep=5", "task.transfer_blocks=0", "task.head_units=null"]
    assert main(["finetune", str(pretrained), str(settings), f"out={tmp_path / 'run'}", *words]) == 0
    source, _ = fastgpt.load_model(pretrained)
    folders = sorted((tmp_path / "run" / "checkpoints").glob("step-*"))
    first, second, third = (load_file(folder / "model" / "model.safetensors") for folder in folders)
    for name, old in source.named_parameters():
        table = name == "token_embedding.weight"
        rows = len(old) if table else None  # the special tokens are new
        assert torch.equal(first[name][:rows], old) is table, name  # of the other model the table alone
        assert torch.equal(first[name], second[name]) is table, name
        assert not torch.equal(second[name], third[name]), name


def test_a_cpu_without_bf16_of_its_own_is_told_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    shape = {"kind": "lstm", "n_layer": 1, "n_units": 4, "n_embd": 3, "context": 2, "vocab_size": 5}
    train = {"steps": 1, "batch_tokens": 2, "micro_batch_size": 1, "lr": 1e-3}
    config = Config.model_validate({"out": "unused", "model": shape, "data": {"path": "unused"}, "train": train})

    def made(precision: str) -> str:
        caplog.clear()
        prepare(
            lambda: new_model(config.model, load_ops("torch")),
            config,
            kind="single",
            precision=precision,
            device=torch.device("cpu"),
            ranks=Ranks(),
        )
        return caplog.text

    monkeypatch.setattr("fastgpt.engine.prepare._onednn_has_bf16", lambda: False)
    assert "oneDNN has no bf16 on this CPU" in made("bf16") and not made("fp32")
    monkeypatch.setattr("fastgpt.engine.prepare._onednn_has_bf16", lambda: True)
    assert not made("bf16")


def test_features_are_those_of_its_layers_and_of_its_projection(
    pretrained: Path, settings: Path, tmp_path: Path
) -> None:
    out = tmp_path / "f.npy"
    words = ["features", str(pretrained), str(settings), "--out", str(out), "--split", "validation"]
    found = []
    for layer in ("0", "1"):
        assert main([*words, "--pooling", "mean", "--layer", layer]) == 0
        found.append(np.load(out))
    assert found[0].shape == found[1].shape == (24, 32) and not np.array_equal(*found)
    assert main([*words, "--pooling", "mean"]) == 0
    assert np.array_equal(np.load(out), found[1])


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("stage", [2, 3])
def test_two_ranks_fine_tune_as_one_process_does(
    stage: int, tuned: Path, pretrained: Path, settings: Path, tmp_path: Path, command: Command
) -> None:
    outcome = command(
        *("torchrun", "--nproc-per-node", "2", "-m", "fastgpt", "finetune", pretrained, settings),
        *(f"out={tmp_path / 'ranks'}", f"engine.zero_stage={stage}"),
    )
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    for ours, theirs in zip(rows(tuned), rows(tmp_path / "ranks"), strict=True):
        assert theirs["loss"] == pytest.approx(ours["loss"], rel=2e-4, abs=1e-5), ours["step"]
