"""Tasks to fine-tune on: data sets as examples, examples as token sequences, and how predictions are scored."""

from fastgpt.tasks.catalogue import DATA_SETS, load_examples
from fastgpt.tasks.example import Example, Kind, Task
from fastgpt.tasks.metrics import METRICS, score
from fastgpt.tasks.transform import Encoded, SpecialTokens, TaskBatch, collate, encode_examples

__all__ = [
    "DATA_SETS",
    "METRICS",
    "Encoded",
    "Example",
    "Kind",
    "SpecialTokens",
    "Task",
    "TaskBatch",
    "collate",
    "encode_examples",
    "load_examples",
    "score",
]
