"""The choice of a layout, and what follows from it."""

from collections.abc import Iterator
from typing import NamedTuple

from fastgpt.config import Config, only_transformers
from fastgpt.errors import UserError
from fastgpt.plan.hardware import Gpu, find_gpu
from fastgpt.plan.layout import Layout, Offload, as_configured, precision_of, sequences_of
from fastgpt.plan.memory import Memory, beside_the_graph, fits, host_memory, needed
from fastgpt.plan.speed import CASES, Interconnect, Speed, collectives, speed
from fastgpt.ramp import batch_tokens
from fastgpt.sizes import parameter_count

MOST_GPUS = 1_000_000
# each takes less memory than the one before it, and more time
OFFLOADS = (
    Offload(),
    Offload("cpu"),
    Offload("cpu", "cpu"),
    Offload("nvme", "cpu"),
    Offload("nvme", "nvme"),
)
# layouts whose speeds differ by less are equals: a higher stage has more collectives, whose latency is left out
INDIFFERENT = 0.01
MASTER_AND_MOMENTS = 12  # bytes of a parameter's training state in a checkpoint


class Request(NamedTuple):
    """What is asked, beside the settings; None takes what is usual for the GPU."""

    gpus: int
    gpu: str
    per_node: int = 8
    network: float | None = None  # bytes/s of each GPU to other nodes
    tokens: float | None = None  # of the run; by default as many as the settings ask for
    price: float | None = None  # US dollars of a GPU-hour
    disk: float = 2e9  # bytes/s that a node writes
    host: float | None = None  # bytes of host memory that come with each GPU
    as_configured: bool = False  # plan the settings' own layout, not the best


