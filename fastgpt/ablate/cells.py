"""The fine-tunings of a study: one for each row, task and seed, and for each point of the curve over layers.

Those with the same settings are one, whichever rows and points they belong to.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fastgpt.ablate.models import StudyModel
from fastgpt.ablate.names import as_name, content_digest, digest
from fastgpt.ablate_config import AblateConfig, Tree
from fastgpt.errors import UserError
from fastgpt.finetune_config import FinetuneConfig
from fastgpt.schema import Key
from fastgpt.settings import validated
from fastgpt.wording import Places

RESULT = "result.json"
FILES = ("train", "validation", "test")  # settings of `task` that name files


class Cell(NamedTuple):
    """One fine-tuning."""

    folder: Path
    label: str  # for people
    model: str
    task: str
    seed: int
    settings: FinetuneConfig
    fingerprint: str


class Study(NamedTuple):
    """Which fine-tuning stands where; a fine-tuning by its fingerprint."""

    cells: dict[str, Cell]
    rows: dict[tuple[str, str, int], str]  # by row, task and seed
    layers: dict[tuple[str, int, int], str]  # by task, blocks transferred and seed


def study_of(config: AblateConfig, models: Mapping[str, StudyModel], places: Places) -> Study:
    """All fine-tunings of a study.

    Raises:
        UserError: settings of one cannot be, or a file of its examples is not there.
    """
    study = Study({}, {}, {})
    files: dict[str, str] = {}

    def add(row: str, task: str, seed: int, blocks: int | None, label: str) -> str:
        model = models[config.model_of(row)]
        settings = _settings(config, model, row, task, seed, blocks, places)
        for name in FILES:
            path = getattr(settings.task, name)
            if path is not None and path not in files:
                try:
                    files[path] = content_digest(path)
                except UserError as problem:
                    where = places_of(config, row, task, places).of(("task", name))
                    raise UserError(f"{where}: task.{name}: {problem}") from None
        fingerprint = _fingerprint(settings, model, files)
        if fingerprint not in study.cells:
            cells, name = Path(config.out) / "cells", f"seed-{seed}-{fingerprint[:8]}"
            # it stays where it was done or begun, though rows and tasks are called otherwise now
            there = min(cells.glob(f"*/*/{name}"), key=lambda at: (not (at / RESULT).is_file(), at), default=None)
            study.cells[fingerprint] = Cell(
                there or cells / as_name(task) / as_name(label) / name,
                f"{task}, {label}, seed {seed}",
                model.name,
                task,
                seed,
                settings,
                fingerprint,
            )
        return fingerprint

    for seed in config.seeds:
        for task in config.tasks:
            for row in config.rows:
                study.rows[row, task, seed] = add(row, task, seed, None, row)
    for task, blocks in _points(config, models, places):
        for seed in config.seeds:
            label = {-1: "nothing transferred", 0: "embeddings transferred"}.get(blocks, f"{blocks} blocks transferred")
            study.layers[task, blocks, seed] = add(first_row(config), task, seed, blocks, label)
    return study


def first_row(config: AblateConfig) -> str:
    """The row that the others are compared with, and that the curve over layers is of."""
    return next(iter(config.rows))


def _points(config: AblateConfig, models: Mapping[str, StudyModel], places: Places) -> list[tuple[str, int]]:
    if config.layers is None:
        return []
    row = first_row(config)
    most = models[config.model_of(row)].blocks
    asked = config.layers.blocks
    if asked and max(asked) > most:
        raise UserError(
            f"{places.of(('layers', 'blocks'))}: layers.blocks must be at most {most}, the blocks of the model of row "
            f"{row!r}, not {max(asked)}"
        )
    return [(task, blocks) for task in config.layers.tasks for blocks in sorted(set(asked or range(most + 1)))]


def _settings(
    config: AblateConfig, model: StudyModel, row: str, task: str, seed: int, blocks: int | None, places: Places
) -> FinetuneConfig:
    tree: Tree = {}
    of_row = {key: value for key, value in config.rows[row].items() if key != "model"}
    for part in (config.finetune, config.tasks[task], of_row):
        tree = _merged(tree, part)
    where = places_of(config, row, task, places)
    for key, reason in (("out", "the study names the folders"), ("pretrained", "a row's model is named by 'model'")):
        if key in tree:
            raise UserError(f"{where.of((key,))}: {key} is not set here: {reason}")
    tree = _merged(tree, {"out": "here", "pretrained": str(model.folder)})
    if isinstance(tree.setdefault("train", {}), dict):  # else the validation says what it must be
        if "seed" in tree["train"]:
            raise UserError(f"{where.of(('train', 'seed'))}: train.seed is not set here: seeds lists them")
        tree = _merged(tree, {"train": {"seed": seed}})
    if blocks is not None:
        # all of them is what a fine-tuning does by itself: the same run
        tree = _merged(tree, {"task": {"transfer_blocks": None if blocks == model.blocks else blocks}})
    return validated(FinetuneConfig, tree, where)


def places_of(config: AblateConfig, row: str, task: str, places: Places) -> Places:
    """Where each setting of a fine-tuning was written: in its row, else its task, else among those of all."""
    lines: dict[Key, str] = {}
    for section in (("finetune",), ("tasks", task), ("rows", row)):
        lines |= {key: place for key, place in places.under(section).items() if key}
    return Places(f"{places.path}: {task}, {row}", lines)


def _merged(below: Tree, above: Mapping[str, Any]) -> Tree:
    """Settings over others, section by section."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = _merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _fingerprint(settings: FinetuneConfig, model: StudyModel, files: Mapping[str, str]) -> str:
    known = settings.model_dump()
    for name in ("out", "pretrained"):
        del known[name]
    del known["engine"]["threads"]
    del known["train"]["keep"], known["train"]["save_every"]  # which change nothing in what is computed
    for name in FILES:
        path = known["task"][name]
        known["task"][name] = None if path is None else files[path]
    return digest({"model": model.fingerprint, "settings": known})
