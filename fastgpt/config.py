"""Every setting: its name, type, limits and default.

`load_config` in `fastgpt.settings` reads these from YAML and the command line, and words the errors.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

Positive = Annotated[int, Field(ge=1)]
NotNegative = Annotated[int, Field(ge=0)]
Probability = Annotated[float, Field(ge=0, lt=1)]
Text = Annotated[str, Field(min_length=1)]


def broken(key: str, message: str) -> PydanticCustomError:
    """The error of a check over several settings, to be reported at `key` (relative to its section)."""
    return PydanticCustomError("broken_setting", "{message}", {"key": key, "message": message})


class Section(BaseModel):
    """A frozen group of settings; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ModelConfig(Section):
    """The shape of a GPT: `norm: post` is GPT-1's block, `norm: pre` GPT-2's."""

    n_layer: Annotated[int, Field(ge=1, le=1000)]
    n_head: Annotated[int, Field(ge=1, le=1024)]
    n_embd: Annotated[int, Field(ge=1, le=65536)]
    context: Annotated[int, Field(ge=1, le=2**20)]
    vocab_size: Annotated[int, Field(ge=1, le=2**22)]
    norm: Literal["pre", "post"] = "pre"
    dropout: Probability = 0.0

    @model_validator(mode="after")
    def _heads_divide_the_width(self) -> "ModelConfig":
        if self.n_embd % self.n_head:
            multiple = max(1, round(self.n_embd / self.n_head)) * self.n_head
            raise broken(
                "n_embd",
                f"must be a multiple of model.n_head ({self.n_head}), not {self.n_embd}. The nearest is {multiple}",
            )
        return self


class DataConfig(Section):
    """What is trained on."""

    path: Text
    """A text file or folder (.txt, .jsonl, .jsonl.gz), a folder of token shards, or `stdlib`."""
    tokenizer: Text = "auto"
    """`auto` trains a byte-level BPE of at most `model.vocab_size` entries; else a folder of tokenizer files."""
    cache: Text | None = None
    """Where prepared text is kept; by default a folder `cache` beside the run folders."""
    text_key: Text = "text"
    validation_fraction: Annotated[float, Field(ge=1e-6, le=0.5)] = 0.01
    verify: bool = True
    """Check the SHA-256 of every token shard before training on it."""


class TrainConfig(Section):
    """How it is trained."""

    steps: Annotated[int, Field(ge=1, le=10**9)]
    batch_tokens: Annotated[int, Field(ge=1, le=2**31)]
    """Tokens of one update, over all ranks and accumulation steps."""
    micro_batch_size: Annotated[int, Field(ge=1, le=65536)]
    """Sequences of one forward pass on one rank."""
    lr: Annotated[float, Field(gt=0)]
    min_lr: Annotated[float, Field(ge=0)] = 0.0
    schedule: Literal["cosine", "gpt1", "constant"] = "cosine"
    warmup_steps: NotNegative = 0
    """Updates of linear warm-up; a run that ends before has only begun to warm up, as a trial of a long run does."""
    optimizer: Literal["adamw", "gpt1"] = "adamw"
    """`gpt1` is the Adam of the code published with GPT-1: its bias correction takes in the decay, and not eps."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    beta1: Probability = 0.9
    beta2: Probability = 0.95
    eps: Annotated[float, Field(gt=0)] = 1e-8
    clip: Annotated[float, Field(gt=0)] | None = 1.0
    """Largest global gradient norm; null leaves gradients as they are."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 1337
    activation_checkpointing: bool = False
    """Keep one tensor for each block and compute the rest again in the backward pass: less memory, the same bits."""
    eval_every: Positive | None = None
    """Updates between two validations; null validates at the start and the end only."""
    eval_tokens: Positive | None = None
    """Validation tokens read each time; null reads all."""
    save_every: Positive | None = None
    """Updates between two checkpoints; null saves at the end only."""
    keep: Positive = 2
    """Checkpoints kept."""
    sample_tokens: NotNegative = 64
    """Length of the text generated at each validation; 0 generates none."""
    sample_prompt: str = ""


class EngineConfig(Section):
    """What runs the updates."""

    kind: Literal["auto", "single", "deepspeed"] = "auto"
    zero_stage: Literal[0, 1, 2, 3] = 1
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")] = "auto"
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    """CPU threads of each rank; null shares the cores between the ranks of this host."""
    reduce_bucket_size: Positive = 500_000_000
    """Gradient elements that DeepSpeed reduces at once."""
    overlap_comm: bool = True
    """Reduce gradients while the backward pass goes on (GPUs only)."""
    timeout_minutes: Positive = 30
    """How long a rank waits for the others before it gives up."""


class KernelsConfig(Section):
    """Which implementation of the operations."""

    backend: Literal["auto", "triton", "torch", "reference"] = "auto"


class Config(Section):
    """A whole run."""

    out: Text
    """The run folder."""
    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    engine: EngineConfig = EngineConfig()
    kernels: KernelsConfig = KernelsConfig()

    @property
    def micro_batches(self) -> int:
        """Micro-batches of one update, over all ranks."""
        return self.train.batch_tokens // (self.train.micro_batch_size * self.model.context)

    @model_validator(mode="after")
    def _batch_is_whole(self) -> "Config":
        unit = self.train.micro_batch_size * self.model.context
        if self.train.batch_tokens % unit:
            multiple = max(1, round(self.train.batch_tokens / unit)) * unit
            raise broken(
                "train.batch_tokens",
                f"must be a multiple of train.micro_batch_size x model.context ({self.train.micro_batch_size} x "
                f"{self.model.context} = {unit}), not {self.train.batch_tokens}. The nearest is {multiple}",
            )
        return self

    @model_validator(mode="after")
    def _floor_is_below_the_peak(self) -> "Config":
        if self.train.min_lr > self.train.lr:
            raise broken("train.min_lr", f"must be at most train.lr ({self.train.lr}), not {self.train.min_lr}")
        return self


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one level: `{"train": {"lr": 1}}` to `{"train.lr": 1}`."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
