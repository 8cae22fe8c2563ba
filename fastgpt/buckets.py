"""How many elements DeepSpeed communicates, gathers and swaps at once: from the model's size, with the reasons.

Each number is a balance. What moves in large pieces moves at the link's rate, but takes memory, and the last piece of
a pass has nothing left to hide behind. None of them changes a result. `engine.deepspeed` replaces those that are no
settings of ours.
"""

from fastgpt.config import Config, ModelConfig
from fastgpt.sizes import block_parameters, largest_matrix, parameter_count

# 32 MiB in fp32: PyTorch's DDP takes 25 MiB for the piece from which on a link is at its rate
SMALLEST_REDUCED = 2**23
# DeepSpeed's own for models of any size
LARGEST_REDUCED = 500_000_000
# DeepSpeed's own: 100 MB of weights in 16 bits
SMALLEST_PREFETCH = 50_000_000
# pieces of gradients that a backward pass sends: all but the last, a sixteenth, can travel while it computes
PIECES = 16
# parts of a rank's masters and moments on a disk; one of them, and its gradient, is in memory at a time
SWAPPED_PARTS = 8
# of a part: 16 bytes each in memory, 1.6 GB
LARGEST_PART = 100_000_000
# a disk is read and written in pieces of at least 1 MiB; DeepSpeed keeps in memory what is smaller
SMALLEST_PART = 2**20


def reduced(config: Config) -> int:
    """Gradient elements of one reduction (stages 1 to 3): `engine.reduce_bucket_size`, or a sixteenth of the model.

    DeepSpeed makes the whole bucket, however small the model, and begins to reduce when it is full: one as large as the
    model would wait for the end of the backward pass.
    """
    parameters = parameter_count(config.model)
    chosen = config.engine.reduce_bucket_size
    if chosen is None:
        chosen = max(SMALLEST_REDUCED, min(parameters // PIECES, LARGEST_REDUCED))
    return min(chosen, parameters)


def prefetched(model: ModelConfig) -> int:
    """Elements that stage 3 gathers ahead: those of the next block, while this one computes."""
    wanted = max(SMALLEST_PREFETCH, min(block_parameters(model), LARGEST_REDUCED))
    return min(wanted, parameter_count(model))


def live(model: ModelConfig) -> int:
    """Elements that stage 3 holds gathered: two blocks, or one and the token table, and what it gathers ahead."""
    block = block_parameters(model)
    in_use = max(2 * block, model.output_rows * model.n_embd + block)
    return min(in_use + prefetched(model), parameter_count(model))


def kept_for_reuse(model: ModelConfig) -> int:
    """Elements computed until a gathered weight is used again, so that stage 3 keeps it gathered: a block's.

    DeepSpeed's own 10^9 keep whole small models gathered between their forward and their backward pass.
    """
    return block_parameters(model)


def swapped(model: ModelConfig, ranks: int) -> int:
    """Elements of the parts in which masters and moments go to and from a disk."""
    own = -(-parameter_count(model) // ranks)
    return max(SMALLEST_PART, min(own // SWAPPED_PARTS, LARGEST_PART))


def swapped_weight(model: ModelConfig, ranks: int) -> int:
    """Elements of a buffer through which one weight's part comes from a disk: those of the largest."""
    return max(SMALLEST_PART, -(-largest_matrix(model) // ranks))
