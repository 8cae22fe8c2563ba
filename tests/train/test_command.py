"""`fastgpt train` and `fastgpt generate` as a user runs them."""

import json
import math
import os
import pty
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import fastgpt
from fastgpt.cli import main

Command = Callable[..., subprocess.CompletedProcess[str]]
Losses = Callable[[Path], dict[tuple[int, str], float]]

FASTGPT = (sys.executable, "-m", "fastgpt")


class Finished(NamedTuple):
    """A run folder, and what the command printed."""

    folder: Path
    printed: str


@pytest.fixture(scope="module")
def finished(tiny: Path, tmp_path_factory: pytest.TempPathFactory, command: Command) -> Finished:
    """An fp32 run of one process."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    outcome = command(*FASTGPT, "train", tiny, f"out={folder}", "engine.precision=fp32")
    assert outcome.returncode == 0, outcome.stderr
    return Finished(folder, outcome.stdout)


@pytest.fixture(scope="module")
def run(finished: Finished) -> Path:
    """The folder of a finished run."""
    return finished.folder


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_every_update_and_validation_is_recorded(run: Path) -> None:
    rows = records(run)
    assert [r["step"] for r in rows if r["split"] == "train"] == list(range(1, 13))
    assert [r["step"] for r in rows if r["split"] == "validation"] == [0, 5, 10, 12]
    keys = {"step", "split", "loss", "tokens", "learning_rate", "grad_norm", "tokens_per_second"}
    assert all(keys <= set(r) for r in rows)
    assert all({"perplexity", "bits_per_byte"} <= set(r) for r in rows if r["split"] == "validation")
    assert [r["tokens"] for r in rows if r["split"] == "train"] == [512 * n for n in range(1, 13)]


def test_a_growing_batch_is_recorded_in_tokens_and_resumed_exactly(tiny: Path, tmp_path: Path, losses: Losses) -> None:
    words = [str(tiny), "engine.precision=fp32", "train.schedule=constant", "train.sample_tokens=0"]
    words += ["train.batch_ramp_start=128", "train.batch_ramp_tokens=1500"]
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert main(["train", *words, f"out={whole}"]) == 0
    for steps in (4, 12):  # the batch changes with the fifth update
        assert main(["train", *words, f"out={halves}", f"train.steps={steps}"]) == 0
    rows = [r["tokens"] for r in records(whole) if r["split"] == "train"]
    sizes = [after - before for before, after in pairwise([0, *rows])]
    assert sizes == [128, 128, 128, 128, 256, 256, 384, 384, 512, 512, 512, 512]
    again = losses(halves)
    assert {key: loss for key, loss in losses(whole).items() if key in again and key[1] == "train"} == {
        key: loss for key, loss in again.items() if key[1] == "train"
    }
    assert len([key for key in again if key[1] == "train"]) == 12


def test_validation_figures_agree_with_each_other(run: Path) -> None:
    for row in (r for r in records(run) if r["split"] == "validation"):
        assert row["perplexity"] == pytest.approx(math.exp(row["loss"]))
        nats = row["loss"] * row["predicted_tokens"]
        assert row["bits_per_byte"] == pytest.approx(nats / math.log(2) / row["bytes"])
        assert row["sample"]


def test_it_learns(run: Path) -> None:
    rows = [r["loss"] for r in records(run) if r["split"] == "validation"]
    assert rows[0] == pytest.approx(math.log(400), rel=0.05)  # an untrained model knows nothing
    assert rows[-1] < rows[0] - 1


def test_the_run_folder_holds_what_it_promises(run: Path) -> None:
    assert {p.name for p in run.iterdir()} == {
        "config.yaml",
        "metrics.jsonl",
        "tensorboard",
        "checkpoints",
        "summary.json",
    }
    config = fastgpt.load_config(run / "config.yaml")
    assert (config.engine.precision, config.kernels.backend) == ("fp32", "torch")
    assert (run / "checkpoints" / "latest").read_text().strip() == "step-00000012"
    summary = json.loads((run / "summary.json").read_text())
    assert set(summary["compressors_bits_per_byte"]) == {"gzip", "bz2", "xz"}


def test_no_checkpoint_file_is_a_pickle(run: Path) -> None:
    suffixes = {p.suffix for p in (run / "checkpoints").rglob("*") if p.is_file()}
    assert suffixes <= {".json", ".safetensors", ".txt", ""}


def test_the_model_in_the_checkpoint_is_the_one_that_was_validated(run: Path) -> None:
    model, tokenizer = fastgpt.load_model(run)
    assert tokenizer is not None
    last = [r for r in records(run) if r["split"] == "validation"][-1]
    from fastgpt.data.evaluation import validation_windows
    from fastgpt.data.shards import TokenShards

    config = fastgpt.load_config(run / "config.yaml")
    cache = Path(config.data.cache or "")
    shards = TokenShards.open(next(cache.iterdir()), "validation")
    total = 0.0
    for batch in validation_windows(shards, 32, 2, limit=1000):
        inputs, targets = torch.from_numpy(batch.inputs), torch.from_numpy(batch.targets)
        with torch.no_grad():
            total += float(model(inputs, targets=targets, reduction="sum"))
    assert total / 1000 == pytest.approx(last["loss"], rel=1e-5)


def test_a_finished_run_says_so_and_changes_nothing(run: Path, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*")}
    assert main(["train", str(tiny), f"out={run}", "engine.precision=fp32"]) == 0
    assert "finished at step 12; nothing to do" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*")} == before


def test_a_repeat_gives_the_same_losses(run: Path, tiny: Path, tmp_path: Path, losses: Losses) -> None:
    assert main(["train", str(tiny), f"out={tmp_path / 'again'}", "engine.precision=fp32"]) == 0
    assert losses(tmp_path / "again") == losses(run)


def test_generate_streams_text_and_repeats_it(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", str(run), "--prompt", "w1 w2", "--max-tokens", "12", "--seed", "3"]
    assert main(words) == 0
    first = capsys.readouterr().out
    assert first.startswith("w1 w2")
    assert len(first) > len("w1 w2\n")
    assert main(words) == 0
    assert capsys.readouterr().out == first
    assert main([*words[:-1], "4"]) == 0
    assert capsys.readouterr().out != first


def test_gpt1_form_trains(tiny: Path, tmp_path: Path, losses: Losses) -> None:
    words = ["model.norm=post", "train.schedule=gpt1", "train.activation_checkpointing=true"]
    assert main(["train", str(tiny), f"out={tmp_path / 'post'}", *words]) == 0
    rows = losses(tmp_path / "post")
    assert rows[12, "validation"] < rows[0, "validation"]


def test_a_terminal_gets_a_bar(tiny: Path, tmp_path: Path, environment: dict[str, str]) -> None:
    ours, theirs = pty.openpty()
    words = [*FASTGPT, "train", str(tiny), f"out={tmp_path / 'bar'}", "train.steps=4"]
    process = subprocess.Popen(
        words, stdout=theirs, stderr=theirs, env=environment | {"COLUMNS": "140", "TERM": "xterm-256color"}
    )
    os.close(theirs)
    shown = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:
            break
        if not part:
            break
        shown += part
    assert process.wait() == 0
    text = shown.decode(errors="replace")
    assert "━" in text
    assert "4/4" in text
    assert "tokens/s" in text


def test_without_a_terminal_there_are_plain_lines(finished: Finished) -> None:
    assert "step 12/12  loss" in finished.printed
    assert "\x1b" not in finished.printed
    assert "━" not in finished.printed


@pytest.mark.parametrize(
    "data",
    [pytest.param("text", id="text"), pytest.param("shards", id="shards")],
)
def test_shards_and_text_train_alike(data: str, tiny: Path, tmp_path: Path, run: Path, losses: Losses) -> None:
    """What `prepare` wrote and what `train` prepares by itself are the same tokens."""
    path = tiny.parent / "text.jsonl"
    if data == "shards":
        words = ["--vocab-size", "400", "--validation-fraction", "0.1", "--seed", "1337"]
        assert main(["prepare", str(path), str(tmp_path / "shards"), *words]) == 0
        path = tmp_path / "shards"
    words = [f"out={tmp_path / 'run'}", f"data.path={path}", "engine.precision=fp32"]
    assert main(["train", str(tiny), *words]) == 0
    assert losses(tmp_path / "run") == losses(run)


@pytest.mark.distributed
@pytest.mark.parametrize(
    "stage",
    # the updates of every stage are compared in tests/engine/test_engines.py
    [2, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (0, 1, 3))],
)
def test_the_deepspeed_launcher_trains_as_one_process_does(
    stage: int, run: Path, tiny: Path, tmp_path: Path, command: Command, losses: Losses
) -> None:
    """Dropout is on: masks do not depend on the number of ranks."""
    out = tmp_path / "run"
    outcome = command(
        "deepspeed", "--num_gpus", "2", "--master_port", str(29600 + stage), "--module", "fastgpt", "train", tiny,
        f"out={out}", f"engine.zero_stage={stage}", "engine.precision=fp32",
    )  # fmt: skip
    assert (out / "metrics.jsonl").exists(), outcome.stdout + outcome.stderr
    ours, single = losses(out), losses(run)
    assert ours.keys() == single.keys()
    assert max(abs(ours[k] - single[k]) for k in single) <= 1e-5


@pytest.mark.distributed
def test_deepspeed_on_one_rank_needs_no_launcher(
    run: Path, tiny: Path, tmp_path: Path, command: Command, losses: Losses
) -> None:
    out = tmp_path / "run"
    words = (f"out={out}", "engine.kind=deepspeed", "engine.precision=fp32")
    outcome = command(*FASTGPT, "train", tiny, *words)
    assert outcome.returncode == 0, outcome.stderr
    ours, single = losses(out), losses(run)
    assert ours.keys() == single.keys()
    assert max(abs(ours[k] - single[k]) for k in single) <= 1e-5


def test_a_diverged_run_stops_before_it_saves(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train.lr=1e30", "train.clip=null", "train.warmup_steps=0", "train.save_every=1", "engine.precision=fp32"]
    assert main(["train", str(tiny), f"out={tmp_path / 'run'}", *words]) == 2
    error = capsys.readouterr().err
    assert "the run has diverged" in error
    model, _ = fastgpt.load_model(tmp_path / "run")
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_a_run_that_another_process_trained_meanwhile_is_left_alone(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import fastgpt.train.command as train_command

    words = ["train", str(tiny), f"out={tmp_path / 'run'}"]
    prepare_corpus = train_command.prepare_corpus

    def slowly(*arguments: Any) -> Any:
        monkeypatch.setattr(train_command, "prepare_corpus", prepare_corpus)
        assert main(words) == 0
        return prepare_corpus(*arguments)

    monkeypatch.setattr(train_command, "prepare_corpus", slowly)
    assert main(words) == 2
    assert "another process has trained in it meanwhile" in capsys.readouterr().err
    assert len(records(tmp_path / "run")) == 12 + 4


def test_training_goes_on_from_another_models_weights_with_its_tokenizer(
    run: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(tiny), f"out={tmp_path / 'run'}", "engine.precision=fp32", "train.steps=2", "train.seed=5"]
    assert main(["train", *words, "--init", str(run)]) == 0
    before, after = (records(folder) for folder in (run, tmp_path / "run"))
    last = [r["loss"] for r in before if r["split"] == "validation"][-1]
    # the seed decides which documents validate, so that the text is not quite the same
    assert after[0]["step"] == 0 and after[0]["loss"] == pytest.approx(last, rel=0.05)
    assert after[0]["loss"] < before[0]["loss"] - 0.5
    capsys.readouterr()
    other = [*words[:1], f"out={tmp_path / 'other'}", "model.n_layer=3"]
    assert main(["train", *other, "--init", str(run)]) == 2
    assert "holds another model: model.n_layer is 3 and there 2" in capsys.readouterr().err
    assert main(["train", *other, "--init", str(tmp_path / "nothing")]) == 2
    assert "train.init: " in capsys.readouterr().err
