"""Which folder a command works in, and what it goes on from."""

import json
from pathlib import Path
from typing import Any

import pytest

from fastgpt.config import Config
from fastgpt.engine.ranks import Ranks
from fastgpt.errors import UserError
from fastgpt.finetune_config import FinetuneConfig
from fastgpt.train.folder import RunLock, keep_resolved, plan, save_config, shared_plan


def config(folder: Path, **changes: Any) -> Config:
    tree: dict[str, Any] = {
        "out": str(folder / "run"),
        "model": {"n_layer": 1, "n_head": 1, "n_embd": 16, "context": 8, "vocab_size": 300},
        "data": {"path": "stdlib"},
        "train": {"steps": 10, "batch_tokens": 16, "micro_batch_size": 2, "lr": 1.0},
        "engine": {},
    }
    for key, value in changes.items():
        section, name = key.split("__")
        tree[section][name] = value
    return Config.model_validate(tree)


def leave_run(folder: Path, settings: Config, step: int) -> None:
    """A run folder that stands at `step`."""
    save_config(folder, settings)
    checkpoint = folder / "checkpoints" / f"step-{step:08d}"
    checkpoint.mkdir(parents=True)
    (folder / "summary.json").write_text("{}")
    (checkpoint / "manifest.json").write_text(json.dumps({"format": 1, "step": step, "state": {}, "files": {}}))


def test_an_empty_folder_is_a_fresh_start(tmp_path: Path) -> None:
    decision = plan(config(tmp_path))
    assert (decision.folder, decision.resume, decision.finished) == (tmp_path / "run", False, False)


def test_an_unfinished_run_goes_on(tmp_path: Path) -> None:
    leave_run(tmp_path / "run", config(tmp_path), 5)
    decision = plan(config(tmp_path))
    assert (decision.folder, decision.resume, decision.changes) == (tmp_path / "run", True, ())


def test_a_finished_run_has_nothing_to_do(tmp_path: Path) -> None:
    leave_run(tmp_path / "run", config(tmp_path), 10)
    assert plan(config(tmp_path)).finished


def test_more_steps_go_on_from_a_finished_run(tmp_path: Path) -> None:
    leave_run(tmp_path / "run", config(tmp_path), 10)
    decision = plan(config(tmp_path, train__steps=20))
    assert decision.resume
    assert decision.changes == ("train.steps was 10, is 20",)


def test_compiling_from_now_on_goes_on_and_is_told(tmp_path: Path) -> None:
    leave_run(tmp_path / "run", config(tmp_path), 5)
    decision = plan(config(tmp_path, engine__compile=True))
    assert (decision.resume, decision.changes) == (True, ("engine.compile was False, is True",))


def test_a_run_from_before_there_was_a_compiler_goes_on_without_one(tmp_path: Path) -> None:
    leave_run(tmp_path / "run", config(tmp_path), 5)
    path = tmp_path / "run" / "config.yaml"
    path.write_text(path.read_text().replace("  compile: false\n", ""))
    assert plan(config(tmp_path)).changes == ()


def test_another_stage_goes_on_from_an_unfinished_run(tmp_path: Path) -> None:
    leave_run(tmp_path / "run", config(tmp_path), 5)
    assert plan(config(tmp_path, engine__zero_stage=3)).resume


def test_another_run_in_a_finished_folder_gets_its_own_and_finds_it_again(tmp_path: Path) -> None:
    leave_run(tmp_path / "run", config(tmp_path), 10)
    other = config(tmp_path, train__steps=4)
    assert plan(other).folder == tmp_path / "run-2"
    leave_run(tmp_path / "run-2", other, 2)
    assert plan(other)[:2] == (tmp_path / "run-2", True)
    third = config(tmp_path, train__steps=2, engine__zero_stage=2)
    assert plan(third).folder == tmp_path / "run-3"
    assert plan(config(tmp_path)).finished


def test_a_finished_run_without_its_summary_goes_on_to_write_it(tmp_path: Path) -> None:
    leave_run(tmp_path / "run", config(tmp_path), 10)
    (tmp_path / "run" / "summary.json").unlink()
    assert plan(config(tmp_path)).resume


def test_a_finished_run_whose_last_checkpoint_is_damaged_goes_on_from_the_one_before(tmp_path: Path) -> None:
    leave_run(tmp_path / "run", config(tmp_path), 5)
    leave_run(tmp_path / "run", config(tmp_path), 10)
    manifest = tmp_path / "run" / "checkpoints" / "step-00000010" / "manifest.json"
    manifest.write_text(manifest.read_text().replace("{}}", '{"lost": {"bytes": 1, "sha256": ""}}}'))
    assert plan(config(tmp_path)).resume


def test_checkpoints_without_a_manifest_are_no_fresh_start(tmp_path: Path) -> None:
    leave_run(tmp_path / "run", config(tmp_path), 5)
    (tmp_path / "run" / "checkpoints" / "step-00000005" / "manifest.json").unlink()
    assert plan(config(tmp_path)).resume


