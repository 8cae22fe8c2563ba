"""Every setting: its name, type, limits and default.

`load_config` in `fastgpt.settings` reads these from YAML and the command line; `fastgpt.wording` words the errors.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from fastgpt.deepspeed_keys import leaves, owner
from fastgpt.errors import UserError

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


# GPT-1's Table 5: "a single layer 2048 unit LSTM".
UNITS = 2048

# Settings of a transformer alone, and their values where nothing is set.
ATTENTION = {"n_head": None, "norm": "pre", "attention": "dense", "window": None, "embedding": "separate"}


class ModelConfig(Section):
    """The shape of a GPT (`norm: post` is GPT-1's block, `norm: pre` GPT-2's), or of an LSTM."""

    kind: Literal["transformer", "lstm"] = "transformer"
    """`lstm` is the comparison of GPT-1's Table 5 (docs/transfer.md)."""
    n_layer: Annotated[int, Field(ge=1, le=1000)]
    n_head: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Needed for `kind: transformer`; an LSTM has none."""
    n_units: Annotated[int, Field(ge=1, le=65536)] | None = None
    """Units of each layer of an LSTM, by default the 2048 of GPT-1's Table 5; a transformer has none."""
    n_embd: Annotated[int, Field(ge=1, le=65536)]
    context: Annotated[int, Field(ge=1, le=2**20)]
    vocab_size: Annotated[int, Field(ge=1, le=2**22)]
    norm: Literal["pre", "post"] = "pre"
    dropout: Probability = 0.0
    attention: Literal["dense", "alternating"] = "dense"
    """`alternating` is GPT-3's: dense in every other layer from the first, within `window` in those between."""
    window: Positive | None = None
    """Positions that one reads in a banded layer, itself and those just before it; for `attention: alternating`."""
    embedding: Literal["separate", "table"] = "separate"
    """`table` is that of OpenAI's GPT-1 code: positions are rows after the tokens', dropout acts on the table itself,
    and the softmax spans all of its rows."""

    @property
    def output_rows(self) -> int:
        """Rows of the output matrix: columns of the logits that the loss is of."""
        return self.vocab_size + (self.context if self.embedding == "table" else 0)

    def window_of(self, layer: int) -> int | None:
        """The window of a layer's attention, counting layers from 0; None where attention is dense."""
        return self.window if layer % 2 else None

    @property
    def heads(self) -> int:
        """Attention heads of a transformer."""
        assert self.n_head is not None, "an LSTM has no heads"
        return self.n_head

    @property
    def units(self) -> int:
        """Units of each layer of an LSTM."""
        assert self.n_units is not None, "a transformer has no units"
        return self.n_units

    @model_validator(mode="before")
    @classmethod
    def _units_are_the_papers(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("kind") == "lstm" and given.get("n_units") is None:
            return given | {"n_units": UNITS}
        return given

    @model_validator(mode="after")
    def _settings_are_those_of_the_kind(self) -> "ModelConfig":
        if self.kind == "lstm":
            for name, default in ATTENTION.items():
                if (value := getattr(self, name)) != default:
                    raise broken(name, f"is {value}, but model.kind is lstm, which has no such thing: leave it out")
        elif self.n_head is None:
            raise broken("n_head", "is missing; it must be an integer of at least 1 and at most 1024")
        elif self.n_units is not None:
            raise broken("n_units", f"is {self.n_units}, but model.kind is transformer: leave it out")
        return self

    @model_validator(mode="after")
    def _heads_divide_the_width(self) -> "ModelConfig":
        if self.kind == "lstm":
            return self
        if self.n_embd % self.heads:
            multiple = max(1, round(self.n_embd / self.heads)) * self.heads
            advice = MISPRINTS.get((self.heads, self.n_embd), f"The nearest is {multiple}")
            raise broken("n_embd", f"must be a multiple of model.n_head ({self.heads}), not {self.n_embd}. {advice}")
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


def only_transformers(model: ModelConfig, what: str) -> None:
    """Refuse another kind of model.

    Raises:
        UserError: naming what is of transformers alone.
    """
    if model.kind != "transformer":
        raise UserError(f"model.kind: {what} knows transformers alone, not {model.kind}")


class DataConfig(Section):
    """What is trained on."""

    path: Text
    """A text file or folder (.txt, .jsonl, .jsonl.gz), a folder of token shards, or `stdlib`."""
    tokenizer: Text = "auto"
    """`auto` trains a byte-level BPE of at most `model.vocab_size` entries; else a folder of tokenizer files, GPT-1's
    or those of a byte-level BPE."""
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
    schedule: Literal["cosine", "gpt1", "constant", "linear", "slanted"] = "cosine"
    """`linear` is that of GPT-1's fine-tuning, `slanted` the slanted triangle of ULMFiT, from `min_lr` and back."""
    warmup_steps: NotNegative = 0
    """Updates of linear warm-up; a run that ends before has only begun to warm up, as a trial of a long run does."""
    warmup_share: Probability | None = None
    """Warm-up as a share of all updates, in the place of `warmup_steps`, for `linear` and `slanted`."""
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
    layer_lr_decay: Annotated[float, Field(ge=1)] = 1.0
    """Each block learns at the rate of the one above it divided by this, the embeddings slowest; ULMFiT has 2.6."""
    unfreeze_every: Positive | None = None
    """Updates after which one level more is trained, from the top, at first that alone (ULMFiT); null trains all."""
    init: Text | None = None
    """A run or a model folder whose weights, and by default whose tokenizer, are started with."""
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
    offload_optimizer: Literal["none", "cpu", "nvme"] = "none"
    """Keep masters and moments in the host's memory (ZeRO 1 to 3) or on a disk (ZeRO-3), and update on the CPU."""
    offload_parameters: Literal["none", "cpu", "nvme"] = "none"
    """Keep weights that no module is using in the host's memory or on a disk (ZeRO-3)."""
    nvme_folder: Text | None = None
    """Where `nvme` keeps what it has, in a folder for each rank that goes with the run: a fast disk of each host."""
    reduce_bucket_size: Positive | None = None
    """Gradient elements that DeepSpeed reduces at once; null takes a sixteenth of the model (docs/scale-out.md)."""
    overlap_comm: bool = True
    """Reduce gradients while the backward pass goes on (GPUs only)."""
    deepspeed: dict[str, Any] = {}
    """Further keys of DeepSpeed's configuration, as DeepSpeed spells them (docs/scale-out.md)."""
    timeout_minutes: Positive = 30
    """How long a rank waits for the others before it gives up."""

    @property
    def offloads(self) -> bool:
        """Whether anything is kept off the device."""
        return self.offload_optimizer != "none" or self.offload_parameters != "none"

    @model_validator(mode="after")
    def _offload_is_what_zero_can_do(self) -> "EngineConfig":
        if not self.offloads:
            return self
        key = "offload_optimizer" if self.offload_optimizer != "none" else "offload_parameters"
        if self.kind == "single":
            raise broken(key, "needs DeepSpeed, but engine.kind is single: use engine.kind=deepspeed, or auto")
        if self.offload_parameters != "none" and self.zero_stage < 3:
            raise broken(
                "offload_parameters",
                f"needs engine.zero_stage 3, not {self.zero_stage}: below it every GPU holds all parameters",
            )
        if self.offload_optimizer != "none" and self.zero_stage < 1:
            raise broken("offload_optimizer", "needs engine.zero_stage 1, 2 or 3, not 0")
        if self.offload_optimizer == "nvme" and self.zero_stage < 3:
            raise broken(
                "offload_optimizer",
                f"of nvme needs engine.zero_stage 3, not {self.zero_stage}; stages 1 and 2 offload to cpu only",
            )
        return self

    @model_validator(mode="after")
    def _nvme_has_a_folder(self) -> "EngineConfig":
        users = [name for name in ("offload_optimizer", "offload_parameters") if getattr(self, name) == "nvme"]
        if users and self.nvme_folder is None:
            raise broken(users[0], "is nvme, which needs engine.nvme_folder: a folder on a fast disk of each host")
        if not users and self.nvme_folder is not None:
            raise broken("nvme_folder", "is set, but neither engine.offload_optimizer nor offload_parameters is nvme")
        return self

    @model_validator(mode="after")
    def _deepspeeds_keys_are_not_ours(self) -> "EngineConfig":
        for key in leaves(self.deepspeed):
            advice = owner(key)
            if advice:
                raise broken(f"deepspeed.{key}", f"is not set there: {advice}")
        return self


class KernelsConfig(Section):
    """Which implementation of the operations."""

    backend: Literal["auto", "triton", "native", "torch", "reference"] = "auto"


Column = Annotated[str, Field(min_length=1)] | Annotated[int, Field(ge=1)]
"""A column of a table: its name in the header or its key in a JSON object; without a header its number, from 1."""


class TableConfig(Section):
    """A table of labelled texts: a user's own, or the published form of a data set."""

    kind: Literal["classification", "pair", "similarity", "choice"]
    """One text; two texts in their order (entailment); two texts in either order; a text and its continuations."""
    format: Literal["csv", "tsv", "jsonl"]
    """`csv` quotes cells, `tsv` never does (GLUE), `jsonl` has an object a line, whose keys are the columns."""
    text: list[Column | list[Column]]
    """The column of each text; a list of columns is one text, joined by spaces. For `choice`: context, question."""
    choices: list[Column] | None = None
    """For `choice`: the column of each, or the one key of a JSON object that holds the list of them."""
    n_choices: Annotated[int, Field(ge=2, le=100)] | None = None
    """How many that list must have."""
    label: Column | None = None
    """The column of what is to be predicted; null where there is none, as in data to predict."""
    labels: list[str | int] | dict[str | int, str] | None = None
    """The values that `label` takes, or value: name of the class; classes are numbered as they first appear here."""
    score: Annotated[list[float], Field(min_length=2, max_length=2)] | None = None
    """For regression, in the place of `labels`: the lowest and the highest value."""
    skip: list[str | int] = []
    """Values of `label` whose rows are left out, such as SNLI's `-`."""
    header: bool = True
    """Whether the first row of a csv or tsv names the columns."""
    widths: list[Annotated[int, Field(ge=1)]] = []
    """How many columns a row without header may have; empty allows any that has those needed."""
    empty: Literal["refuse", "skip"] = "refuse"
    """What becomes of a row that lacks a text."""
    encoding: Literal["utf-8", "latin-1"] = "utf-8"

    @property
    def columns(self) -> list[str | int]:
        """Every column that a row must have, but for the label's."""
        texts = [column for entry in self.text for column in (entry if isinstance(entry, list) else [entry])]
        return [*texts, *(self.choices or [])]

    @property
    def class_of(self) -> dict[str, int]:
        """The number of the class, or of the right choice, that each value of `label` stands for."""
        if self.labels is None:
            return {str(i): i for i in range(self.number_of_choices)} if self.kind == "choice" else {}
        names = self.class_names
        return {str(value): names.index(name) for value, name in self._named_values()}

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes, or of the values that stand for the choices, by their numbers."""
        return tuple(dict.fromkeys(name for _, name in self._named_values()))

    @property
    def number_of_choices(self) -> int:
        """How many choices an example has; 0 unless that is its kind."""
        return self.n_choices or len(self.choices or [])

    def _named_values(self) -> list[tuple[str | int, str]]:
        if isinstance(self.labels, dict):
            return list(self.labels.items())
        return [(value, str(value)) for value in self.labels or []]

    @model_validator(mode="after")
    def _kind_has_its_columns(self) -> "TableConfig":
        allowed = {"classification": (1,), "pair": (2,), "similarity": (2,), "choice": (1, 2)}[self.kind]
        if len(self.text) not in allowed:
            count = " or ".join(map(str, allowed))
            raise broken("text", f"has {len(self.text)} texts; kind {self.kind} has {count}")
        if [] in self.text:
            raise broken("text", "has an empty list of columns")
        if self.kind != "choice" and (self.choices is not None or self.n_choices is not None):
            raise broken("choices", f"are for kind choice, not {self.kind}")
        if self.kind == "choice" and self.number_of_choices < 2:
            raise broken("choices", "must be at least 2 columns, or one with n_choices")
        if self.n_choices is not None and len(self.choices or []) != 1:
            raise broken("n_choices", "goes with one column in choices, whose value is a list")
        if self.n_choices is not None and self.format != "jsonl":
            raise broken("n_choices", f"is for format jsonl; a cell of {self.format} is one choice")
        return self

    @model_validator(mode="after")
    def _columns_are_named_as_the_format_names_them(self) -> "TableConfig":
        columns = [*self.columns, *([] if self.label is None else [self.label])]
        named = self.format == "jsonl" or self.header
        for column in columns:
            if isinstance(column, int) and named:
                raise broken("text", f"names column {column}; with a header, and in jsonl, columns have names")
            if isinstance(column, str) and not named:
                raise broken("text", f"names column {column!r}; without a header columns are numbers, from 1")
        if repeated := next((column for column in columns if columns.count(column) > 1), None):
            raise broken("text", f"has column {repeated!r} twice among texts, choices and label")
        return self

    @model_validator(mode="after")
    def _label_has_its_values(self) -> "TableConfig":
        if self.labels is not None and self.score is not None:
            raise broken("score", "is for regression, labels are for classes: leave one of them out")
        if self.kind == "choice":
            if self.score is not None:
                raise broken("score", "is for regression; kind choice has none")
            if self.labels is not None and len(self.class_names) != self.number_of_choices:
                raise broken("labels", f"names {len(self.class_names)} of {self.number_of_choices} choices")
        elif self.labels is None and self.score is None:
            raise broken("labels", "must be a list of values of label, or value: name; for regression give score")
        elif self.labels is not None and len(self.class_names) < 2:
            raise broken("labels", f"must name at least 2 classes, not {len(self.class_names)}")
        if self.score is not None and not self.score[0] < self.score[1]:
            raise broken("score", f"must be the lowest and the highest value, not {self.score}")
        return self


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
    def _an_lstm_is_not_compiled(self) -> "Config":
        if self.engine.compile and self.model.kind == "lstm":
            raise broken(
                "engine.compile", "compiles the blocks of a transformer, and model.kind is lstm: set it to false"
            )
        return self

    @model_validator(mode="after")
    def _only_a_cosine_decays_early(self) -> "Config":
        if self.train.decay_steps is not None and self.train.schedule != "cosine":
            raise broken("train.decay_steps", f"is for train.schedule: cosine, not {self.train.schedule}")
        return self

    @model_validator(mode="after")
    def _warm_up_is_told_once(self) -> "Config":
        train = self.train
        if train.warmup_share is not None and train.schedule not in ("linear", "slanted"):
            raise broken("train.warmup_share", f"is for train.schedule linear and slanted, not {train.schedule}")
        if train.warmup_share is not None and train.warmup_steps:
            raise broken("train.warmup_share", "and train.warmup_steps both say how long the warm-up is: keep one")
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
            flat[f"{prefix}{key}"] = value
    return flat
