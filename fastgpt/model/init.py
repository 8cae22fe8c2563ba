"""Initial values: a function of a parameter's name and of the seed, whatever the sharding or the order of building."""

import hashlib
import math
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

import torch
from torch import Tensor

from fastgpt.config import ModelConfig
from fastgpt.model.language_model import LanguageModel
from fastgpt.model.levels import HEAD
from fastgpt.model.seeds import fold

InitialValues = Callable[[str, tuple[int, ...]], Tensor]
"""The value that a parameter starts with, by its name and shape: any floating-point dtype, on the CPU."""


def initial_value(name: str, shape: tuple[int, ...], config: ModelConfig, seed: int) -> Tensor:
    """The initial value of the parameter called `name`: float32, on the CPU, wherever the default device is.

    Biases are 0, the gains of normalisation 1, matrices and tables normal with mean 0 and standard deviation 0.02
    (Radford et al. 2018, section 4.1). The GPT-2 form has 0.01 for positions, as OpenAI's code, and divides the
    matrices that write to the residual stream by the square root of their number, 2 per layer (Radford et al. 2019,
    section 2.3). Those of an LSTM: `_lstm_value`. The two matrices of an output layer with a hidden layer are uniform
    within 1 / sqrt(inputs), PyTorch's own for a linear layer: 0.02 twice would leave few units next to no gradient.
    """
    module, kind = name.split(".")[-2:]
    if config.kind == "lstm" and not name.startswith(HEAD):
        return _lstm_value(name, shape, config.units, seed)
    if kind == "bias":
        return torch.zeros(shape, device="cpu", dtype=torch.float32)
    if "norm" in module:
        return torch.ones(shape, device="cpu", dtype=torch.float32)
    if name.startswith(f"{HEAD}.") and module != HEAD:
        return _uniform(shape, shape[1] ** -0.5, _generator(name, seed))
    std = 0.02
    if config.norm == "pre":
        if module == "position_embedding":
            std = 0.01
        elif name.endswith(("attention.out.weight", "mlp.down.weight")):
            std /= math.sqrt(2 * config.n_layer)
    return torch.empty(shape, device="cpu", dtype=torch.float32).normal_(0.0, std, generator=_generator(name, seed))


def _lstm_value(name: str, shape: tuple[int, ...], units: int, seed: int) -> Tensor:
    """Of an LSTM: the table uniform within 0.1, the other matrices within 1 / sqrt(units), biases 0 but for 1 at the
    forget gates.

    The ranges are those of AWD-LSTM (Merity et al. 2018, section 5) and of PyTorch; the forget gate's is from
    Jozefowicz et al. 2015, "An Empirical Exploration of Recurrent Network Architectures".
    """
    module, kind = name.split(".")[-2:]
    if kind == "bias":
        values = torch.zeros(shape, device="cpu", dtype=torch.float32)
        values.view(4, units)[1] = 1.0  # PyTorch's order: i, f, g, o
        return values
    return _uniform(shape, 0.1 if module == "token_embedding" else units**-0.5, _generator(name, seed))


def _uniform(shape: tuple[int, ...], bound: float, generator: torch.Generator) -> Tensor:
    return torch.empty(shape, device="cpu", dtype=torch.float32).uniform_(-bound, bound, generator=generator)


def _generator(name: str, seed: int) -> torch.Generator:
    """Of a parameter's own random numbers."""
    digest = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    return torch.Generator().manual_seed(fold(seed, digest))


def initial_values(config: ModelConfig, seed: int) -> InitialValues:
    """The initial values of a model that begins to train."""
    return lambda name, shape: initial_value(name, shape, config, seed)


@torch.no_grad()
def initialise(model: LanguageModel, values: InitialValues) -> None:
    """Give every parameter the value that it starts with, in place, rounded to the parameter's dtype.

    One value is drawn by one thread: as many are drawn at a time as PyTorch has threads.
    """
    threads = torch.get_num_threads()
    drawn: dict[Future[Tensor], Tensor] = {}

    def take() -> None:
        for future in wait(drawn, return_when=FIRST_COMPLETED).done:
            drawn.pop(future).copy_(future.result())

    with ThreadPoolExecutor(threads) as pool:
        for name, parameter in model.named_parameters():
            if len(drawn) >= 2 * threads:  # no more values than this wait in memory
                take()
            drawn[pool.submit(values, name, tuple(parameter.shape))] = parameter
        while drawn:
            take()


def decays(shape: Sequence[int]) -> bool:
    """Whether weight decay acts on a parameter of this shape: on matrices and tables, not on biases and gains."""
    return len(shape) > 1
