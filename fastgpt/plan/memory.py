"""The bytes of a training step on one GPU, tensor by tensor.

What is live changes within a step. Four moments can be the fullest: the backward of the output matrix, when all
activations and the logits are there; that of the last block, when its own gradients have come; that of the first block,
when all gradients of weights are there; and that of the embedding, whose table has more than one. The plan takes the
largest.

B sequences of T positions make B T rows; N is the width, H the number of heads, V the vocabulary, e the bytes of a
weight or activation. The names are those of the code in `fastgpt/model`, the tensors what its operations keep for the
backward (`docs/numerics.md`).
"""

from typing import NamedTuple

from fastgpt import buckets
from fastgpt.config import Config, ModelConfig
from fastgpt.plan.layout import Layout
from fastgpt.sizes import largest_matrix, parameter_count

FP32 = 4
# of the CUDA context, cuBLAS, NCCL and the kernels' own scratch memory
RESERVE = 2 * 10**9
# what the allocator loses between its blocks
FRAGMENTATION = 0.04
# elements that DeepSpeed's stage 1 reduces at once in bf16, whatever its settings say
REDUCED_AT_STAGE_1 = 500_000_000
# elements of weights that DeepSpeed keeps in the host's memory although they have a place on a disk (max_in_cpu)
KEPT_OF_A_DISK = 10**9
# buffers between a disk and memory: of a part of the optimizer's state and its gradient
STATE_BUFFERS = 4
# columns of logits in 16 bits come in multiples of this (fastgpt_kernels/torch_ops/logits.py)
LOGITS_MULTIPLE = 128


class Memory(NamedTuple):
    """Bytes by kind, at one moment."""

    weights: int  # in the run's precision
    gradients: int
    optimizer: int  # fp32 masters and both moments
    activations: int  # kept for the backward, and the gradients that pass through it
    logits: int  # and the output matrix in as many rows as they have columns
    buffers: int  # DeepSpeed's, for communication

    @property
    def total(self) -> int:
        """The sum."""
        return sum(self)


def needed(config: Config, layout: Layout) -> Memory:
    """The bytes of an update at its fullest moment."""
    return max(moments(config, layout).values(), key=lambda memory: memory.total)


def fits(memory: Memory, capacity: int, beside: int = 0) -> bool:
    """Whether a GPU of so many bytes has room for it and so many beside, with what its libraries and allocator take."""
    return (memory.total + beside) * (1 + FRAGMENTATION) + RESERVE <= capacity


def beside_the_graph(config: Config, layout: Layout) -> int:
    """Bytes of a validation where the micro-step is a CUDA graph: its memory is nobody else's, also between updates.

    The logits of a micro-batch, or what is there at once in the forward pass of a block: its stream, a branch, a norm,
    and the MLP before and after GELU.
    """
    if layout.deepspeed or not config.engine.cuda_graph:
        return 0
    model, rows, e = config.model, layout.micro_batch_size * config.model.context, layout.element
    row = rows * model.n_embd * e
    return max(sum(logits_and_matrix(model, rows, e).values()) + 2 * row, 11 * row)


def moments(config: Config, layout: Layout) -> dict[str, Memory]:
    """Bytes by kind, at each moment that can be the fullest."""
    model, rows = config.model, layout.micro_batch_size * config.model.context
    e = layout.element
    row = rows * model.n_embd * e
    block = sum(kept_by_block(model, rows, e).values())
    inside = 0 if layout.checkpointing else block * model.n_layer
    inputs = block_input(model, rows, e) * model.n_layer if layout.checkpointing else 0
    outside = sum(kept_outside(model, rows, e).values())
    # the backward of a checkpointed block holds all that its forward makes anew
    recomputed = block - block_input(model, rows, e) if layout.checkpointing else 0
    through = sum(passing_through_block(model, rows, e).values())
    logits = sum(logits_and_matrix(model, rows, e).values())
    table = model.output_rows * model.n_embd * e

    weights, optimizer = resident_weights(config, layout), resident_optimizer(config, layout)
    buffers = communication_buffers(config, layout)
    held, finished = resident_gradients(config, layout), passing_gradients(config, layout)

    def moment(gradients: int, activations: int, logits: int = 0) -> Memory:
        return Memory(weights, held + gradients, optimizer, activations, logits, buffers)

    return {
        # the logits' memory holds their gradient; of the output matrix and of its input there are gradients already
        "output matrix": moment(table, inside + inputs + outside + row, logits),
        "last block": moment(table, inside + inputs + recomputed + through),
        "first block": moment(max(finished, table), block + through),
        # the table has two gradients, as output and as input, and then their sum
        "embedding": moment(max(finished, table) + 2 * table, row),
    }


