"""How well a model does the examples of a task."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastgpt.engine.ranks import Ranks
from fastgpt.model.task import TaskModel, task_loss
from fastgpt.tasks.example import Task
from fastgpt.tasks.metrics import score
from fastgpt.tasks.source import arguments
from fastgpt.tasks.transform import Encoded

FORWARD = ("tokens", "extract")  # what scores need of the arguments of a batch

Floats = npt.NDArray[np.float64]


class Scored(Protocol):
    """An engine, as far as scores need it."""

    ranks: Ranks

    def outputs(self, arguments: Mapping[str, Tensor]) -> Tensor:
        """What the model's `forward` gives."""


class Untrained:
    """A model that is not trained, on this process; where others have it too, they share the examples out."""

    def __init__(self, model: TaskModel, device: torch.device, ranks: Ranks | None = None) -> None:
        self.ranks = ranks or Ranks()
        self._model = model.eval()
        self._device = device

    def outputs(self, arguments: Mapping[str, Tensor]) -> Tensor:
        """What the model gives."""
        with torch.no_grad():
            given: Tensor = self._model(**{name: tensor.to(self._device) for name, tensor in arguments.items()})
            return given


def evaluate(model: Scored, encoded: Sequence[Encoded], task: Task, batch_size: int) -> dict[str, Any]:
    """The mean task loss of labelled examples and the task's metrics, by name; None where a metric is undefined."""
    scores = scores_of(model, encoded, task, batch_size)
    labels = arguments(encoded, task)["labels"]
    loss = task_loss(torch.from_numpy(scores), _as_labels(labels), regression=task.score is not None)
    targets: list[Any] = [item.target for item in encoded]
    values = score(task.metrics, predictions(scores, task), targets)
    return {
        "loss": float(loss),
        **{name: value if math.isfinite(value) else None for name, value in values.items()},
        "examples": len(encoded),
    }


def _as_labels(labels: npt.NDArray[Any]) -> torch.Tensor:
    found = torch.from_numpy(labels)
    return found.double() if found.is_floating_point() else found


def worth(result: dict[str, Any], task: Task) -> float:
    """What a validation reached, larger being better."""
    value = result[task.metrics[0]]
    return -math.inf if value is None else float(value)


def told(result: dict[str, Any], task: Task) -> str:
    """A result for people."""
    shown = [f"{name} {'undefined' if result[name] is None else format(result[name], '.4f')}" for name in task.metrics]
    return "  ".join([f"loss {result['loss']:.4f}", *shown])


def scores_of(model: Scored, encoded: Sequence[Encoded], task: Task, batch_size: int) -> Floats:
    """What the output layer makes of examples (n, C): logits of classes or choices, or scaled scores.

    Batches of like length are dealt to the ranks in turn; every rank gets the scores of all.
    """
    ranks = model.ranks
    order = np.argsort([max(map(len, item.sequences)) for item in encoded], kind="stable")
    batches = [order[first : first + batch_size] for first in range(0, len(order), batch_size)]
    found: Floats = np.empty(0)
    for first in range(0, len(batches), ranks.world_size):
        # where batches do not go round, the last one is scored again: every rank takes part in each forward pass
        mine = batches[min(first + ranks.rank, len(batches) - 1)]
        taken = arguments([encoded[i] for i in mine], task)
        scores = model.outputs({name: torch.from_numpy(taken[name]) for name in FORWARD}).double().cpu()
        if not found.size:
            found = np.empty((len(encoded), scores.shape[1]))
        padded = torch.zeros(batch_size, scores.shape[1], dtype=torch.float64)
        padded[: len(scores)] = scores
        everybodys = ranks.gather_floats(padded.flatten()).view(ranks.world_size, batch_size, -1)
        for batch, values in zip(batches[first:], everybodys, strict=False):
            found[batch] = values[: len(batch)].numpy()
    return found


def predictions(scores: Floats, task: Task) -> list[int] | list[float]:
    """The likeliest class or choice of each example by its number, or its score on the task's scale."""
    if task.score is None:
        return [int(number) for number in scores.argmax(1)]
    lowest, highest = task.score
    return [float(value) for value in lowest + (highest - lowest) * scores[:, 0]]
