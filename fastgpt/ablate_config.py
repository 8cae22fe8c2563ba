"""The settings of `fastgpt ablate`: models, tasks, and the rows and curves in which their fine-tunings are compared."""

from typing import Annotated, Any

from pydantic import Field, model_validator

from fastgpt.config import NotNegative, Positive, Section, Text, broken
from fastgpt.errors import did_you_mean

Tree = dict[str, Any]
"""Settings of `fastgpt finetune`, in their sections; those that are not there are the defaults, or another place's."""


class LayersConfig(Section):
    """The curve of scores over the number of blocks transferred (Radford et al. 2018, figure 2, left)."""

    tasks: Annotated[list[Text], Field(min_length=1)]
    """Which of the tasks."""
    blocks: Annotated[list[Annotated[int, Field(ge=-1)]], Field(min_length=1)] | None = None
    """Values of `task.transfer_blocks`: 0 transfers the embeddings alone, -1 nothing; null takes 0 and every block."""


class ZeroShotConfig(Section):
    """The curves of zero-shot heuristics over the updates of pre-training (figure 2, right)."""

    heuristics: Annotated[dict[str, Text], Field(min_length=1)]
    """A heuristic of `fastgpt evaluate`: the file of its examples."""
    examples: Positive | None = None
    """Score so many of each file, chosen by the first seed; null scores all."""
    best: dict[str, float] = Field(default={})
    """The scores that count as 1, by heuristic; by default the best mean among the rows of a task with that data set
    and metric, and where none is above chance the best that the heuristic itself comes to."""


class AblateConfig(Section):
    """A whole study."""

    out: Text
    """Its folder."""
    models: Annotated[dict[str, Text | Tree], Field(min_length=1)]
    """name: settings of `fastgpt train` that make the model, here or in a file (.yaml); or the folder of a model."""
    finetune: Tree = Field(default={})
    """Settings that all fine-tunings have."""
    tasks: Annotated[dict[str, Tree], Field(min_length=1)]
    """name: settings of the fine-tunings to this task, over those in `finetune`."""
    rows: Annotated[dict[str, Tree], Field(min_length=1)]
    """name: settings over those of the task, and `model`, by default the first; the first row is what others are
    compared with."""
    layers: LayersConfig | None = None
    zero_shot: ZeroShotConfig | None = None
    seeds: list[NotNegative] = Field(default=[1, 2, 3], min_length=1)
    """Each fine-tuning is done with each of them: it decides on what is new in the model, masks, order, and which
    examples are taken where `task.examples` or `task.validation_fraction` choose."""
    jobs: Annotated[int, Field(ge=1, le=256)] = 1
    """Runs at a time, on their shares of the cores."""
    keep_models: bool = False
    """Keep the checkpoints and the best model of every fine-tuning; else only what it came to, and its metrics."""

    @model_validator(mode="after")
    def _seeds_differ(self) -> "AblateConfig":
        if len(set(self.seeds)) < len(self.seeds):
            raise broken("seeds", f"has one twice: {', '.join(map(str, self.seeds))}")
        return self

    @model_validator(mode="after")
    def _rows_name_their_models(self) -> "AblateConfig":
        for name, row in self.rows.items():
            model = row.get("model")
            if "model" in row and not (isinstance(model, str) and model in self.models):
                near = did_you_mean(str(model), self.models)
                raise broken(f"rows.{name}.model", f"must be one of {', '.join(self.models)}, not {model!r}.{near}")
        return self

    @model_validator(mode="after")
    def _curves_name_tasks(self) -> "AblateConfig":
        tasks = self.layers.tasks if self.layers else []
        for task in tasks:
            if tasks.count(task) > 1:
                raise broken("layers.tasks", f"has one twice: {task}")
            if task not in self.tasks:
                near = did_you_mean(task, self.tasks)
                raise broken("layers.tasks", f"must be some of {', '.join(self.tasks)}, not {task!r}.{near}")
        zero_shot = self.zero_shot
        for name in zero_shot.best if zero_shot else ():
            if zero_shot and name not in zero_shot.heuristics:
                near = did_you_mean(name, zero_shot.heuristics)
                raise broken(f"zero_shot.best.{name}", f"is not one of zero_shot.heuristics.{near}")
        return self

    def model_of(self, row: str) -> str:
        """The name of the model that a row starts from."""
        return str(self.rows[row].get("model", next(iter(self.models))))
