"""What fine-tuning starts from and learns from: a pre-trained model, and the examples of a task as its tokens."""

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from fastgpt.config import ModelConfig
from fastgpt.errors import UserError
from fastgpt.finetune_config import SPECIAL_TOKENS, FinetuneConfig
from fastgpt.load import load_model
from fastgpt.model.seeds import fold
from fastgpt.model.task import TaskShape
from fastgpt.task_folder import FineTuned, fine_tuned
from fastgpt.tasks import Encoded, Kind, SpecialTokens, Task, encode_examples, load_examples
from fastgpt.tasks.catalogue import data_set
from fastgpt.tasks.metrics import check_metrics
from fastgpt.tokenizer import Tokenizer

SPLIT = 5  # what the run's seed is folded with for the choice of examples


class Pretrained(NamedTuple):
    """What is started from."""

    model: ModelConfig  # as it was trained
    weights: dict[str, Tensor]
    tokenizer: Tokenizer
    special: SpecialTokens | None  # where it was fine-tuned before

    def with_special_tokens(self, *, dropout: float) -> ModelConfig:
        """The shape that the model has once it has the special tokens, as it may have them already."""
        new = 0 if self.special else SPECIAL_TOKENS
        return self.model.model_copy(update={"dropout": dropout, "vocab_size": self.model.vocab_size + new})


class Examples(NamedTuple):
    """The task and its examples as tokens."""

    task: Task
    train: list[Encoded]
    validation: list[Encoded]
    test: list[Encoded] | None

    def fingerprint(self) -> str:
        """A digest of what is trained and validated on."""
        digest = hashlib.sha256(repr(self.task).encode())
        for split in (self.train, self.validation):
            for item in split:
                digest.update(np.array([len(s) for s in item.sequences], np.int64).tobytes())
                digest.update(np.concatenate([np.array(s, np.int64) for s in item.sequences]).tobytes())
                digest.update(repr(item.target).encode())
        return digest.hexdigest()


def read_task(config: FinetuneConfig) -> tuple[Pretrained, FineTuned, Examples]:
    """The pre-trained model, what it is to be tuned to, and the examples as its tokens.

    Raises:
        UserError: a model, a file or a row that cannot be read; settings that do not fit the task.
    """
    pretrained = read_pretrained(config.pretrained)
    data = config.task.source
    if isinstance(data, str):
        data_set(data, setting="task.data")
    task, train_examples = load_examples(config.task.train, data, bad_rows=config.task.bad_rows)
    if config.task.metrics:
        task = task._replace(metrics=tuple(config.task.metrics))
    check_metrics(task.metrics, task, setting="task.metrics")
    special = pretrained.special or SpecialTokens.after(pretrained.model.vocab_size)

    def encoded(examples: Any) -> list[Encoded]:
        return encode_examples(
            examples,
            task,
            pretrained.tokenizer,
            special,
            pretrained.model.context,
            too_long=config.task.too_long,
        )

    def others(path: str | None) -> list[Encoded] | None:
        if path is None:
            return None
        return encoded(load_examples(path, data, bad_rows=config.task.bad_rows)[1])

    validation = others(config.task.validation)
    test = others(config.task.test)
    # chosen before they are encoded: a few of a large file need not wait for all of it
    shuffled = np.random.default_rng(fold(config.train.seed, SPLIT)).permutation(len(train_examples))
    if validation is None:
        kept = max(1, round(config.task.validation_fraction * len(train_examples)))
        validation, shuffled = encoded([train_examples[i] for i in sorted(shuffled[:kept])]), shuffled[kept:]
    if config.task.examples is not None:
        if config.task.examples > len(shuffled):
            raise UserError(
                f"task.examples: {config.task.examples} are asked for, and there are {len(shuffled)} to train on"
            )
        shuffled = shuffled[: config.task.examples]
    training = encoded([train_examples[i] for i in sorted(shuffled)])
    tuned = FineTuned(task, shape_of(task, config), special, data, config.task.too_long)
    return pretrained, tuned, Examples(task, training, validation, test)


def shape_of(task: Task, config: FinetuneConfig) -> TaskShape:
    """The output layer of a task."""
    return TaskShape(
        outputs=task.outputs,
        choice=task.kind is Kind.CHOICE,
        regression=task.score is not None,
        pooling=config.task.pooling,
        lm_weight=config.task.lm_weight,
        dropout=config.task.dropout,
        head_units=config.task.head_units,
    )


def read_pretrained(folder: str) -> Pretrained:
    """A model to start from. Raises UserError where it cannot be read, or has no tokenizer."""
    model, tokenizer = load_model(folder)
    if tokenizer is None:
        raise UserError(f"{folder}: it has no tokenizer, without which no text becomes tokens")
    tuned = fine_tuned(Path(folder))
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return Pretrained(model.config, weights, tokenizer, tuned.special if tuned else None)
