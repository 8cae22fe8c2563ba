"""`fastgpt features`: what a model that stays as it is makes of a task's examples, as arrays."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from fastgpt_kernels import Backend

from fastgpt.arguments import at_least_one, output_file
from fastgpt.engine.backend import ops_for
from fastgpt.engine.precision import resolve_device
from fastgpt.errors import UserError, did_you_mean
from fastgpt.finetune_config import FinetuneConfig
from fastgpt.model.build import new_model
from fastgpt.model.init import initialise
from fastgpt.model.language_model import LanguageModel
from fastgpt.model.task import Pooling, pool
from fastgpt.model.transfer import transferred_values
from fastgpt.tasks import Encoded, Task
from fastgpt.tasks.source import arguments
from fastgpt.train.task_inputs import read_task

SPLITS = ("train", "validation", "test")
POOLINGS = ("extract", "mean", "concat")

Floats = npt.NDArray[np.float32]


def features_command(
    config: FinetuneConfig,
    *,
    out: str,
    split: str,
    layer: int | None,
    pooling: str,
    batch_size: int,
    device: str,
    backend: Backend,
) -> tuple[Path, Path | None]:
    """Write the features of a split's examples, in their order, and what is to be predicted of them.

    Args:
        config: of the task and the model; `task.examples` and `task.validation_fraction` choose as in fine-tuning.
        out: a file, `NAME.npy`: float32 (examples, F), or (examples, K, F) where an example is K sequences.
            `NAME.labels.npy` beside it has their classes or choices, int64, or scores, float32.
        split: "train", "validation" or "test".
        layer: activations after so many blocks, 0 the embedding; None is after the last, normalised
            or projected.
        pooling: "extract" (the last token, F = N), "mean" (over the sequence) or "concat" (both and the maximum, 3 N).
        batch_size: examples of one pass.
        device: where the model runs.
        backend: on which kernels.

    Returns:
        The two files.

    Raises:
        UserError: an option, the model or the examples cannot be.
    """
    at_least_one("--batch-size", batch_size)
    target = output_file(out)
    if target.suffix != ".npy":
        raise UserError(f"--out: {out} must be a file NAME.npy")
    for option, value, allowed in (("--split", split, SPLITS), ("--pooling", pooling, POOLINGS)):
        if value not in allowed:
            raise UserError(f"{option}: {value!r} is not one of {', '.join(allowed)}.{did_you_mean(value, allowed)}")
    place = resolve_device(device, setting="--device")
    ops = ops_for(backend, place, setting="--backend")
    pretrained, tuned, examples = read_task(config)
    shape = pretrained.with_special_tokens(dropout=0.0)
    if layer is not None and not 0 <= layer <= shape.n_layer:
        raise UserError(f"--layer must be from 0 to {shape.n_layer}, the model's blocks, not {layer}")
    chosen: list[Encoded] | None = getattr(examples, split)
    if chosen is None:
        raise UserError("--split: test, but the settings name no task.test")
    model = new_model(shape, ops).to(next(iter(pretrained.weights.values())).dtype).to(place).eval()
    initialise(model, transferred_values(pretrained.weights, shape, config.train.seed))
    found = features_of(model, chosen, tuned.task, layer, pooling, batch_size)  # type: ignore[arg-type]
    np.save(target, found, allow_pickle=False)
    labels = arguments(chosen, tuned.task).get("labels")
    if labels is None:
        return target, None
    beside = target.with_suffix(".labels.npy")
    targets = [item.target for item in chosen]
    np.save(beside, np.array(targets, labels.dtype), allow_pickle=False)
    return target, beside


@torch.no_grad()
def features_of(
    model: LanguageModel, encoded: list[Encoded], task: Task, layer: int | None, pooling: Pooling, batch_size: int
) -> Floats:
    """The features of examples, (n, F), or (n, K, F) where an example is K sequences; see `features_command`."""
    order = np.argsort([max(map(len, item.sequences)) for item in encoded], kind="stable")
    device = next(model.parameters()).device
    found: list[Any] = [None] * len(encoded)
    for first in range(0, len(order), batch_size):
        rows = order[first : first + batch_size]
        taken = {
            name: torch.from_numpy(x).to(device) for name, x in arguments([encoded[i] for i in rows], task).items()
        }
        hidden = model.hidden(taken["tokens"].flatten(0, 1), blocks=layer)
        pooled = pool(hidden, taken["extract"].flatten(), pooling).view(len(rows), task.sequences, -1)
        for row, values in zip(rows, pooled.float().cpu().numpy(), strict=True):
            found[row] = values
    stacked: Floats = np.stack(found)
    return stacked[:, 0] if task.sequences == 1 else stacked