@pytest.mark.parametrize(
    "change",
    [
        {"data__verify": False},
        {"data__cache": "elsewhere"},
        {"engine__threads": 7},
        {"engine__cuda_graph": False},
        {"train__activation_checkpointing": True},
        {"train__keep": 9},
    ],
    ids=lambda c: next(iter(c)),
)
def test_settings_that_change_no_number_do_not_start_another_run(change: dict[str, Any], tmp_path: Path) -> None:
    leave_run(tmp_path / "run", config(tmp_path), 10)
    assert plan(config(tmp_path, **change)).finished


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model__n_embd": 32}, "model.n_embd was 16, is 32"),
        ({"model__norm": "post"}, "model.norm was pre, is post"),
        ({"model__embedding": "table"}, "model.embedding was separate, is table"),
        ({"model__attention": "alternating", "model__window": 3}, "model.window was None, is 3"),
        ({"train__seed": 3}, "train.seed was 1337, is 3"),
        ({"train__batch_ramp_tokens": 50, "train__batch_ramp_start": 16}, "train.batch_ramp_tokens was None, is 50"),
        ({"train__batch_tokens": 32}, "train.batch_tokens was 16, is 32"),
    ],
)
def test_a_run_that_cannot_go_on_is_refused(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    leave_run(tmp_path / "run", config(tmp_path), 5)
    with pytest.raises(UserError) as caught:
        plan(config(tmp_path, **change))
    assert said in str(caught.value)


def test_resume_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no checkpoint"):
        plan(config(tmp_path), must_resume=True)


def test_what_auto_came_to_is_kept(tmp_path: Path) -> None:
    saved = config(tmp_path, engine__precision="bf16", engine__threads=3)
    kept = keep_resolved(config(tmp_path), saved)
    assert (kept.engine.precision, kept.engine.threads) == ("bf16", 3)
    asked = keep_resolved(config(tmp_path, engine__precision="fp32"), saved)
    assert asked.engine.precision == "fp32"


def test_auto_is_no_change(tmp_path: Path) -> None:
    leave_run(tmp_path / "run", config(tmp_path, engine__precision="bf16"), 10)
    assert plan(config(tmp_path)).finished


def test_ranks_follow_the_plan_of_the_first_and_do_not_look_themselves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_run(tmp_path / "run", config(tmp_path, engine__precision="bf16"), 5)
    asked = config(tmp_path, train__lr=0.5)
    first = Ranks()
    told: list[str] = []
    monkeypatch.setattr(first, "on_first", lambda work: told.append(json.dumps(work())) or json.loads(told[0]))
    made = shared_plan(first, asked)
    assert made == plan(asked) and made.changes == ("train.lr was 1.0, is 0.5",) and made.newest == 5
    other = Ranks()
    monkeypatch.setattr(other, "on_first", lambda work: json.loads(told[0]))
    monkeypatch.setattr("fastgpt.train.folder.plan", None)
    assert shared_plan(other, asked) == made


def test_two_processes_cannot_train_in_one_folder(tmp_path: Path) -> None:
    first, second = RunLock(tmp_path / "run"), RunLock(tmp_path / "run")
    first.acquire()
    with pytest.raises(UserError, match="another process is training in it"):
        second.acquire()
    second.close()
    first.close()
    third = RunLock(tmp_path / "run")
    third.acquire()
    third.close()


def tuning(folder: Path, **changes: Any) -> FinetuneConfig:
    tree: dict[str, Any] = {
        "out": str(folder / "run"),
        "pretrained": "gpt",
        "task": {"data": "sst2", "train": "train.tsv"},
        "train": {"epochs": 2},
        "engine": {},
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        (tree[section] if name else tree)[name or section] = value
    return FinetuneConfig.model_validate(tree)


def test_fine_tuning_finds_its_run_again_however_its_paths_are_written(tmp_path: Path) -> None:
    leave_run(tmp_path / "run", tuning(tmp_path, task__test="test.tsv"), 5)
    again = tuning(
        tmp_path, pretrained="./gpt/", task__train=str(Path("train.tsv").absolute()), task__test="./test.tsv"
    )
    assert plan(again, steps=10).changes == ()
    for other in ({"pretrained": "gpt2"}, {"task__train": "dev.tsv"}, {"task__validation": "None"}):
        with pytest.raises(
            UserError, match=f"{next(iter(other)).replace('__', '.')} was .*, is {next(iter(other.values()))}"
        ):
            plan(tuning(tmp_path, **{"task__test": "test.tsv", **other}), steps=10)


def test_fine_tuning_goes_on_with_another_engine_but_not_with_another_task_or_training(tmp_path: Path) -> None:
    leave_run(tmp_path / "run", tuning(tmp_path), 5)
    found = plan(tuning(tmp_path, engine__zero_stage=3, engine__kind="deepspeed"), steps=10)
    assert found.resume and set(found.changes) == {
        "engine.zero_stage was 1, is 3",
        "engine.kind was auto, is deepspeed",
    }
    for key, value in (("train__lr", 1.0), ("train__batch_size", 64), ("task__lm_weight", 0.0)):
        with pytest.raises(UserError, match=f"cannot go on with these settings .*{key.replace('__', '.')} was"):
            plan(tuning(tmp_path, **{key: value}), steps=10)


def test_a_folder_with_a_run_of_another_command_is_refused_in_one_line(tmp_path: Path) -> None:
    leave_run(tmp_path / "run", config(tmp_path), 5)
    with pytest.raises(UserError) as told:
        plan(tuning(tmp_path), steps=10)
    assert str(told.value) == f"{tmp_path / 'run'}: holds a run of `fastgpt train`; choose another 'out'"
    save_config(tmp_path / "run", tuning(tmp_path))
    with pytest.raises(UserError, match="holds a run of `fastgpt finetune`; choose another 'out'"):
        plan(config(tmp_path))
