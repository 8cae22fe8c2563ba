"""The settings of `fastgpt finetune`; their defaults are those of GPT-1's code."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from fastgpt.config import (
    Config,
    DataConfig,
    EngineConfig,
    KernelsConfig,
    ModelConfig,
    Positive,
    Probability,
    Section,
    TableConfig,
    Text,
    TrainConfig,
    broken,
)

SPECIAL_TOKENS = 3  # start, delimiter, extract


class TaskConfig(Section):
    """What the model is to learn."""

    data: Text | None = None
    """The name of a data set; its files are read as they are published."""
    table: TableConfig | None = None
    """What the columns of your own files hold, in the place of `data`."""
    train: Text
    """The file of training examples (RACE, IMDb: the folder)."""
    validation: Text | None = None
    """The file of validation examples; null keeps `validation_fraction` of the training examples for it."""
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    test: Text | None = None
    """Labelled examples that the best model is scored on in the end."""
    bad_rows: Literal["refuse", "skip"] = "refuse"
    """What becomes of rows that cannot be read."""
    too_long: Literal["cut", "refuse"] = "cut"
    """What becomes of texts that do not fit `model.context`: cut at their ends as in GPT-1's code, or an error."""
    examples: Positive | None = None
    """Train on so many of the examples, chosen by the seed; null takes all."""
    metrics: list[Text] = Field(default=[])
    """Scores to tell; the first chooses the best checkpoint. Empty takes those of the data set."""
    lm_weight: Annotated[float, Field(ge=0)] = 0.5
    """Lambda, the weight of the auxiliary language-model loss; 0 leaves it out."""
    transfer_blocks: Annotated[int, Field(ge=-1)] | None = None
    """GPT-1's n_transfer: blocks taken over from the bottom, with the embeddings; 0 these alone, -1 nothing."""
    pooling: Literal["extract", "concat"] = "extract"
    """What the output layer reads: the activation at the extract token, or that, maximum and mean (ULMFiT)."""
    dropout: Probability = 0.1
    """Of what the output layer reads, and its hidden layer hands on; one mask for all choices of an example."""
    head_units: Annotated[int, Field(ge=1, le=65536)] | None = None
    """ReLU units of a hidden layer between activations and output (ULMFiT); null has a linear output layer (GPT-1)."""

    @property
    def source(self) -> str | TableConfig:
        """How the files are read: a data set by its name, or what the columns of a table hold."""
        return self.table or self.data or ""

    @model_validator(mode="after")
    def _data_are_named_once(self) -> "TaskConfig":
        if (self.data is None) == (self.table is None):
            raise broken(
                "data", "must name a data set, or else task.table must tell of your own files: give one of them"
            )
        return self


class FinetuneTrainConfig(Section):
    """How it learns."""

    epochs: Annotated[int, Field(ge=1, le=10_000)] = 3
    batch_size: Positive = 32
    """Examples of one update, over all ranks; the last ones of an epoch that do not fill a batch are left out of it."""
    micro_batch_size: Annotated[int, Field(ge=1, le=65536)] = 32
    """Examples of one forward pass on one rank."""
    lr: Annotated[float, Field(gt=0)] = 6.25e-5
    min_lr: Annotated[float, Field(ge=0)] = 0.0
    schedule: Literal["linear", "slanted", "cosine", "constant"] = "linear"
    warmup_share: Probability = 0.002
    """Warm-up as a share of all updates."""
    optimizer: Literal["adamw", "gpt1"] = "gpt1"
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    beta1: Probability = 0.9
    beta2: Probability = 0.999
    eps: Annotated[float, Field(gt=0)] = 1e-8
    clip: Annotated[float, Field(gt=0)] | None = 1.0
    layer_lr_decay: Annotated[float, Field(ge=1)] = 1.0
    """Each block learns at the rate of what is above it divided by this; ULMFiT has 2.6."""
    unfreeze: Literal["all", "gradual", "output"] = "all"
    """`gradual` trains the output layer alone in the first epoch, and one block more in each that follows (ULMFiT);
    `output` trains that layer alone, on the features of a model that stays as it is."""
    dropout: Probability = 0.1
    """Of embedding, attention and residual branches."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 1337
    activation_checkpointing: bool = False
    eval_every: Positive | None = None
    """Updates between two validations; null validates after every epoch."""
    save_every: Positive | None = None
    """Updates between two checkpoints; null saves after every epoch."""
    keep: Positive = 1
    """Checkpoints kept, beside the best model."""


class FinetuneConfig(Section):
    """A whole run of fine-tuning."""

    out: Text
    """The run folder."""
    pretrained: Text
    """A run, a checkpoint or a model folder to start from; the command line names it."""
    task: TaskConfig
    train: FinetuneTrainConfig = FinetuneTrainConfig()
    engine: EngineConfig = EngineConfig()
    kernels: KernelsConfig = KernelsConfig()

    @model_validator(mode="after")
    def _batch_is_whole(self) -> "FinetuneConfig":
        train = self.train
        if train.batch_size % train.micro_batch_size:
            near = max(1, round(train.batch_size / train.micro_batch_size)) * train.micro_batch_size
            raise broken(
                "train.batch_size",
                f"must be a multiple of train.micro_batch_size ({train.micro_batch_size}), not {train.batch_size}. "
                f"The nearest is {near}",
            )
        return self

    @model_validator(mode="after")
    def _floor_is_below_the_peak(self) -> "FinetuneConfig":
        if self.train.min_lr > self.train.lr:
            raise broken("train.min_lr", f"must be at most train.lr ({self.train.lr}), not {self.train.min_lr}")
        return self

    @model_validator(mode="after")
    def _blocks_are_not_compiled(self) -> "FinetuneConfig":
        if self.engine.compile:
            raise broken("engine.compile", "is for training on text: batches of examples have many shapes")
        return self


def engine_config(config: FinetuneConfig, model: ModelConfig, updates_per_epoch: int) -> Config:
    """The settings as an engine reads them.

    Args:
        config: of the fine-tuning.
        model: of the model that is trained, special tokens included.
        updates_per_epoch: how many an epoch has.
    """
    train = config.train
    steps = train.epochs * updates_per_epoch
    shares = train.schedule in ("linear", "slanted")
    same = ("lr", "min_lr", "schedule", "optimizer", "weight_decay", "beta1", "beta2", "eps", "clip", "layer_lr_decay")
    return Config(
        out=config.out,
        model=model,
        data=DataConfig(path=config.task.train),
        train=TrainConfig(
            steps=steps,
            batch_tokens=train.batch_size * model.context,
            micro_batch_size=train.micro_batch_size,
            seed=train.seed,
            activation_checkpointing=train.activation_checkpointing,
            warmup_share=train.warmup_share if shares else None,
            unfreeze_every={"all": None, "gradual": updates_per_epoch, "output": steps}[train.unfreeze],
            warmup_steps=0 if shares else round(train.warmup_share * steps),
            **{name: getattr(train, name) for name in same},
        ),
        # a graph of a micro-batch is for one shape
        engine=config.engine.model_copy(update={"cuda_graph": False}),
        kernels=config.kernels,
    )
