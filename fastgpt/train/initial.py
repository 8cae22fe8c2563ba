"""Training that goes on from another model's weights, on another text: `train.init`."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastgpt.config import Config
from fastgpt.errors import SharedError, UserError
from fastgpt.load import load_model, model_folder
from fastgpt.model.init import InitialValues
from fastgpt.model.transfer import transferred_values

FREE = ("dropout",)  # of the model's settings, what the weights do not say


@contextmanager
def _told_of_init() -> Iterator[None]:
    """What is wrong with the folder is told with the setting; every rank finds the same."""
    try:
        yield
    except UserError as problem:
        raise SharedError(f"train.init: {problem}") from None


def started_with(config: Config) -> InitialValues | None:
    """The values that the run starts with, where they are another model's.

    Raises:
        UserError: the folder holds no model, or one of another shape than `model` asks for.
    """
    if config.train.init is None:
        return None
    with _told_of_init():
        model, _ = load_model(config.train.init)
    asked, found = config.model.model_dump(), model.config.model_dump()
    unlike = [
        f"model.{key} is {asked[key]} and there {found[key]}"
        for key in asked
        if key not in FREE and asked[key] != found[key]
    ]
    if unlike:
        raise SharedError(f"train.init: {config.train.init} holds another model: {'; '.join(unlike)}")
    return transferred_values(dict(model.named_parameters()), config.model, config.train.seed)


def with_its_tokenizer(config: Config) -> Config:
    """The settings with the tokenizer of the model that is started with, where none is asked for."""
    if config.train.init is None or config.data.tokenizer != "auto":
        return config
    with _told_of_init():
        folder = str(model_folder(Path(config.train.init)))
    return config.model_copy(update={"data": config.data.model_copy(update={"tokenizer": folder})})
