"""The watcher that scores a task's validation examples, and keeps the model that does best."""

import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fastgpt.engine.base import Engine
from fastgpt.tasks.example import Task
from fastgpt.tasks.transform import Encoded
from fastgpt.train.metrics import lines_up_to
from fastgpt.train.scoring import evaluate, told, worth
from fastgpt.train.watchers import Measured


class TaskEvaluation:
    """Validates before the first update, every `every` updates, and after the last."""

    def __init__(
        self,
        engine: Engine,
        encoded: Sequence[Encoded],
        task: Task,
        *,
        steps: int,
        every: int,
        batch_size: int,
        record: Callable[[dict[str, Any]], None],
        show: Callable[[str], None],
        keep: Callable[[dict[str, Any]], None],
        best: float = -math.inf,
    ) -> None:
        """Watch an engine.

        Args:
            engine: what is scored.
            encoded: labelled examples.
            task: theirs; the first of its metrics tells which model is best.
            steps: updates of the whole run.
            every: updates between two validations.
            batch_size: examples of a forward pass.
            record: takes each result.
            show: takes a line for people.
            keep: called on every rank with the result of a model that is better than all before it.
            best: what the run had reached when it was interrupted.
        """
        self._engine = engine
        self._encoded = encoded
        self._task = task
        self._steps = steps
        self._every = every
        self._batch_size = batch_size
        self._record = record
        self._show = show
        self._keep = keep
        self._best = best

    def begin(self, step: int) -> None:
        """Validate the untrained model; a resumed run has done so."""
        if step == 0:
            self.validate(tokens=0, learning_rate=0.0)

    def looks_at(self, step: int) -> bool:
        """When it is time."""
        return step == self._steps or step % self._every == 0

    def after(self, measured: Measured) -> None:
        """Validate when it is time, and keep the model where it is the best so far."""
        update = measured.update
        if not self.looks_at(update.step):
            return
        result = self.validate(tokens=measured.tokens, learning_rate=update.learning_rate)
        reached = worth(result, self._task)
        if reached > self._best:
            self._best = reached
            self._keep(result)

    def validate(self, *, tokens: int, learning_rate: float) -> dict[str, Any]:
        """Score the validation examples and record it; every rank takes part and gets the result."""
        start = time.perf_counter()
        result = evaluate(self._engine, self._encoded, self._task, self._batch_size)
        seconds = time.perf_counter() - start
        record = {
            "step": self._engine.step,
            "split": "validation",
            **result,
            "tokens": tokens,
            "learning_rate": learning_rate,
            "examples_per_second": len(self._encoded) / seconds,
        }
        self._record(record)
        self._show(f"step {record['step']}  validation {told(result, self._task)}")
        return record


def best_so_far(metrics: Path, step: int, task: Task) -> float | None:
    """The best validation of a run that is resumed at `step`, by its `metrics.jsonl`; None where there is none yet."""
    lines = [json.loads(line) for line in lines_up_to(metrics, step)] if metrics.is_file() else []
    found = [worth(line, task) for line in lines if line["split"] == "validation" and line["step"]]
    best = max(found, default=-math.inf)
    return best if math.isfinite(best) else None
