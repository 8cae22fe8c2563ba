"""What a model's settings say of its size, in plain arithmetic: parameters, and operations a token."""

from fastgpt.config import ModelConfig


def parameter_count(config: ModelConfig) -> int:
    """The number of parameters, the tied output matrix counted once."""
    n = config.n_embd
    if config.kind == "lstm":
        return config.vocab_size * n + _lstm_matrices(config) + config.n_layer * 4 * config.units
    embeddings = (config.vocab_size + config.context) * n
    final_norm = 2 * n if config.norm == "pre" else 0
    return embeddings + config.n_layer * block_parameters(config) + final_norm


def block_parameters(config: ModelConfig) -> int:
    """The number of parameters of one block; of an LSTM's layers, the largest."""
    n = config.n_embd
    if config.kind == "lstm":
        return 4 * config.units * (max(_inputs_of_layers(config)) + config.units + 1)
    # matrices of n x 3n, n x n and twice n x 4n; biases 3n + n + 4n + n; two norms of 2n
    return 12 * n * n + 13 * n


def largest_matrix(config: ModelConfig) -> int:
    """Elements of the largest parameter."""
    if config.kind == "lstm":
        layer = 4 * config.units * max(config.units, *_inputs_of_layers(config))
        return max(config.n_embd * max(config.vocab_size, config.units), layer)
    return config.n_embd * max(config.output_rows, config.context, 4 * config.n_embd)


def flops_per_token(config: ModelConfig) -> int:
    """Floating-point operations of training on one token of a full context, forward and backward: 6N + 12 L C T.

    N counts the weights that take part in a matrix product, 12 C^2 in each of L blocks and the V x C output matrix (and
    its rows of positions, under `embedding: table`): not the input side of the token table, nor positions, biases and
    norms. 12 L C T is attention over T positions in full, without the half that causality saves (Chowdhery et al. 2022,
    "PaLM", appendix B); a banded layer counts its window in the place of T. What activation checkpointing computes
    twice counts once. An LSTM has 6N alone: N of each layer's two matrices, the projection and the output matrix.
    """
    if config.kind == "lstm":
        return 6 * (_lstm_matrices(config) + config.output_rows * config.n_embd)
    layers, width = config.n_layer, config.n_embd
    matrices = layers * 12 * width * width + config.output_rows * width
    positions = sum(config.window_of(layer) or config.context for layer in range(layers))
    return 6 * matrices + 12 * width * positions


def _inputs_of_layers(config: ModelConfig) -> list[int]:
    """How wide the input of each layer of an LSTM is."""
    return [config.n_embd, *[config.units] * (config.n_layer - 1)]


def _lstm_matrices(config: ModelConfig) -> int:
    """Elements of the matrices of an LSTM's layers, and of its projection."""
    layers = sum(4 * config.units * (inputs + config.units) for inputs in _inputs_of_layers(config))
    return layers + (config.units * config.n_embd if config.units != config.n_embd else 0)
