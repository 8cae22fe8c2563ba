"""`fastgpt evaluate`: what a model does without being trained to."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastgpt_kernels import Backend

from fastgpt.arguments import at_least_one, output_file
from fastgpt.checkpoint.manifest import NAME as MANIFEST
from fastgpt.checkpoint.manifest import read_manifest
from fastgpt.engine.backend import ops_for
from fastgpt.engine.precision import resolve_device
from fastgpt.errors import UserError
from fastgpt.evaluate.heuristics import HEURISTICS, read_trial
from fastgpt.files import write_atomically
from fastgpt.load import model_folder, read_model


def evaluate_command(
    model: str,
    heuristics: Sequence[str],
    *,
    examples: int | None,
    seed: int,
    batch_size: int,
    out: str | None,
    device: str,
    backend: Backend,
) -> None:
    """Try heuristics, tell of each in a line, and write a JSON object to `out`.

    It has `model` as it was given, `step` of its checkpoint, or null where it is none, and `heuristics`, a list of what
    `evaluate_heuristic` gives. Everything but the model is looked at before the model is loaded.

    Raises:
        UserError: an option, the data or the model cannot be.
    """
    named = [name_and_file(word) for word in heuristics]
    if not named:
        raise UserError(f"give a --heuristic NAME=FILE at least; names: {', '.join(HEURISTICS)}")
    at_least_one("--batch-size", batch_size)
    if examples is not None:
        at_least_one("--examples", examples)
    target = None if out is None else output_file(out)
    place = resolve_device(device, setting="--device")
    ops = ops_for(backend, place, setting="--backend")
    trials = [read_trial(name, file, examples=examples, seed=seed) for name, file in named]
    folder = model_folder(Path(model))
    loaded, tokenizer = read_model(folder, ops, place)
    if tokenizer is None:
        raise UserError(f"{model}: it has no tokenizer, without which no text becomes tokens")
    results = []
    for trial in trials:
        results.append(trial.run(loaded, tokenizer, batch_size))
        print(told(results[-1]), flush=True)
    if target is not None:
        result = {"model": model, "step": step_of(folder), "heuristics": results}
        write_atomically(target, json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def name_and_file(word: str) -> tuple[str, str]:
    """The two parts of NAME=FILE. Raises UserError where it is not that."""
    name, _, file = word.partition("=")
    if not name or not file:
        raise UserError(f"--heuristic: must be NAME=FILE, not {word!r}; names: {', '.join(HEURISTICS)}")
    return name, file


def step_of(folder: Path) -> int | None:
    """The updates that the model in a folder has had, where the folder is a checkpoint's."""
    return read_manifest(folder.parent).step if (folder.parent / MANIFEST).is_file() else None


def told(result: dict[str, Any]) -> str:
    """A result for people."""
    parts = [
        f"{result['heuristic']}  {result['metric']} {result['score']:.4f} (random {result['random']:.4f})",
        *([f"accuracy {result['accuracy']:.4f}"] if "accuracy" in result else []),
        f"{result['examples']} examples",
        *([f"{result['ties']} ties"] if result.get("ties") else []),
        *([f"{result['cut']} passages cut to the context"] if result["cut"] else []),
        result["file"],
    ]
    return "  ".join(parts)
