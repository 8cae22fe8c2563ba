"""A fine-tuned model in a folder: a model as `load_model` reads it, and beside it the task with its output layer.

config.json  model.safetensors  tokenizer files      the language model, special tokens in its table
task.json  task_head.safetensors                     what it was fine-tuned to, and the output layer
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from fastgpt_kernels import Backend
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastgpt.config import ModelConfig, TableConfig
from fastgpt.errors import UserError
from fastgpt.files import open_to_readers
from fastgpt.load import load_model, model_folder, save_model
from fastgpt.model.levels import HEAD
from fastgpt.model.task import TaskModel, TaskShape, new_task_model
from fastgpt.tasks.example import Kind, Task
from fastgpt.tasks.transform import SpecialTokens
from fastgpt.tokenizer import Tokenizer
from fastgpt.tokenizer.files import read_json

TASK = "task.json"
OUTPUT_LAYER = f"{HEAD}.safetensors"


class FineTuned(NamedTuple):
    """What a model was fine-tuned to."""

    task: Task
    shape: TaskShape
    special: SpecialTokens
    data: str | TableConfig  # how its files are read
    too_long: Literal["cut", "refuse"]


def save_task_model(
    folder: Path, state: Mapping[str, Tensor], config: ModelConfig, tokenizer: Tokenizer | None, tuned: FineTuned
) -> None:
    """Write a fine-tuned model, each tensor in its own dtype."""
    head = {name: tensor for name, tensor in state.items() if name.startswith(f"{HEAD}.")}
    save_model(folder, {name: t for name, t in state.items() if name not in head}, config, tokenizer)
    save_file({name: t.detach().cpu().contiguous() for name, t in head.items()}, folder / OUTPUT_LAYER)
    open_to_readers(folder / OUTPUT_LAYER)
    task = tuned.task._asdict() | {"kind": tuned.task.kind.value}
    data = tuned.data.model_dump() if isinstance(tuned.data, TableConfig) else tuned.data
    settings = {
        "task": task,
        "output_layer": tuned.shape._asdict(),
        "special_tokens": tuned.special._asdict(),
        "data": data,
        "too_long": tuned.too_long,
    }
    (folder / TASK).write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def fine_tuned(folder: Path) -> FineTuned | None:
    """What the model in a folder (see `load_model`) was fine-tuned to; None where it was not.

    Raises:
        UserError: the file that says so is damaged.
    """
    path = model_folder(folder) / TASK
    if not path.is_file():
        return None
    settings = read_json(path)
    try:
        data = settings["data"]
        task = dict(settings["task"])
        score = task["score"]
        return FineTuned(
            Task(
                **task
                | {
                    "kind": Kind(task["kind"]),
                    "metrics": tuple(task["metrics"]),
                    "labels": tuple(task["labels"]),
                    "score": None if score is None else (float(score[0]), float(score[1])),
                }
            ),
            TaskShape(**settings["output_layer"]),
            SpecialTokens(**settings["special_tokens"]),
            TableConfig.model_validate(data) if isinstance(data, dict) else str(data),
            "refuse" if settings["too_long"] == "refuse" else "cut",
        )
    except (KeyError, TypeError, ValueError, IndexError) as problem:
        raise UserError(f"{path}: not what `fastgpt finetune` writes: {' '.join(str(problem).split())}") from None


def load_task_model(
    folder: Path, *, device: str | torch.device = "cpu", backend: Backend = "auto", dtype: torch.dtype | None = None
) -> tuple[TaskModel, Tokenizer, FineTuned]:
    """Read a fine-tuned model, in eval mode, with its tokenizer and its task; arguments as for `load_model`.

    Raises:
        UserError: the folder holds no fine-tuned model, or a damaged one.
    """
    tuned = fine_tuned(folder)
    if tuned is None:
        raise UserError(f"{folder}: a model that was not fine-tuned to a task; `fastgpt finetune` does that")
    language_model, tokenizer = load_model(folder, device=device, backend=backend, dtype=dtype)
    path = model_folder(folder) / OUTPUT_LAYER
    if tokenizer is None:
        raise UserError(f"{folder}: its tokenizer is missing")
    weights = dict(language_model.named_parameters())
    first = next(iter(weights.values()))
    with torch.device("meta"):
        model = new_task_model(language_model.config, language_model.ops, tuned.shape)
    state: dict[str, Any] = {name: p.detach() for name, p in weights.items()}
    try:
        state |= {name: t.to(first.device, first.dtype) for name, t in load_file(path).items()}
        model.load_state_dict(state, assign=True)
    except (SafetensorError, OSError, RuntimeError) as problem:
        reason = str(problem).splitlines()[-1].strip()  # PyTorch's first line names its class alone
        raise UserError(f"{path}: not the output layer of this task: {reason}") from None
    return model.eval(), tokenizer, tuned
