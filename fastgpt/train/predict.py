"""`fastgpt predict`: a fine-tuned model does its task on new examples."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from fastgpt_kernels import Backend

from fastgpt.arguments import at_least_one, output_file
from fastgpt.engine.backend import ops_for
from fastgpt.engine.precision import resolve_device
from fastgpt.files import write_atomically
from fastgpt.task_folder import load_task_model
from fastgpt.tasks import encode_examples, load_examples
from fastgpt.tasks.example import Example, Task
from fastgpt.train.scoring import Floats, Untrained, predictions, scores_of


def predict_command(run: str, data: str, *, out: str | None, batch_size: int, device: str, backend: Backend) -> None:
    """Write a JSON line for each example of `data`, in their order, to `out` or to standard output.

    A line has `place` ("file:row"), `prediction` (the name of the class, the number of the choice from 0, or the
    score), and but for scores `probabilities`, by class or in the order of the choices.

    Raises:
        UserError: the model was not fine-tuned, or a row cannot be read.
    """
    at_least_one("--batch-size", batch_size)
    target = None if out is None else output_file(out)
    place = resolve_device(device, setting="--device")
    ops_for(backend, place, setting="--backend")  # before the model, which takes longer
    model, tokenizer, tuned = load_task_model(Path(run), device=place, backend=backend)
    examples = load_examples(data, tuned.data, labelled=False)[1]
    encoded = encode_examples(
        examples, tuned.task, tokenizer, tuned.special, model.config.context, too_long=tuned.too_long
    )
    scores = scores_of(Untrained(model, place), encoded, tuned.task, batch_size)
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines(examples, scores, tuned.task))
    if target is None:
        sys.stdout.write(text)
    else:
        write_atomically(target, text)


def lines(examples: list[Example], scores: Floats, task: Task) -> list[dict[str, Any]]:
    """What is told of each example."""
    found = predictions(scores, task)
    if task.score is not None:
        return [{"place": e.place, "prediction": value} for e, value in zip(examples, found, strict=True)]
    probabilities = torch.from_numpy(scores).softmax(1).tolist()
    told = []
    for example, number, row in zip(examples, found, probabilities, strict=True):
        named = dict(zip(task.labels, row, strict=True)) if task.labels else row
        prediction = task.labels[int(number)] if task.labels else number
        told.append({"place": example.place, "prediction": prediction, "probabilities": named})
    return told