class Plan(NamedTuple):
    """A layout on some hardware, and what it needs, reaches and costs."""

    config: Config
    request: Request
    gpu: Gpu
    interconnect: Interconnect
    layout: Layout
    memory: Memory
    without_checkpointing: Memory
    with_checkpointing: Memory
    fits: bool
    speeds: dict[str, Speed]  # by case
    notes: list[str]

    @property
    def parameters(self) -> int:
        """Of the model."""
        return parameter_count(self.config.model)

    @property
    def batch_tokens(self) -> int:
        """Of an update."""
        return self.layout.sequences * self.config.model.context

    @property
    def tokens(self) -> float:
        """Of the run."""
        if self.request.tokens is not None:
            return self.request.tokens
        return float(batch_tokens(self.config).before(self.config.train.steps + 1))

    @property
    def host_bytes(self) -> int:
        """Of host memory for each GPU, for what is offloaded."""
        return host_memory(self.config, self.layout)

    @property
    def communication_bytes(self) -> int:
        """That each GPU sends in an update."""
        return sum(c.volume(self.layout.gpus) for c in collectives(self.config, self.layout))

    @property
    def checkpoint_bytes(self) -> int:
        """Of one checkpoint: fp32 masters and moments, and the model in the run's precision."""
        return self.parameters * (MASTER_AND_MOMENTS + self.layout.element)

    @property
    def checkpoint_seconds(self) -> float:
        """Every rank writes its part of the state; the first one writes the model."""
        nodes = -(-self.layout.gpus // self.request.per_node)
        state, model = self.parameters * MASTER_AND_MOMENTS, self.parameters * self.layout.element
        return (state / nodes + model) / self.request.disk

    def hours(self, case: str = "expected") -> float:
        """Of the whole run."""
        return self.tokens / self.speeds[case].tokens_per_second / 3600

    def cost(self, case: str = "expected") -> float:
        """US dollars of the whole run."""
        price = self.gpu.hourly if self.request.price is None else self.request.price
        return self.hours(case) * self.layout.gpus * price


def make_plan(config: Config, request: Request) -> Plan:
    """The plan of a config on some GPUs.

    The fastest layout of those that fit, by its expected speed: at each ZeRO stage, with and without activation
    checkpointing, with the largest micro-batch that fits. Offload is considered only where nothing fits without it, to
    a disk only where nothing fits with the host's memory.

    Raises:
        UserError: a number out of its range, an unknown GPU, several for `engine.kind: single`, or another model than a
            transformer.
    """
    _check(request)
    only_transformers(config.model, "fastgpt plan")
    if config.engine.kind == "single" and request.gpus > 1:
        raise UserError(f"engine.kind: single runs on one GPU, not {request.gpus}; use engine.kind=auto, or --gpus 1")
    gpu = find_gpu(request.gpu)
    network = gpu.network if request.network is None else request.network
    interconnect = Interconnect(request.per_node, gpu.link, network, request.disk)
    if request.as_configured:
        layout = as_configured(config, request.gpus)
        return _plan(config, request, gpu, interconnect, layout)
    host = gpu.host if request.host is None else request.host
    for offload in OFFLOADS:
        found = [one for one in _fitting(config, request.gpus, gpu, offload) if host_memory(config, one) <= host]
        if found:
            rates = [speed(config, one, gpu, interconnect, CASES["expected"]).tokens_per_second for one in found]
            # of equals the first: the lower stage, without checkpointing
            layout = next(one for one, rate in zip(found, rates, strict=True) if rate >= max(rates) * (1 - INDIFFERENT))
            return _plan(config, request, gpu, interconnect, layout)
    smallest = _layout(config, request.gpus, 3, OFFLOADS[-1], checkpointing=True, micro=1)
    return _plan(config, request, gpu, interconnect, smallest)


def has_room(config: Config, layout: Layout, gpu: Gpu) -> bool:
    """Whether a layout's updates, and its validations, fit one of these GPUs."""
    return fits(needed(config, layout), gpu.memory, beside_the_graph(config, layout))


def gpus_that_suffice(config: Config, gpu: Gpu, more_than: int) -> int | None:
    """The smallest power of two times so many GPUs on which something fits without offload; None if none does."""
    gpus = 2 * more_than
    while gpus <= MOST_GPUS:
        if next(_fitting(config, gpus, gpu, Offload()), None):
            return gpus
        gpus *= 2
    return None


def _fitting(config: Config, gpus: int, gpu: Gpu, offload: Offload) -> Iterator[Layout]:
    """The layouts that fit, each with the largest micro-batch that does."""
    for stage in _stages(config, gpus, offload):
        for checkpointing in (False, True):
            share = sequences_of(config, gpus) // gpus
            for micro in (size for size in range(min(share, 65536), 0, -1) if share % size == 0):
                layout = _layout(config, gpus, stage, offload, checkpointing=checkpointing, micro=micro)
                if has_room(config, layout, gpu):
                    yield layout
                    break


def _stages(config: Config, gpus: int, offload: Offload) -> tuple[int, ...]:
    """The ZeRO stages to choose from; stage 0 only where it adds gradients up in fp32, as all others do."""
    if offload.kinds == "none":
        if gpus == 1 and config.engine.kind != "deepspeed":
            return (0,)
        return (0, 1, 2, 3) if precision_of(config) == "fp32" else (1, 2, 3)
    return (1, 2, 3) if offload == Offload("cpu") else (3,)


def _layout(config: Config, gpus: int, stage: int, offload: Offload, *, checkpointing: bool, micro: int) -> Layout:
    accumulation = sequences_of(config, gpus) // gpus // micro
    deepspeed = gpus > 1 or offload.kinds != "none" or config.engine.kind == "deepspeed"
    return Layout(gpus, precision_of(config), micro, accumulation, stage, offload, checkpointing, deepspeed)  # type: ignore[arg-type]


def _plan(config: Config, request: Request, gpu: Gpu, interconnect: Interconnect, layout: Layout) -> Plan:
    memory = needed(config, layout)
    speeds = {name: speed(config, layout, gpu, interconnect, case) for name, case in CASES.items()}
    ways = [needed(config, layout._replace(checkpointing=way)) for way in (False, True)]
    host = gpu.host if request.host is None else request.host
    room = has_room(config, layout, gpu) and host_memory(config, layout) <= host
    notes = []
    asked = config.train.batch_tokens
    planned = layout.sequences * config.model.context
    if planned != asked:
        notes.append(
            f"train.batch_tokens: {asked:,} are {asked // config.model.context:,} sequences, which {layout.gpus:,} "
            f"GPUs cannot share evenly; planned with the nearest that they can, {planned:,}"
        )
    notes += _about_the_ramp(config, layout)
    if not room:
        enough = gpus_that_suffice(config, gpu, layout.gpus)
        advice = f"{enough:,} of these GPUs have room without offload" if enough else "no number of them has room"
        notes.append(
            f"does not fit: {memory.total / 1e9:.1f} of {gpu.memory / 1e9:.0f} GB, beside what libraries take, and "
            f"{host_memory(config, layout) / 1e9:.1f} of {host / 1e9:.0f} GB of host memory for each GPU; {advice}"
        )
    return Plan(config, request, gpu, interconnect, layout, memory, ways[0], ways[1], room, speeds, notes)


def _about_the_ramp(config: Config, layout: Layout) -> list[str]:
    """Speed and cost are those of the full batch; the first ones must be shared evenly too."""
    if config.train.batch_ramp_tokens is None:
        return []
    share, start = layout.gpus * layout.micro_batch_size * config.model.context, config.smallest_batch_tokens
    if start % share == 0:
        return []
    return [
        f"train.batch_ramp_start: {start:,} tokens cannot be shared by {layout.gpus:,} GPUs in micro-batches of "
        f"{layout.micro_batch_size:,}; it must be a multiple of {share:,} that divides train.batch_tokens"
    ]


def _check(request: Request) -> None:
    if not 1 <= request.gpus <= MOST_GPUS:
        raise UserError(f"--gpus is {request.gpus}; it must be an integer of 1 to {MOST_GPUS:,}")
    if request.per_node < 1:
        raise UserError(f"--gpus-per-node is {request.per_node}; it must be at least 1")
    for name, value, unit in (
        ("--network", request.network, 1e9),
        ("--tokens", request.tokens, 1),
        ("--disk", request.disk, 1e9),
    ):
        if value is not None and not 0 < value < float("inf"):
            raise UserError(f"{name} is {value / unit:g}; it must be a number above 0")
    if request.host is not None and not 0 <= request.host < float("inf"):
        raise UserError(f"--host-memory is {request.host / 1e9:g}; it must be a number of at least 0")
    if request.price is not None and not 0 <= request.price < float("inf"):
        raise UserError(f"--price is {request.price:g}; it must be a number of at least 0")
