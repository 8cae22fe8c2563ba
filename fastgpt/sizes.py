"""What a model's settings say of its size, in plain arithmetic: parameters, and operations a token."""

from fastgpt.config import ModelConfig


def parameter_count(config: ModelConfig) -> int:
    """The number of parameters, the tied output matrix counted once."""
    n = config.n_embd
    embeddings = (config.vocab_size + config.context) * n
    final_norm = 2 * n if config.norm == "pre" else 0
    return embeddings + config.n_layer * block_parameters(config) + final_norm


def block_parameters(config: ModelConfig) -> int:
    """The number of parameters of one block."""
    n = config.n_embd
    # matrices of n x 3n, n x n and twice n x 4n; biases 3n + n + 4n + n; two norms of 2n
    return 12 * n * n + 13 * n


def largest_matrix(config: ModelConfig) -> int:
    """Elements of the largest parameter."""
    return config.n_embd * max(config.output_rows, config.context, 4 * config.n_embd)


def flops_per_token(config: ModelConfig) -> int:
    """Floating-point operations of training on one token of a full context, forward and backward: 6N + 12 L C T.

    N counts the weights that take part in a matrix product, 12 C^2 in each of L blocks and the V x C output matrix (and
    its rows of positions, under `embedding: table`): not the input side of the token table, nor positions, biases and
    norms. 12 L C T is attention over T positions in full, without the half that causality saves (Chowdhery et al. 2022,
    "PaLM", appendix B); a banded layer counts its window in the place of T. What activation checkpointing computes
    twice counts once.
    """
    layers, width = config.n_layer, config.n_embd
    matrices = layers * 12 * width * width + config.output_rows * width
    positions = sum(config.window_of(layer) or config.context for layer in range(layers))
    return 6 * matrices + 12 * width * positions
