"""How long an update takes: matrix products, attention, memory traffic, the optimizer, communication.

One model of efficiency serves every GPU and every config. Each part has a rate that somebody has measured; three
`Case`s say which share of it a run may expect. docs/planning.md has the sources and how far published runs are off.
"""

from collections.abc import Iterator
from typing import NamedTuple

from fastgpt.config import Config, ModelConfig
from fastgpt.plan.hardware import Gpu
from fastgpt.plan.layout import Layout
from fastgpt.plan.memory import KEPT_OF_A_DISK
from fastgpt.sizes import flops_per_token, parameter_count


class Case(NamedTuple):
    """Shares of the measured rates."""

    product: float  # of the best matrix product
    attention: float  # of FlashAttention-2's rate
    bandwidth: float  # of the data sheet's memory bandwidth
    traffic: float  # of the reads and writes between the products
    link: float  # of the data sheet's links
    overlap: float  # of communication that computing hides


# `high` is the roof: the best product, attention at 400 TFLOP/s forward on an H100 where FlashAttention-2 has 229, a
# copy's 90% of the bandwidth (4.3 of 4.8 TB/s on an H200), element-wise work fused as far as it goes (6.7 ms where the
# operations of this repository, one by one, move what takes a copy 12.4). `low` fuses nothing (18.8 ms), hides no
# communication and has clocks that a hot GPU falls to. `expected` is in between: this repository's operations, one by
# one, at four fifths of a copy's speed, beside FlashAttention-2.
CASES = {
    "low": Case(0.8, 0.75, 0.6, 18.8 / 12.4, 0.7, 0.0),
    "expected": Case(0.9, 1.0, 0.72, 1.0, 0.8, 0.5),
    "high": Case(1.0, 400 / 229, 0.9, 6.7 / 12.4, 0.9, 0.9),
}
TILE = 128  # rows and columns that a product is cut into
FILL = 256  # elements of the inner dimension, 4 stages of 64, that a tile's pipeline fills with before it is at speed
BACKWARD = 180 / 229  # FlashAttention-2's backward rate, of its forward's (H100, causal, head size 64, T = 1,024)
WIDE_HEAD = 260 / 229  # its rate at head size 128, of that at 64
DIAGONAL = 341  # positions: its rates at T = 1k and 16k, 229 and 299, are as T / (T + 341)
# what an update of AdamW reads and writes of a parameter: two moments and the master both ways, the gradient, the
# weight; and once more the gradient, for its norm
ADAMW_BYTES = 28 + 4
# a gradient in 16 bits is added to one in 32
ACCUMULATE_BYTES = 2 + 4 + 4
# of each GPU of a node: a PCIe link, and its share of the host's memory bandwidth
HOST_LINK = 25e9
HOST_BANDWIDTH = 25e9


class Interconnect(NamedTuple):
    """How the GPUs are connected, among them and to a disk; bytes/s in one direction."""

    per_node: int
    link: float  # of each GPU
    network: float  # of each GPU
    disk: float = 2e9  # of a node


