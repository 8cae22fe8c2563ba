"""A study of seconds: a small model, a task of four rows of examples."""

import json
from pathlib import Path
from typing import Any

import yaml

from fastgpt.ablate.cells import Study, study_of
from fastgpt.ablate.models import StudyModel
from fastgpt.ablate_config import AblateConfig
from fastgpt.settings import read_settings
from fastgpt.wording import Places

TABLE = {"kind": "classification", "format": "jsonl", "text": ["text"], "label": "label", "labels": {0: "w", 1: "v"}}


def write_examples(path: Path, count: int = 24) -> None:
    """Texts whose class is that of their words."""
    rows = [{"text": f"w{i % 3 + 5 * (i % 2)} w{5 * (i % 2)}", "label": i % 2} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def settings(folder: Path, **more: Any) -> dict[str, Any]:
    """Of a study with two tasks, two rows and two seeds."""
    for name in ("train", "validation"):
        if not (folder / f"{name}.jsonl").exists():
            write_examples(folder / f"{name}.jsonl")
    task = {"table": TABLE, "train": f"{folder}/train.jsonl", "validation": f"{folder}/validation.jsonl"}
    return {
        "out": f"{folder}/study",
        "models": {"small": f"{folder}/small.yaml"},
        "finetune": {
            "train": {"epochs": 1, "batch_size": 8, "micro_batch_size": 8, "lr": 1e-3},
            "engine": {"precision": "fp32", "threads": 1},
        },
        "tasks": {"first": {"task": task}, "second": {"task": task, "train": {"epochs": 2}}},
        "rows": {"full": {}, "no auxiliary LM": {"task": {"lm_weight": 0}}},
        "seeds": [1, 2],
        **more,
    }


def read(folder: Path, tree: dict[str, Any], words: tuple[str, ...] = ()) -> tuple[AblateConfig, Places]:
    """The settings as the command reads them."""
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return read_settings(AblateConfig, path, words)


def model(blocks: int = 3, fingerprint: str = "a") -> StudyModel:
    """A model that is named, and not there."""
    return StudyModel("small", Path("somewhere"), blocks, fingerprint)


def study(folder: Path, tree: dict[str, Any], **of_model: Any) -> tuple[AblateConfig, Study]:
    """The fine-tunings of a study whose models are as `model`."""
    config, places = read(folder, tree)
    return config, study_of(config, {name: model(**of_model) for name in config.models}, places)