def kept_by_block(model: ModelConfig, rows: int, e: int) -> dict[str, int]:
    """What one block keeps for its backward, its input included, in the order of its forward."""
    n, h = model.n_embd, model.heads
    statistics = rows * 2 * FP32
    attention = {
        "qkv": rows * 3 * n * e,
        "attention": rows * n * e,
        "log(sum exp) of the scores": rows * h * FP32,
    }
    mlp = {"up, before GELU": rows * 4 * n * e, "up, after GELU": rows * 4 * n * e}
    if model.norm == "pre":
        return {
            "stream": rows * n * e,
            "norm_1": rows * n * e,
            "mean and 1/std of norm_1": statistics,
            **attention,
            "stream + attention": rows * n * e,
            "norm_2": rows * n * e,
            "mean and 1/std of norm_2": statistics,
            **mlp,
        }
    return {
        "input": rows * n * e,
        **attention,
        "input + attention": rows * n * e,
        "norm_1": rows * n * e,
        "mean and 1/std of norm_1": statistics,
        **mlp,
        "norm_1 + mlp": rows * n * e,
        "mean and 1/std of norm_2": statistics,
    }


def block_input(model: ModelConfig, rows: int, e: int) -> int:
    """What a block is given: all that checkpointing keeps of it."""
    return rows * model.n_embd * e


def kept_outside(model: ModelConfig, rows: int, e: int) -> dict[str, int]:
    """What is kept of a forward pass outside the blocks."""
    n = model.n_embd
    final = {"final norm": rows * n * e, "mean and 1/std of the final norm": rows * 2 * FP32}
    return {
        "tokens and targets": rows * 2 * 8,
        "losses": rows * FP32,
        "output of the last block": rows * n * e,
        **(final if model.norm == "pre" else {}),
    }


