"""Every setting: its name, type, limits and default.

`load_config` in `fastgpt.settings` reads these from YAML and the command line; `fastgpt.wording` words the errors.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

Positive = Annotated[int, Field(ge=1)]
NotNegative = Annotated[int, Field(ge=0)]
Probability = Annotated[float, Field(ge=0, lt=1)]
Text = Annotated[str, Field(min_length=1)]
DEVICE = r"^(auto|cpu|cuda(:\d+)?)$"

# tokens of the first batches of GPT-3 ("Language Models are Few-Shot Learners", appendix B)
RAMP_START = 32_768


def broken(key: str, message: str) -> PydanticCustomError:
    """The error of a check over several settings, to be reported at `key` (relative to its section)."""
    return PydanticCustomError("broken_setting", "{message}", {"key": key, "message": message})


class Section(BaseModel):
    """A frozen group of settings; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


# Sizes in table 2.1 of "Language Models are Few-Shot Learners" that cannot be: (n_head, n_embd) -> what must be meant.
MISPRINTS = {
    (24, 2048): "The GPT-3 paper prints 24 heads of 128 for its 1.3B model, but 24 x 128 is 3072: use 16 heads",
    (40, 5140): "The GPT-3 paper prints a width of 5140 for its 13B model, but its 40 heads of 128 make 5120",
}


class ModelConfig(Section):
    """The shape of a GPT: `norm: post` is GPT-1's block, `norm: pre` GPT-2's."""

    n_layer: Annotated[int, Field(ge=1, le=1000)]
    n_head: Annotated[int, Field(ge=1, le=1024)]
    n_embd: Annotated[int, Field(ge=1, le=65536)]
    context: Annotated[int, Field(ge=1, le=2**20)]
    vocab_size: Annotated[int, Field(ge=1, le=2**22)]
    norm: Literal["pre", "post"] = "pre"
    dropout: Probability = 0.0
    attention: Literal["dense", "alternating"] = "dense"
    """`alternating` is GPT-3's: dense in every other layer from the first, within `window` in those between."""
    window: Positive | None = None
    """Positions that one reads in a banded layer, itself and those just before it; for `attention: alternating`."""

    def window_of(self, layer: int) -> int | None:
        """The window of a layer's attention, counting layers from 0; None where attention is dense."""
        return self.window if layer % 2 else None

    @model_validator(mode="after")
    def _heads_divide_the_width(self) -> "ModelConfig":
        if self.n_embd % self.n_head:
            multiple = max(1, round(self.n_embd / self.n_head)) * self.n_head
            advice = MISPRINTS.get((self.n_head, self.n_embd), f"The nearest is {multiple}")
            raise broken("n_embd", f"must be a multiple of model.n_head ({self.n_head}), not {self.n_embd}. {advice}")
        return self

    @model_validator(mode="after")
    def _banded_layers_have_a_window(self) -> "ModelConfig":
        if self.attention == "alternating" and self.window is None:
            raise broken("window", f"must be an integer of 1 to {self.context} where model.attention is alternating")
        if self.attention == "dense" and self.window is not None:
            raise broken(
                "window", f"is {self.window}, but model.attention is dense: leave it out, or use attention: alternating"
            )
        if self.window is not None and self.window > self.context:
            raise broken("window", f"must be at most model.context ({self.context}), not {self.window}")
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
    batch_ramp_tokens: Positive | None = None
    """Tokens over which the batch grows to `batch_tokens`, linearly in the tokens seen; null has it full at once."""
    batch_ramp_start: Positive | None = None
    """Tokens of a ramp's first update and of each step that it grows by, at most `batch_tokens`; null is 32,768."""
    micro_batch_size: Annotated[int, Field(ge=1, le=65536)]
    """Sequences of one forward pass on one rank."""
    lr: Annotated[float, Field(gt=0)]
    min_lr: Annotated[float, Field(ge=0)] = 0.0
    schedule: Literal["cosine", "gpt1", "constant"] = "cosine"
    warmup_steps: NotNegative = 0
    """Updates of linear warm-up; a run that ends before has only begun to warm up, as a trial of a long run does."""
    decay_steps: Positive | None = None
    """Update at which `cosine` has come down to `min_lr`, where it stays; null is the last."""
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
    device: Annotated[str, Field(pattern=DEVICE)] = "auto"
    cuda_graph: bool = True
    """Record forward and backward of a micro-batch as one CUDA graph (the single engine, on a GPU)."""
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    """CPU threads of each rank; null shares the cores between the ranks of this host."""
    compile: bool = False
    """Compile the blocks by torch.compile. The first update takes longer; the next start finds them compiled."""
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
        """Micro-batches of one update, over all ranks; under a ramp, once it is over."""
        return self.train.batch_tokens // (self.train.micro_batch_size * self.model.context)

    @property
    def smallest_batch_tokens(self) -> int:
        """Tokens of the first update, over all ranks; those of the others are multiples of it."""
        if self.train.batch_ramp_tokens is None:
            return self.train.batch_tokens
        return min(self.train.batch_ramp_start or RAMP_START, self.train.batch_tokens)

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
    def _ramp_is_of_whole_batches(self) -> "Config":
        train, start = self.train, self.smallest_batch_tokens
        unit = train.micro_batch_size * self.model.context
        if start % unit or train.batch_tokens % start:
            raise broken(
                "train.batch_ramp_start",
                f"must be a multiple of train.micro_batch_size x model.context ({unit}) that divides "
                f"train.batch_tokens ({train.batch_tokens}), not {start}",
            )
        return self

    @model_validator(mode="after")
    def _only_a_cosine_decays_early(self) -> "Config":
        if self.train.decay_steps is not None and self.train.schedule != "cosine":
            raise broken("train.decay_steps", f"is for train.schedule: cosine, not {self.train.schedule}")
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
