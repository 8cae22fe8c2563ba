"""`fastgpt features`: the activations of a model that stays as it is, in the order of the examples."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from fastgpt_kernels import load_ops

import fastgpt
from fastgpt.cli import main
from fastgpt.config import ModelConfig
from fastgpt.model import build_model
from fastgpt.tasks import SpecialTokens

TEXTS = ["w1 w2 w3", "w4", "w5 w6", "w7 w8 w9 w1 w2", "w3 w3", "w2"]
SETTINGS = """\
out: {folder}/run
pretrained: x
task:
  table: {{kind: {kind}, format: jsonl, text: {text}, label: label, labels: [0, 1]}}
  train: {folder}/rows.jsonl
  validation: {folder}/rows.jsonl
"""


@pytest.fixture(scope="module")
def pretrained(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pretrained") / "run"
    words = ["engine.precision=fp32", "train.steps=1", "train.eval_every=null", "train.sample_tokens=0"]
    assert main(["train", str(tiny), f"out={folder}", *words]) == 0
    return folder


@pytest.fixture
def settings(tmp_path: Path) -> Path:
    rows = [{"a": text, "b": TEXTS[i - 1], "label": i % 2} for i, text in enumerate(TEXTS)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tmp_path / "task.yaml"
    path.write_text(SETTINGS.format(folder=tmp_path, kind="classification", text="[a]"))
    return path


def test_features_are_the_activations_of_each_example_alone(pretrained: Path, settings: Path, tmp_path: Path) -> None:
    out = tmp_path / "f.npy"
    words = ["features", str(pretrained), str(settings), "--out", str(out), "--batch-size", "4"]
    assert main([*words, "--pooling", "concat"]) == 0
    found, labels = np.load(out), np.load(tmp_path / "f.labels.npy")
    assert found.shape == (6, 3 * 32) and found.dtype == np.float32
    assert labels.tolist() == [0, 1, 0, 1, 0, 1] and labels.dtype == np.int64
    model, tokenizer = fastgpt.load_model(pretrained)
    assert tokenizer is not None
    # texts alone, by the weights that the model has for them; start and extract are new tokens, the same for all
    special = SpecialTokens.after(model.config.vocab_size)
    assert main([*words, "--pooling", "mean", "--layer", "0"]) == 0
    embedded = np.load(out)
    table, positions = (x.detach().numpy() for x in (model.token_embedding.weight, model.position_embedding.weight))
    for text, row in zip(TEXTS, embedded, strict=True):
        ids = tokenizer.encode(text)
        inner = sum(table[token] + positions[1 + place] for place, token in enumerate(ids))
        rest = row * (len(ids) + 2) - inner - positions[0] - positions[len(ids) + 1]
        if text == TEXTS[0]:
            of_special = rest
        np.testing.assert_allclose(rest, of_special, atol=1e-5)
    assert special.extract == model.config.vocab_size + 2


def test_an_example_of_two_sequences_has_two_rows(pretrained: Path, settings: Path, tmp_path: Path) -> None:
    settings.write_text(SETTINGS.format(folder=tmp_path, kind="similarity", text="[a, b]"))
    out = tmp_path / "f.npy"
    assert main(["features", str(pretrained), str(settings), "--out", str(out), "--split", "validation"]) == 0
    assert np.load(out).shape == (6, 2, 32)


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_activations_within_the_model_are_those_that_the_next_block_reads(
    norm: str,
) -> None:
    config = ModelConfig.model_validate(
        {"n_layer": 3, "n_head": 2, "n_embd": 16, "context": 8, "vocab_size": 30, "norm": norm}
    )
    model = build_model(config, load_ops("torch"), seed=1).eval()
    tokens = torch.arange(12).reshape(2, 6)
    whole = model.hidden(tokens)
    torch.testing.assert_close(model.hidden(tokens, blocks=3), whole)
    # a model of so many blocks, which has no norm after them where the stream is not normalised
    for blocks in (0, 1, 2):
        shorter = build_model(config.model_copy(update={"n_layer": max(1, blocks)}), load_ops("torch")).eval()
        state = {name: x for name, x in model.state_dict().items() if name in shorter.state_dict()}
        shorter.load_state_dict(state)
        found = model.hidden(tokens, blocks=blocks)
        if blocks == 0:
            table, positions = model.token_embedding.weight, model.position_embedding.weight
            torch.testing.assert_close(found, table[tokens] + positions[:6])
        else:
            normed = found
            if norm == "pre":
                normed = torch.nn.functional.layer_norm(found, (16,), *shorter.final_norm.parameters())
            torch.testing.assert_close(normed, shorter.hidden(tokens), rtol=1e-4, atol=1e-5)


MISTAKES: dict[str, tuple[list[str], str]] = {
    "a layer that is not there": (["--layer", "3"], "--layer must be from 0 to 2, the model's blocks, not 3"),
    "a pooling that is not there": (["--pooling", "max"], "--pooling: 'max' is not one of extract, mean, concat"),
    "a split that is not there": (["--split", "tests"], "Did you mean test?"),
    "no test": (["--split", "test"], "the settings name no task.test"),
    "no example at a time": (["--batch-size", "0"], "--batch-size must be at least 1, not 0"),
    "another suffix": (["--out", "f.txt"], "must be a file NAME.npy"),
    "a device that is not there": (["--device", "tpu"], "--device: 'tpu' is not known"),
}


@pytest.mark.parametrize(("words", "told"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line_and_nothing_is_written(
    words: list[str],
    told: str,
    pretrained: Path,
    settings: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    assert main(["features", str(pretrained), str(settings), "--out", "f.npy", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert told in line
    assert sorted(tmp_path.iterdir()) == before