class Collective(NamedTuple):
    """A collective operation over all GPUs, `times` in an update; `size` is the bytes of the whole tensor."""

    name: str
    size: int
    times: int
    passes: int  # 2 for an all-reduce, 1 for an all-gather or a reduce-scatter

    def volume(self, gpus: int) -> int:
        """Bytes that each GPU sends in an update (the optimum, which rings reach)."""
        return round(self.times * self.passes * self.size * (gpus - 1) / gpus)

    def seconds(self, gpus: int, interconnect: Interconnect, share: float) -> float:
        """Within each node first, then between nodes, where each GPU has its part of the tensor to send."""
        local = min(gpus, interconnect.per_node)
        nodes = -(-gpus // local)
        within = (local - 1) / local / interconnect.link
        between = (nodes - 1) / nodes / local / interconnect.network
        return self.times * self.passes * self.size * (within + between) / share


class Speed(NamedTuple):
    """What an update takes in one case."""

    parts: dict[str, float]  # seconds of each part, communication included, hidden or not
    step_seconds: float
    tokens_per_second: float
    mfu: float


def speed(config: Config, layout: Layout, gpu: Gpu, interconnect: Interconnect, case: Case) -> Speed:
    """The time of an update over all GPUs."""
    computing = computing_seconds(config, layout, gpu, case)
    compute = sum(computing.values())
    traffic = collectives(config, layout)
    communication = sum(c.seconds(layout.gpus, interconnect, case.link) for c in traffic)
    exposed = max(communication * (1 - case.overlap), communication - compute)
    offloading = offload_seconds(config, layout, interconnect)
    seconds = compute + exposed + offloading
    tokens = layout.sequences * config.model.context
    parts = {**computing, "communication": communication, "offload": offloading}
    rate = tokens / seconds
    mfu = rate * flops_per_token(config.model) / (layout.gpus * peak(gpu, layout))
    return Speed(parts, seconds, rate, mfu)


def peak(gpu: Gpu, layout: Layout) -> float:
    """What a run's MFU is reckoned against."""
    return gpu.fp32 if layout.precision == "fp32" else gpu.peak


def computing_seconds(config: Config, layout: Layout, gpu: Gpu, case: Case) -> dict[str, float]:
    """Seconds of an update on one GPU, by part."""
    model, rows = config.model, layout.micro_batch_size * config.model.context
    e, bandwidth = layout.element, gpu.bandwidth * case.bandwidth
    again = 1 if layout.checkpointing else 0  # forward passes of the blocks that the backward repeats
    rate = case.product * (gpu.fp32 if layout.precision == "fp32" else gpu.product)

    def product(m: int, n: int, k: int) -> float:
        work = 2 * m * n * k / (rate * efficiency(m, n, k))
        return max(work, (m * k + k * n + m * n) * e / bandwidth)

    multiplying = sum(times * product(m, n, k) for m, n, k, times in products(model, rows, again))
    attention = 0.0
    for layer in range(model.n_layer):
        pairs = visible_pairs(model, layer)
        work = 4 * model.n_embd * pairs * layout.micro_batch_size
        attending = attention_rate(model, pairs, gpu, layout) * case.attention
        attention += (1 + again) * work / attending + 2.5 * work / (attending * BACKWARD)

    forward, backward = (sum(passes(model)[way].values()) for way in ("forward", "backward"))
    width = model.n_embd * rows * e
    between = model.n_layer * width * ((1 + again) * forward + backward) * case.traffic / bandwidth
    loss = 2 * rows * model.output_rows * e / bandwidth
    parameters = parameter_count(model)
    added = layout.accumulation > 1 or layout.deepspeed
    accumulate = parameters * ACCUMULATE_BYTES / bandwidth if added and layout.precision != "fp32" else 0.0
    owned = parameters / layout.shards(1) if layout.offload.optimizer == "none" else 0
    return {
        "matrix products": multiplying * layout.accumulation,
        "attention": attention * layout.accumulation,
        "between products": between * layout.accumulation,
        "loss": loss * layout.accumulation,
        "adding gradients up": accumulate * layout.accumulation,
        "optimizer": owned * ADAMW_BYTES / bandwidth,
    }


def products(model: ModelConfig, rows: int, again: int = 0) -> Iterator[tuple[int, int, int, int]]:
    """(m, n, k, times) of the products (m, k) x (k, n) of a forward and backward pass over so many rows.

    qkv, attention's output, up and down in each block, whose forward is repeated `again` times, and the output matrix.
    Each weight has three: y = x W^T, dx = dy W, dW = dy^T x.
    """
    n, layers = model.n_embd, model.n_layer
    block = [(n, 3 * n, layers, again), (n, n, layers, again), (n, 4 * n, layers, again), (4 * n, n, layers, again)]
    for inputs, outputs, times, repeats in [*block, (n, model.output_rows, 1, 0)]:
        yield rows, outputs, inputs, times * (1 + repeats)
        yield rows, inputs, outputs, times
        yield outputs, inputs, rows, times


def efficiency(m: int, n: int, k: int) -> float:
    """What is left of the best rate for a product (m, k) x (k, n): tiles that stick out, and pipelines that fill."""
    return m / _padded(m) * n / _padded(n) * k / (k + FILL)


def _padded(size: int) -> int:
    return -(-size // TILE) * TILE


def visible_pairs(model: ModelConfig, layer: int) -> int:
    """Pairs of a query and a key that it sees, in one sequence."""
    window = model.window_of(layer) or model.context
    return window * model.context - window * (window - 1) // 2


def attention_rate(model: ModelConfig, pairs: int, gpu: Gpu, layout: Layout) -> float:
    """FLOP/s of FlashAttention-2's forward: its rate at head size 64 and T = 1,024, for other heads and lengths."""
    size = model.n_embd // model.heads
    heads = size / 64 if size < 64 else 1 + (WIDE_HEAD - 1) * min(1.0, (size - 64) / 64)
    length = 2 * pairs / model.context  # as long a causal sequence has as many pairs a query
    lengths = length / (length + DIAGONAL) * (1024 + DIAGONAL) / 1024
    precision = gpu.fp32 / gpu.peak if layout.precision == "fp32" else 1.0
    return gpu.attention * heads * lengths * precision


def passes(model: ModelConfig) -> dict[str, dict[str, int]]:
    """Rows of N elements that a block's operations between the products read and write, of one position."""
    if model.norm == "pre":
        return {
            "forward": {"norm_1": 2, "add, norm_2": 4, "GELU": 8, "add": 3},
            "backward": {"GELU": 12, "add, norm_2": 4, "norm_1": 3, "sum of the branches": 3, "bias gradients": 5},
        }
    return {
        "forward": {"add, norm_1": 4, "GELU": 8, "add, norm_2": 4},
        "backward": {"add, norm_2": 4, "GELU": 12, "add, norm_1": 4, "sum of the branches": 6, "bias gradients": 5},
    }


def collectives(config: Config, layout: Layout) -> list[Collective]:
    """What an update sends (Rajbhandari et al. 2020, section 7, with gradients in fp32 as fastgpt has them).

    Stage 0 reduces in the run's precision. Stages 0 and 1 reduce once an update, 2 and 3 after every backward pass;
    stage 2 all the same by all-reduces, each of a bucket that holds several ranks' parts (DeepSpeed's
    use_multi_rank_bucket_allreduce), where a reduce-scatter would send half as much. Stage 3 gathers the token table
    twice in each pass, as the embedding's and as the output matrix.
    """
    if layout.gpus == 1 or not layout.deepspeed:
        return []
    parameters, n = parameter_count(config.model), layout.accumulation
    weights = parameters * layout.element
    match layout.zero_stage:
        case 0:
            return [Collective("all-reduce of gradients", weights, 1, 2)]
        case 1:
            return [
                Collective("all-reduce of gradients", 4 * parameters, 1, 2),
                Collective("all-gather of weights", weights, 1, 1),
            ]
        case 2:
            return [
                Collective("all-reduce of gradients", 4 * parameters, n, 2),
                Collective("all-gather of weights", weights, 1, 1),
            ]
        case _:
            table = config.model.vocab_size * config.model.n_embd * layout.element
            return [
                Collective("all-gather of weights, forward and backward", weights + table, 2 * n, 1),
                Collective("reduce-scatter of gradients", 4 * parameters, n, 1),
            ]


def offload_seconds(config: Config, layout: Layout, interconnect: Interconnect) -> float:
    """What the host adds: gradients down, its AdamW, weights up; and with parameters there, those of each pass.

    Through a disk go masters and moments both ways, 24 bytes; and the weights of each pass, beyond those that the host
    keeps.
    """
    own, e = parameter_count(config.model) / layout.gpus, layout.element
    disk = interconnect.disk / min(layout.gpus, interconnect.per_node)
    seconds = 0.0
    if layout.offload.optimizer != "none":
        seconds += own * (4 + e) / HOST_LINK + own * ADAMW_BYTES / HOST_BANDWIDTH
    if layout.offload.optimizer == "nvme":
        seconds += own * 24 / disk
    if layout.offload.parameters != "none":
        seconds += 2 * layout.accumulation * own * e / HOST_LINK
    if layout.offload.parameters == "nvme":
        seconds += (2 * layout.accumulation + 1) * max(0, own - KEPT_OF_A_DISK) * e / disk
    return seconds
