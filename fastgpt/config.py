"""Every setting, its type, its limits and its default."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """A frozen group of settings; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelConfig(Section):
    """The shape of a GPT."""

    n_layer: Positive
    n_head: Positive
    n_embd: Positive
    context: Positive
    vocab_size: Positive
    norm: Literal["pre", "post"] = "pre"
    dropout: Fraction = 0.0
