"""The heuristics over the updates of pre-training, between chance and the best (Radford et al. 2018, figure 2, right).

A model of the study is scored as it was initialised, and after each train.save_every updates of its training: not where
an interruption had it save once more, so that the curve is that of an undisturbed run.
"""

import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fastgpt.ablate.models import StudyModel
from fastgpt.ablate.names import content_digest, digest
from fastgpt.ablate_config import AblateConfig
from fastgpt.checkpoint.store import CheckpointStore
from fastgpt.errors import UserError
from fastgpt.wording import Places

log = logging.getLogger(__name__)

UNTRAINED = "untrained"


class Point(NamedTuple):
    """One model at one update."""

    model: str
    step: int
    folder: Path  # the checkpoint
    result: Path  # where its scores are kept


class Curve(NamedTuple):
    """The scores of one heuristic by the updates of one model."""

    model: str
    heuristic: str
    metric: str
    steps: list[int]
    scores: list[float]
    chance: float
    best: float

    @property
    def normalised(self) -> list[float]:
        """0 at chance, 1 at the best; NaN where the best is not above chance, so that there is no such scale."""
        span = self.best - self.chance
        return [(score - self.chance) / span if span > 0 else math.nan for score in self.scores]


def check_heuristics(config: AblateConfig, places: Places) -> str:
    """A digest of what is scored. Raises UserError where a heuristic is not known, or its file cannot be read."""
    from fastgpt.evaluate.heuristics import read_trial

    assert config.zero_shot is not None
    files = {}
    for name, path in config.zero_shot.heuristics.items():
        where = f"{places.of(('zero_shot', 'heuristics', name))}: zero_shot.heuristics.{name}"
        try:
            read_trial(name, path, examples=config.zero_shot.examples, seed=config.seeds[0])
            files[name] = content_digest(path)
        except UserError as problem:
            raise UserError(f"{where}: {problem}") from None
    return digest({"files": files, "examples": config.zero_shot.examples, "seed": config.seeds[0]})


def points(config: AblateConfig, models: Mapping[str, StudyModel], scored: str) -> list[Point]:
    """What is scored: every model of the study at each of its saves, and before them as it was initialised."""
    found = []
    for model in models.values():
        results = Path(config.out) / "zero-shot" / model.folder.name
        store = CheckpointStore(model.folder / "checkpoints")
        there, asked = {_step(name): store.folder / name for name in store.names()}, _saves(model)
        if model.trained and (gone := sorted(asked - set(there))):
            log.warning(
                "%s: of its training no checkpoint is kept after %s updates; the curve is without them. "
                "Without the folder it is trained again",
                model.folder,
                ", ".join(f"{step:,}" for step in gone),
            )
        folders = {0: model.folder / UNTRAINED} | {step: there[step] for step in asked if step in there}
        found += [
            Point(model.name, step, folder, results / f"step-{step:08d}-{scored[:8]}.json")
            for step, folder in sorted(folders.items())
        ]
    return found


def make_untrained(model: StudyModel) -> None:
    """Write a model of the study as its training began, with its tokenizer, where it is not there."""
    from fastgpt_kernels import load_ops

    from fastgpt.load import load_model, save_model
    from fastgpt.model import build_model

    folder, training = model.folder / UNTRAINED, model.training
    if training is None or (folder / "config.json").is_file():
        return
    tokenizer = load_model(model.folder)[1]
    if training.train.init is None:
        untrained = build_model(training.model, load_ops("torch"), seed=training.train.seed)
    else:
        untrained = load_model(training.train.init)[0]
    partial = folder.with_name(f".partial-{UNTRAINED}")
    save_model(partial, dict(untrained.named_parameters()), training.model, tokenizer)
    partial.rename(folder)


def curves(config: AblateConfig, scored: Sequence[Point], reached: Mapping[str, dict[str, float]]) -> list[Curve]:
    """The curves of the points that are done.

    Args:
        config: of the study.
        scored: all points.
        reached: the best mean score among the rows, by data set and metric.
    """
    assert config.zero_shot is not None
    found: dict[tuple[str, str], list[tuple[int, dict[str, Any]]]] = {}
    for point in scored:
        if point.result.is_file():
            for result in json.loads(point.result.read_text(encoding="utf-8"))["heuristics"]:
                found.setdefault((point.model, result["heuristic"]), []).append((point.step, result))
    highest: dict[str, float] = {}
    for (_, name), results in found.items():
        highest[name] = max(highest.get(name, float("-inf")), *(result["score"] for _, result in results))
    made = []
    for (model, name), results in found.items():
        metric = results[0][1]["metric"]
        chance = float(results[0][1]["random"])
        candidates = (reached.get(name, {}).get(metric), highest[name])
        # what is not above chance is no measure of anything
        default = next((score for score in candidates if score is not None and score > chance), highest[name])
        best = config.zero_shot.best.get(name, default)
        steps, scores = [step for step, _ in results], [float(result["score"]) for _, result in results]
        made.append(Curve(model, name, metric, steps, scores, chance, float(best)))
    return made


def _saves(model: StudyModel) -> set[int]:
    """The updates after which its training saves."""
    assert model.training is not None
    train = model.training.train
    assert train.save_every is not None
    return {*range(train.save_every, train.steps, train.save_every), train.steps}


def _step(checkpoint: str) -> int:
    return int(checkpoint.rpartition("-")[2])