def logits_and_matrix(model: ModelConfig, rows: int, e: int) -> dict[str, int]:
    """Logits, in 16 bits with columns of zeros, for which the output matrix is copied into rows of zeros.

    Without that copy, a table on which dropout acts is kept as it was dropped.
    """
    columns = -(-model.output_rows // LOGITS_MULTIPLE) * LOGITS_MULTIPLE
    if e == FP32 or columns == model.output_rows:
        dropped = {"dropped table": model.output_rows * model.n_embd * e}
        kept = dropped if model.embedding == "table" and model.dropout else {}
        return {"logits": rows * model.output_rows * e, **kept}
    return {"logits": rows * columns * e, "output matrix": columns * model.n_embd * e}


def passing_through_block(model: ModelConfig, rows: int, e: int) -> dict[str, int]:
    """Gradients of activations that are there at once in the backward of a block, at its fullest: that of the MLP."""
    n = model.n_embd
    return {
        "of the stream": rows * n * e,
        "after GELU": rows * 4 * n * e,
        "before GELU": rows * 4 * n * e,
        "of the MLP's input": rows * n * e,
    }


def resident_weights(config: Config, layout: Layout) -> int:
    """Weights in the run's precision; ZeRO-3 has its own part and what is gathered."""
    parameters, e = parameter_count(config.model), layout.element
    if layout.zero_stage < 3 or not layout.deepspeed:
        return parameters * e
    own = -(-parameters // layout.gpus) if layout.offload.parameters == "none" else 0
    return (own + buckets.live(config.model)) * e


def resident_optimizer(config: Config, layout: Layout) -> int:
    """fp32 masters and the two moments; in fp32 the weights are the masters, unless ZeRO keeps its own."""
    if layout.offload.optimizer != "none":
        return 0
    own_masters = layout.precision != "fp32" or (layout.deepspeed and layout.zero_stage > 0)
    return -(-parameter_count(config.model) * FP32 * (3 if own_masters else 2) // layout.shards(1))


def resident_gradients(config: Config, layout: Layout) -> int:
    """fp32 sums of gradients that stay through the update.

    A single process keeps them where it accumulates. DeepSpeed keeps them whole at stage 1 (BF16_Optimizer) and its own
    part at stages 2 and 3; at stage 0 it accumulates in the run's precision. With the optimizer on the host the sums of
    stage 3 lie there, and so do those of stage 2 in fp32.
    """
    parameters = parameter_count(config.model)
    if not layout.deepspeed:
        return parameters * FP32 if layout.accumulation > 1 else 0
    if layout.zero_stage == 0:
        return parameters * layout.element
    offloaded = layout.offload.optimizer != "none"
    if offloaded and (layout.zero_stage == 3 or (layout.zero_stage == 2 and layout.precision == "fp32")):
        return 0
    return -(-parameters * FP32 // layout.shards(2))


def passing_gradients(config: Config, layout: Layout) -> int:
    """Gradients in the run's precision at the end of a backward pass, before they are added to the sums."""
    if layout.deepspeed:
        return 0  # each is added, or sent, as soon as it is there
    if layout.precision == "fp32" and layout.accumulation > 1:
        return 0
    return parameter_count(config.model) * layout.element


def communication_buffers(config: Config, layout: Layout) -> int:
    """DeepSpeed's buckets.

    Stage 1 flattens a bucket of fp32 sums. Stages 2 and 3 fill buckets of gradients, two at stage 2 where reduction
    overlaps, and reduce them in fp32. Stage 0 makes an fp32 copy of its gradients for the optimizer, when activations
    are gone, which is never the fullest moment but for the smallest batches; it has no buckets of its own. Gradients
    that go to the host from stages 1 and 2 pass through a buffer as large as the largest of them.
    """
    if not layout.deepspeed or layout.zero_stage == 0:
        return 0
    offloaded = layout.offload.optimizer != "none" and layout.zero_stage < 3
    passing = largest_matrix(config.model) * layout.element if offloaded else 0
    if layout.gpus == 1:
        return passing
    if layout.zero_stage == 1:
        return passing + min(REDUCED_AT_STAGE_1, parameter_count(config.model)) * FP32
    filled = 2 if layout.zero_stage == 2 and config.engine.overlap_comm else 1
    return passing + buckets.reduced(config) * (filled * layout.element + FP32)


def host_memory(config: Config, layout: Layout) -> int:
    """Bytes of host memory for each GPU, for what is offloaded.

    Masters, moments and fp32 gradients are 16 bytes a parameter of a GPU's own. Stages 1 and 2 have a rounded copy of
    the masters beside them, stage 3 the sums of gradients over micro-batches. Of what lies on a disk the host has the
    buffers, those sums, and 10^9 weights.
    """
    model, e = config.model, layout.element
    own = -(-parameter_count(model) // layout.gpus)
    total = 0
    if layout.offload.optimizer == "cpu":
        total += own * (4 * FP32 + (FP32 if layout.zero_stage == 3 else e))
    elif layout.offload.optimizer == "nvme":
        total += own * FP32 + min(own, buckets.swapped(model, layout.gpus)) * FP32 * STATE_BUFFERS
    if layout.offload.parameters == "cpu":
        total += own * e
    elif layout.offload.parameters == "nvme":
        total += (min(own, KEPT_OF_A_DISK) + buckets.swapped_weight(model, layout.gpus) * buckets.SWAPPED_WEIGHTS) * e
    return total
