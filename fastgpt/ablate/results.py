"""What runs came to, and what many of them say together: means over seeds, and the standard errors of these."""

import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastgpt.ablate.cells import RESULT, Cell, Study
from fastgpt.files import write_atomically

log = logging.getLogger(__name__)

AVERAGE = "average"


class Mean(NamedTuple):
    """The mean of some values, and its standard error: their standard deviation over the root of their number."""

    mean: float
    error: float | None  # of one value nothing is known
    values: int


def mean_of(values: Sequence[float]) -> Mean | None:
    """The mean; None of nothing."""
    if not values:
        return None
    spread = float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else None
    return Mean(float(np.mean(values)), spread, len(values))


def keep_result(cell: Cell, run: Path, metric: str) -> dict[str, Any]:
    """Write what a finished fine-tuning came to, by its summary: the score of the test, or else the best validation."""
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    split = "test" if "test" in summary else "validation"
    scores = summary["test"] if split == "test" else summary["best"]
    result = {
        "fingerprint": cell.fingerprint,
        "model": cell.model,
        "task": cell.task,
        "seed": cell.seed,
        "metric": metric,
        "split": split,
        "score": scores[metric],
        "steps": summary["steps"],
        "best": summary["best"],
        **({"test": summary["test"]} if split == "test" else {}),
    }
    write_atomically(cell.folder / RESULT, json.dumps(result, indent=1) + "\n")
    return result


def result_of(cell: Cell) -> dict[str, Any] | None:
    """What a fine-tuning came to, or None where it is not done."""
    path = cell.folder / RESULT
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        log.warning("%s: damaged; its fine-tuning is done again", path)
        return None
    if not isinstance(found, dict) or found.get("fingerprint") != cell.fingerprint:
        return None
    # its task and model may have been called otherwise when it was done
    return found | {"model": cell.model, "task": cell.task}


class Scores:
    """The scores of a study's fine-tunings that are done; one whose metric is undefined has none."""

    def __init__(self, study: Study, seeds: Sequence[int]) -> None:
        self.results = {
            fingerprint: result for fingerprint, cell in study.cells.items() if (result := result_of(cell)) is not None
        }
        self.study = study
        self.seeds = list(seeds)

    def of(self, fingerprint: str) -> float | None:
        """The score of a fine-tuning."""
        result = self.results.get(fingerprint)
        return None if result is None else result["score"]

    def row(self, row: str, task: str) -> dict[int, float]:
        """The scores of a row in a task, by seed."""
        return self._by_seed({seed: self.study.rows[row, task, seed] for seed in self.seeds})

    def average(self, row: str, tasks: Sequence[str]) -> dict[int, float]:
        """The mean over the tasks, by seed; of those seeds that have all of them."""
        of_tasks = [self.row(row, task) for task in tasks]
        return {
            seed: float(np.mean([scores[seed] for scores in of_tasks]))
            for seed in self.seeds
            if all(seed in scores for scores in of_tasks)
        }

    def transferred(self, task: str, blocks: int) -> dict[int, float]:
        """The scores with so many blocks transferred, by seed."""
        return self._by_seed({seed: self.study.layers[task, blocks, seed] for seed in self.seeds})

    def _by_seed(self, fingerprints: Mapping[int, str]) -> dict[int, float]:
        return {seed: score for seed, found in fingerprints.items() if (score := self.of(found)) is not None}


def difference(scores: Mapping[int, float], base: Mapping[int, float]) -> Mean | None:
    """How much higher scores are than others of the same seeds: seed by seed, so that what the seed decides cancels."""
    return mean_of([scores[seed] - base[seed] for seed in scores if seed in base])
