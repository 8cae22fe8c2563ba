"""The micro-step as one CUDA graph, whose thousand kernels are launched at once."""

import logging
from collections.abc import Callable, Mapping
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastgpt.data.source import MicroBatch
from fastgpt.engine.host import to_device
from fastgpt.engine.micro_step import MicroStep, foretold
from fastgpt.engine.phases import Phases, unobserved
from fastgpt.model.dropout import dropout_seeds

log = logging.getLogger(__name__)

T = TypeVar("T")

WARM_UP = 3  # micro-batches before the recording: kernels are compiled, and cuBLAS takes its workspace


class Recorder(Protocol):
    """Records what a device does for a function, to repeat it without the host."""

    def warm_up(self, work: Callable[[], T]) -> T:
        """The function's result, computed as it will be while recording."""

    def record(self, work: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        """The function's result, not computed yet, and what computes it, from the same memory into the same memory.

        Raises:
            RuntimeError: the function does what cannot be recorded.
        """


class CudaGraphs:
    """PyTorch's CUDA graphs."""

    def __init__(self) -> None:
        """Record on a stream apart: the default stream cannot be recorded."""
        self._stream = torch.cuda.Stream()

    def warm_up(self, work: Callable[[], T]) -> T:
        """On the stream of the recording: autograd's nodes keep the stream that they were made on."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            result = work()
        torch.cuda.current_stream().wait_stream(self._stream)
        return result

    def record(self, work: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        """Into a graph with memory of its own."""
        graph = torch.cuda.CUDAGraph()
        # other threads may go on with theirs, as one that reads batches does
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            result = work()
        return result, graph.replay


class GraphedMicroStep:
    """A `MicroStep` that is recorded once and then repeated, for which the host has nothing to do.

    The first micro-batches are computed without a graph. What cannot be recorded goes on without, and the log says so.
    Who observes phases sees them without a graph, which has none.
    """

    def __init__(self, plain: MicroStep, weights: Mapping[str, Tensor], recorder: Recorder) -> None:
        """Record `plain`, which differentiates these weights, by name."""
        self._plain = plain
        self._weights = weights
        self._recorder: Recorder | None = recorder
        self._calls = 0
        self._replay: Callable[[], None] | None = None
        # what the graph reads and writes, each always in the same place
        self._tokens = torch.empty(0)
        self._seeds = torch.empty(0)
        self._factor = torch.empty(())
        self._loss = torch.empty(())
        self._left: dict[str, Tensor] = {}  # gradients that stay with the weights

    @property
    def phases(self) -> Phases:
        """Who is told of phases."""
        return self._plain.phases

    @phases.setter
    def phases(self, observer: Phases) -> None:
        self._plain.phases = observer

    def start_update(self) -> None:
        """Give the sums their places, which the graph adds to."""
        self._plain.gradients.start_from_zero()

    def __call__(self, part: MicroBatch, seed: int, factor: float) -> Tensor:
        """The mean loss of a micro-batch, as a `MicroStep` gives it."""
        if self._recorder is None or self.phases is not unobserved or not isinstance(part, np.ndarray):
            return self._plain(part, seed, factor)
        return self._graphed(part, seed, factor, self._recorder)

    def _graphed(self, tokens: npt.NDArray[np.int64], seed: int, factor: float, recorder: Recorder) -> Tensor:
        """The same for windows of a text, which are all of one shape."""
        if self._calls < WARM_UP:
            self._calls += 1
            return recorder.warm_up(lambda: self._plain(tokens, seed, factor))
        if self._replay is None:
            self._make_room(tokens)
        self._tokens.copy_(to_device(tokens, self._plain.device))
        if self._seeds.numel():
            seeds = dropout_seeds(seed, self._plain.model.config.n_layer)
            self._seeds.copy_(to_device(seeds.numpy(), self._plain.device))
        self._factor.fill_(factor)
        if self._replay is None and not self._record(recorder):
            return self._plain(tokens, seed, factor)
        assert self._replay
        self._replay()
        for name, gradient in self._left.items():
            self._weights[name].grad = gradient
        return self._loss.clone()  # the next micro-batch writes over it

    def _make_room(self, tokens: npt.NDArray[np.int64]) -> None:
        """Places for the arguments."""
        device, config = self._plain.device, self._plain.model.config
        seeds = dropout_seeds(0, config.n_layer if config.dropout else 0)
        self._tokens = torch.empty(tokens.shape, dtype=torch.int64, device=device)
        self._seeds = torch.empty_like(seeds, device=device)
        self._factor = torch.empty((), dtype=torch.float32, device=device)

    def _record(self, recorder: Recorder) -> bool:
        """Make the graph; whether there is one."""
        try:
            self._loss, self._replay = recorder.record(
                lambda: self._plain.differentiate(foretold(self._tokens), self._seeds, self._factor)
            )
        except RuntimeError as problem:
            reason = str(problem).strip().partition("\n")[0] or type(problem).__name__
            log.warning("no CUDA graph over the micro-step, which goes on without: %s", reason)
            self._recorder = None
            if not self._plain.gradients.at_weights:
                for weight in self._weights.values():
                    weight.grad = None  # recorded, never computed
            return False
        if not self._plain.gradients.at_weights:
            self._left = {name: weight.grad for name, weight in self._weights.items() if weight.grad is not None}
        log.info("the micro-step is one CUDA graph from now on")
        return True
