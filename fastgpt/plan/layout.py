"""How a run is laid out: the batch over GPUs and time, ZeRO's stage, and what is kept where."""

from typing import Literal, NamedTuple

from fastgpt.config import Config

Where = Literal["none", "cpu", "nvme"]
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


class Offload(NamedTuple):
    """What is kept off the GPU, as `engine.offload_optimizer` and `engine.offload_parameters` have it."""

    optimizer: Where = "none"
    parameters: Where = "none"

    @property
    def kinds(self) -> str:
        """`none`, `optimizer`, `parameters`, or `optimizer+parameters`."""
        return "+".join(name for name, where in self._asdict().items() if where != "none") or "none"


class Layout(NamedTuple):
    """One way to run a config on some GPUs."""

    gpus: int
    precision: Literal["fp32", "bf16", "fp16"]
    micro_batch_size: int  # sequences of one forward pass on one GPU
    accumulation: int  # forward passes of an update on one GPU
    zero_stage: Literal[0, 1, 2, 3] = 0
    offload: Offload = Offload()
    checkpointing: bool = False
    deepspeed: bool = False

    @property
    def sequences(self) -> int:
        """Sequences of an update."""
        return self.gpus * self.accumulation * self.micro_batch_size

    @property
    def element(self) -> int:
        """Bytes of a weight and of an activation."""
        return BYTES[self.precision]

    def shards(self, stage: int) -> int:
        """Over how many GPUs that is spread which ZeRO shards from this stage on."""
        return self.gpus if self.deepspeed and self.zero_stage >= stage else 1


def precision_of(config: Config) -> Literal["fp32", "bf16", "fp16"]:
    """What `engine.precision` comes to on a GPU of the table, all of which compute in bf16."""
    return "bf16" if config.engine.precision == "auto" else config.engine.precision


def sequences_of(config: Config, gpus: int) -> int:
    """The sequences of an update that some GPUs can share evenly: the config's, or the nearest number to it."""
    asked = config.train.batch_tokens // config.model.context
    return max(1, round(asked / gpus)) * gpus


def as_configured(config: Config, gpus: int) -> Layout:
    """The layout that the settings ask for; with a batch that cannot be shared evenly, that of the nearest."""
    micro = config.train.micro_batch_size
    accumulation = max(1, round(config.micro_batches / gpus))
    offloads = config.engine.offloads
    deepspeed = config.engine.kind == "deepspeed" or (config.engine.kind == "auto" and (gpus > 1 or offloads))
    return Layout(
        gpus,
        precision_of(config),
        micro,
        accumulation,
        config.engine.zero_stage if deepspeed else 0,
        Offload(config.engine.offload_optimizer, config.engine.offload_parameters),
        config.train.activation_checkpointing,
        deepspeed,
    )
