"""`fastgpt evaluate` as a user runs it."""

import json
from pathlib import Path
from typing import Any

import pytest
from fastgpt_kernels import load_ops

from fastgpt.arguments import parser
from fastgpt.checkpoint.store import CheckpointStore
from fastgpt.cli import main
from fastgpt.config import ModelConfig
from fastgpt.evaluate.heuristics import HEURISTICS, evaluate_heuristic
from fastgpt.load import load_model, save_model
from fastgpt.model import build_model
from fastgpt.tokenizer import train_tokenizer

WINOGRAD = "The cat saw the dog because {} was near.\n[MASK]\nthe cat,the dog\nthe dog\n\n"


class OneRank:
    rank = 0

    def barrier(self) -> None:
        pass

    def gather(self, value: Any) -> list[Any]:
        return [value]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a run with a checkpoint of it after 7 updates, and data of two heuristics."""
    folder = tmp_path_factory.mktemp("evaluate")
    tokenizer = train_tokenizer(["the cat saw the dog"] * 3, vocab_size=265)
    config = ModelConfig(n_layer=1, n_head=2, n_embd=16, context=32, vocab_size=265)
    model = build_model(config, load_ops("torch"))
    save_model(folder / "model", model.state_dict(), config, tokenizer)
    store = CheckpointStore(folder / "run" / "checkpoints")
    store.save(7, {}, [lambda part: save_model(part / "model", model.state_dict(), config, tokenizer)], OneRank())
    save_model(folder / "mute", model.state_dict(), config, None)
    (folder / "wsc.txt").write_text(WINOGRAD.format("[MASK]"))
    (folder / "bad.txt").write_text(WINOGRAD.format("it"))
    (folder / "empty.tsv").write_text("")
    (folder / "cola.tsv").write_text("".join(f"x\t{row % 2}\t\tthe cat saw {row}\n" for row in range(30)))
    return folder


def test_a_line_for_each_heuristic_and_all_of_it_as_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = folder / "out.json"
    words = ["--heuristic", f"winograd={folder / 'wsc.txt'}", "--heuristic", f"cola={folder / 'cola.tsv'}"]
    assert main(["evaluate", str(folder / "run"), *words, "--examples", "20", "--seed", "3", "--out", str(out)]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("winograd  accuracy ") and "(random 0.5000)  1 examples" in first
    assert second.startswith("cola  matthews ") and "  20 examples  " in second
    found = json.loads(out.read_text())
    assert (found["model"], found["step"]) == (str(folder / "run"), 7)
    model, tokenizer = load_model(folder / "model")
    assert found["heuristics"] == [
        evaluate_heuristic(model, tokenizer, "winograd", folder / "wsc.txt"),
        evaluate_heuristic(model, tokenizer, "cola", folder / "cola.tsv", examples=20, seed=3),
    ]


@pytest.mark.parametrize(
    ("model", "step"),
    [("run/checkpoints/step-00000007", 7), ("run/checkpoints/step-00000007/model", 7), ("model", None)],
)
def test_the_step_is_that_of_the_checkpoint(folder: Path, tmp_path: Path, model: str, step: int | None) -> None:
    out = tmp_path / "out.json"
    heuristic = f"winograd={folder / 'wsc.txt'}"
    assert main(["evaluate", str(folder / model), "--heuristic", heuristic, "--out", str(out)]) == 0
    assert json.loads(out.read_text())["step"] == step


def test_help_names_the_heuristics(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parser().parse_args(["evaluate", "--help"])
    assert ", ".join(HEURISTICS) in " ".join(capsys.readouterr().out.split())


# what is wrong -> (the words after the model, which is not there, and what is told); {F} is the folder
MISTAKES = {
    "no heuristic": ("", "give a --heuristic NAME=FILE at least; names: cola, sst2"),
    "no file": ("--heuristic cola", "--heuristic: must be NAME=FILE, not 'cola'; names: cola, sst2"),
    "an empty file name": ("--heuristic cola=", "must be NAME=FILE, not 'cola='"),
    "no name": ("--heuristic ={F}/wsc.txt", "--heuristic: must be NAME=FILE"),
    "an unknown heuristic": ("--heuristic winogrand={F}/wsc.txt", "Did you mean winograd?"),
    "a missing file": ("--heuristic cola={F}/cole.tsv", "{F}/cole.tsv: no such file. Did you mean cola.tsv?"),
    "an empty file": ("--heuristic sst2={F}/empty.tsv", "{F}/empty.tsv: the file is empty"),
    "a bad row": ("--heuristic winograd={F}/bad.txt", "{F}/bad.txt:1: 0 times [MASK]"),
    "no examples": ("--heuristic cola={F}/cola.tsv --examples 0", "--examples must be at least 1, not 0"),
    "no batch": ("--heuristic cola={F}/cola.tsv --batch-size 0", "--batch-size must be at least 1, not 0"),
    "out of place": ("--heuristic cola={F}/cola.tsv --out {F}/no/o", "its folder {F}/no is not there"),
    "out is a folder": ("--heuristic cola={F}/cola.tsv --out {F}", "{F} is a folder; give a file"),
    "a device": ("--heuristic cola={F}/cola.tsv --device tpu", "--device: 'tpu' is not known"),
    "a backend": ("--heuristic cola={F}/cola.tsv --backend tritn", "--backend: 'tritn' is not a kernel backend"),
    "no model": ("--heuristic cola={F}/cola.tsv", "{F}/none: no such folder"),
}


def refused(capsys: pytest.CaptureFixture[str], folder: Path, *words: str) -> str:
    """The one line of a command that must be refused, and that writes nothing."""
    before = sorted(folder.rglob("*"))
    assert main(["evaluate", *words]) == 2
    output = capsys.readouterr()
    (line,) = output.err.splitlines()
    assert line.startswith("fastgpt: error: ")
    assert output.out == ""
    assert sorted(folder.rglob("*")) == before
    return line


@pytest.mark.parametrize(("words", "told"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line_told_before_the_model_is_looked_for(
    folder: Path, capsys: pytest.CaptureFixture[str], words: str, told: str
) -> None:
    line = refused(capsys, folder, str(folder / "none"), *(word.format(F=folder) for word in words.split()))
    assert told.format(F=folder) in line


def test_a_model_without_tokenizer_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, folder, str(folder / "mute"), "--heuristic", f"cola={folder / 'cola.tsv'}")
    assert f"{folder / 'mute'}: it has no tokenizer" in line
