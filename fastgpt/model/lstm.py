"""An LSTM language model, the comparison of GPT-1's Table 5 (Radford et al. 2018, section 5).

The paper says "a single layer 2048 unit LSTM" and no more. What it leaves open follows the language models of its
time: dropout on what is not recurrent (Zaremba et al. 2014), an output matrix tied to the table of tokens (Press and
Wolf 2017), and where the units are not as many as the table is wide, a projection from the one to the other, without a
bias (Sak et al. 2014).
"""

import warnings

import torch
import torch.nn.functional as F
from fastgpt_kernels import Ops
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastgpt.config import ModelConfig
from fastgpt.errors import UserError
from fastgpt.model.cache import Cache, LayerState, LSTMState
from fastgpt.model.dropout import Site, masks_of_layers
from fastgpt.model.frozen import frozen
from fastgpt.model.language_model import LanguageModel
from fastgpt.model.layers import TiedEmbedding

# cuDNN wants all weights in one piece of memory, which ZeRO and the optimizer own otherwise: it copies them
warnings.filterwarnings("ignore", message="RNN module weights are not part of single contiguous chunk of memory")


class LSTM(LanguageModel):
    """Layers of LSTM units over the table of tokens: no positions, no normalisation.

    In training mode with `config.dropout` > 0, dropout acts on the embedding and on what each layer hands on. Its masks
    come from `dropout_seed` alone. The state is zero where a sequence begins.
    """

    def __init__(self, config: ModelConfig, ops: Ops) -> None:
        super().__init__(config, ops)
        self.token_embedding = TiedEmbedding(config.vocab_size, config.n_embd, ops)
        widths = [config.n_embd, *[config.units] * (config.n_layer - 1)]
        self.blocks = nn.ModuleList(LSTMLayer(width, config.units, ops) for width in widths)
        self.projection = Projection(config.units, config.n_embd) if config.units != config.n_embd else nn.Identity()

    def hidden(
        self,
        tokens: Tensor,
        *,
        dropout_seed: int | Tensor | None = None,
        checkpoint_activations: bool = False,
        cache: Cache | None = None,
        frozen_levels: int = 0,
        blocks: int | None = None,
    ) -> Tensor:
        """The final hidden states (B, T, N), which the output matrix turns into logits; arguments as for `forward`.

        With `blocks`, those after so many layers: 0 is the embedding; before the last one they are the outputs of the
        units, (B, T, units). The projection goes with the last.
        """
        self._check_length(tokens.shape[1], cache)
        assert cache is None or isinstance(cache, LSTMState), "the cache of another kind of model"
        p, seeds = self._dropout(dropout_seed, tokens.device)
        if cache is not None and p:
            raise UserError("a state that is carried on goes with the model in evaluation mode: call eval() first")
        layers = masks_of_layers(p, seeds, self.config.n_layer)
        states = cache.layers if cache else [None] * self.config.n_layer
        # the operation adds a table of positions: here one of zeros
        zeros = torch.zeros(
            (tokens.shape[1], self.config.n_embd),
            dtype=self.token_embedding.weight.dtype,
            device=tokens.device,
        )
        x: Tensor = self.token_embedding(tokens, positions=zeros, p=p, seed=layers[0].seed_at(Site.EMBEDDING))
        for level, (layer, masks, state) in enumerate(zip(self.blocks, layers, states, strict=True), start=1):
            if blocks is not None and level > blocks:
                return x
            x = frozen(x, when=frozen_levels == level)
            seed = masks.seed_at(Site.LSTM_OUTPUT)
            if checkpoint_activations:
                # no random state to preserve: the seeds are arguments
                x = checkpoint(layer, x, p, seed, state, use_reentrant=False, preserve_rng_state=False)
            else:
                x = layer(x, p, seed, state)
        if cache:
            cache.length += tokens.shape[1]
        return frozen(self.projection(x), when=frozen_levels > self.config.n_layer)


class LSTMLayer(nn.Module):
    """x (B, T, inputs) -> (B, T, units), and dropout (Hochreiter and Schmidhuber 1997, with Gers et al.'s forget gate).

        i, f, o = sigmoid(gate)    g = tanh(gate)    c_t = f c_(t-1) + i g    h_t = o tanh(c_t)

    where the four gates, in PyTorch's order i, f, g, o, are rows of W x_t + U h_(t-1) + b: one bias for each, which
    PyTorch has twice.

    It is PyTorch's built-in LSTM: cuDNN's on a GPU, oneDNN's on a CPU in fp32, and in bf16 on CPUs whose oneDNN has it.
    On others PyTorch composes it of small operations, in bf16 many times slower.
    """

    def __init__(self, inputs: int, units: int, ops: Ops) -> None:
        super().__init__()
        self.input_weight = nn.Parameter(torch.empty(4 * units, inputs))
        self.recurrent_weight = nn.Parameter(torch.empty(4 * units, units))
        self.bias = nn.Parameter(torch.empty(4 * units))
        self.units = units
        self.ops = ops

    def forward(self, x: Tensor, p: float, seed: Tensor | None, state: LayerState | None = None) -> Tensor:
        """From a state of zeros on, or from `state`, which then holds the last."""
        zeros = x.new_zeros((1, x.shape[0], self.units))
        first = (zeros, zeros) if state is None else tuple(state)
        weights = [self.input_weight, self.recurrent_weight, self.bias, torch.zeros_like(self.bias)]
        # the built-in keeps what a gradient needs in "training" only, and evaluation mode may ask for one too
        training = torch.is_grad_enabled()
        y, hidden, cell = torch._VF.lstm(x, first, weights, True, 1, 0.0, training, False, True)  # type: ignore[attr-defined]
        if state is not None:
            state.hidden.copy_(hidden.detach())
            state.cell.copy_(cell.detach())
        dropped: Tensor = self.ops.dropout(y, p, seed) if p else y
        return dropped


class Projection(nn.Module):
    """x (..., inputs) -> (..., outputs), without a bias."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))

    def forward(self, x: Tensor) -> Tensor:
        """The linear map of each row."""
        return F.linear(x, self.weight)
