"""Models in folders: ours (model.safetensors, config.json, tokenizer files), a run's, and Hugging Face's."""

import json
import logging
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from fastgpt_kernels import Backend, Ops
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastgpt.checkpoint.manifest import NAME as MANIFEST
from fastgpt.checkpoint.manifest import verify
from fastgpt.checkpoint.store import CheckpointStore
from fastgpt.config import ModelConfig
from fastgpt.engine.backend import ops_for
from fastgpt.engine.precision import resolve_device
from fastgpt.errors import UserError, did_you_mean
from fastgpt.files import open_to_readers
from fastgpt.model.convert import ARCHITECTURES, from_hugging_face
from fastgpt.model.language_model import LanguageModel
from fastgpt.model.state import model_from_state
from fastgpt.tokenizer import Tokenizer
from fastgpt.tokenizer.files import PAIRS, read_json, read_tokenizer

log = logging.getLogger(__name__)

MODEL_TYPE = "fastgpt"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
BEST = "best"  # of a run of fine-tuning: the model that did best in validation
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")


def save_model(
    folder: str | PathLike[str], state: Mapping[str, Tensor], config: ModelConfig, tokenizer: Tokenizer | None
) -> None:
    """Write a model as `load_model` reads it, each tensor in its own dtype."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    open_to_readers(folder / WEIGHTS)
    settings = {"model_type": MODEL_TYPE, **config.model_dump()}
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    if tokenizer is not None:
        tokenizer.save(folder)


def load_model(
    folder: str | PathLike[str],
    *,
    device: str | torch.device = "cpu",
    backend: Backend = "auto",
    dtype: torch.dtype | None = None,
) -> tuple[LanguageModel, Tokenizer | None]:
    """Read a trained model, in eval mode, and its tokenizer.

    Args:
        folder: a run folder (its newest checkpoint; of fine-tuning its best model), a checkpoint, a folder that
            `save_model` wrote, or a Hugging Face folder of a GPT-2 or OpenAI GPT with safetensors.
        device: "cpu", "cuda", "cuda:N", or "auto" for the GPU where there is one.
        backend: which kernels the model runs on, as for `load_ops`; "auto" on the CPU is "torch", or with
            `dtype` bfloat16 "native" where that can run.
        dtype: converts the weights; None keeps the dtype of the file.

    Returns:
        The model, and the tokenizer or None where the folder has none that fastgpt reads.

    Raises:
        UserError: something is missing, damaged or not supported; the message names the file and the key.
    """
    place = resolve_device(str(device), setting="device")
    return read_model(folder, ops_for(backend, place, dtype, setting="backend"), place, dtype)


def read_model(
    folder: str | PathLike[str], ops: Ops, device: torch.device, dtype: torch.dtype | None = None
) -> tuple[LanguageModel, Tokenizer | None]:
    """`load_model` with operations that are loaded, on a device that is there."""
    folder = model_folder(Path(folder))
    settings = read_json(folder / "config.json")
    kind = settings.get("model_type")
    if kind not in (MODEL_TYPE, *ARCHITECTURES):
        known = (MODEL_TYPE, *ARCHITECTURES)
        near = did_you_mean(kind, known) if isinstance(kind, str) else ""
        raise UserError(f"{folder / 'config.json'}: model_type is {kind!r}; known: {', '.join(known)}.{near}")
    state = _read_tensors(folder, device, dtype)
    if kind == MODEL_TYPE:
        model = model_from_state(_our_config(settings, folder), ops, state, where=str(folder / WEIGHTS))
    else:
        model = from_hugging_face(state, settings, ops, where=str(folder))
    tokenizer = _tokenizer(folder)
    if tokenizer is not None and tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens and the model {model.config.vocab_size}; "
            "they do not belong together"
        )
    return model.eval(), tokenizer


def model_folder(folder: Path) -> Path:
    """The folder of the model itself, for any of the folders that contain one.

    Raises:
        UserError: it is none of them, or damaged.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give a run, a checkpoint, or a folder with {WEIGHTS}")
    if (folder / "config.json").is_file():
        return folder
    if (folder / BEST / "config.json").is_file():
        return folder / BEST
    if (folder / "checkpoints").is_dir():
        folder = CheckpointStore(folder / "checkpoints").pointed()
    if (folder / MANIFEST).is_file():
        try:
            verify(folder, within="model/")  # the training state is much larger
        except UserError as problem:
            raise UserError(f"{problem}; try an older checkpoint of the run") from None
    if (folder / "model").is_dir():
        return folder / "model"
    raise UserError(f"{folder}: neither a run, nor a checkpoint, nor a model: it has no config.json")


def _our_config(settings: dict[str, Any], folder: Path) -> ModelConfig:
    path = folder / "config.json"
    fields = {key: value for key, value in settings.items() if key != "model_type"}
    try:
        return ModelConfig(**fields)
    except ValidationError as problem:
        error = problem.errors()[0]
        key = ".".join(map(str, error["loc"])) or error["ctx"]["key"]
        near = did_you_mean(key, ModelConfig.model_fields) if error["type"] == "extra_forbidden" else ""
        raise UserError(f"{path}: {key}: {error['msg']}.{near}") from None


def _read_tensors(folder: Path, device: torch.device, dtype: torch.dtype | None) -> dict[str, Tensor]:
    tensors = {}
    for path in _weight_files(folder):
        try:
            with safe_open(path, framework="pt", device=str(device)) as file:
                for name in file.keys():  # noqa: SIM118 - not a mapping
                    tensor = file.get_tensor(name)
                    tensors[name] = tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor
        except (SafetensorError, OSError) as problem:
            raise UserError(f"{path}: not a whole safetensors file: {problem}") from None
    return tensors


def _weight_files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    index = folder / INDEX
    if not index.is_file():
        if any((folder / name).is_file() for name in PICKLES):
            raise UserError(
                f"{folder}: {PICKLES[0]} is pickle, which can run code and is not read; convert it to {WEIGHTS}"
            )
        raise UserError(f"{folder}: no {WEIGHTS}")
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise UserError(f"{index}: weight_map must give each tensor the name of a file")
    names = sorted(set(places.values()))
    for name in names:
        if Path(name).name != name:
            raise UserError(f"{index}: {name!r} is not the name of a file beside it")
        if not (folder / name).is_file():
            raise UserError(f"{folder / name}: missing; {INDEX} names it")
    return [folder / name for name in names]


def _tokenizer(folder: Path) -> Tokenizer | None:
    files = ("tokenizer.json", *(name for pair in PAIRS for name in pair))
    # GPT-1's asks for its packages when it is used: the model is of use without
    return read_tokenizer(folder) if any((folder / name).is_file() for name in files) else None
