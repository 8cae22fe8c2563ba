"""One process, no DeepSpeed: the plain form of an update, which the other engine is held to."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from fastgpt_kernels import grad_norm
from torch import Tensor

from fastgpt.config import Config
from fastgpt.data.source import RankBatch
from fastgpt.engine.base import Pending, dropout_seed, told
from fastgpt.engine.compiled import compile_blocks
from fastgpt.engine.cuda_graph import CudaGraphs, GraphedMicroStep, Recorder
from fastgpt.engine.evaluating import Evaluating
from fastgpt.engine.main_gradients import MainGradients
from fastgpt.engine.micro_step import MicroStep
from fastgpt.engine.optimizer import adam, gradient_factor, optimizer_backend, set_learning_rate, updates_applied
from fastgpt.engine.phases import Phases
from fastgpt.engine.precision import DTYPES, LossScale
from fastgpt.engine.ranks import Ranks
from fastgpt.engine.schedule import frozen_levels, learning_rate
from fastgpt.engine.state import Fragment, Progress, check_parameters, read_state, restored_scale, write_state
from fastgpt.model.init import InitialValues, initial_values, initialise
from fastgpt.model.language_model import LanguageModel
from fastgpt.model.levels import number_of_levels

log = logging.getLogger(__name__)


class SingleProcess:
    """Weights in the run's precision, fp32 master weights and moments, gradients accumulated in fp32."""

    def __init__(
        self,
        build: Callable[[], LanguageModel],
        config: Config,
        precision: str,
        device: torch.device,
        recorder: Recorder | None = None,
        values: InitialValues | None = None,
    ) -> None:
        """Build the model with its first values; a `recorder` makes the micro-step one graph, by default CUDA's."""
        self.ranks = Ranks()
        self.step = 0
        self._config = config
        self._device = device
        self._model = build().to(DTYPES[precision]).to(device)
        initialise(self._model, values or initial_values(config.model, config.train.seed))
        if config.engine.compile:
            compile_blocks(self._model.blocks)
        self._weights = dict(self._model.named_parameters())
        self._levels = number_of_levels(self._weights)
        self._low = precision != "fp32"
        # the master starts from the rounded weight, as it does under DeepSpeed
        self._masters = (
            {name: p.detach().float().requires_grad_() for name, p in self._weights.items()}
            if self._low
            else self._weights
        )
        shapes = {name: p.shape for name, p in self._weights.items()}
        working = zip(self._masters.values(), self._weights.values(), strict=True) if self._low else ()
        self._optimizer = adam(self._masters, shapes, config.train, config.kernels, working)
        self._scale = LossScale() if precision == "fp16" else None
        self._gradients = MainGradients(self._weights, self._masters, micro_batches=config.micro_batches)
        plain = MicroStep(
            self._model, self._gradients, device, checkpoint_activations=config.train.activation_checkpointing
        )
        self._plain = plain
        self._micro_step: MicroStep | GraphedMicroStep = plain
        unchanging = config.train.unfreeze_every is None  # what is differentiated, as a graph needs it
        if recorder is None and device.type == "cuda" and config.engine.cuda_graph and unchanging:
            if config.model.kind == "lstm":
                log.info("no CUDA graph over the micro-step: cuDNN's LSTM, which copies its weights, is not recorded")
            else:
                recorder = CudaGraphs()
        if recorder is not None:
            self._micro_step = GraphedMicroStep(plain, self._weights, recorder)
        self._evaluating = Evaluating(self._model, config.model, DTYPES[precision], device)

    @property
    def phases(self) -> Phases:
        """Who is told of the phases of an update."""
        return self._micro_step.phases

    @phases.setter
    def phases(self, observer: Phases) -> None:
        self._micro_step.phases = observer

    def update(self, batch: RankBatch) -> Pending:
        """Begin one update from all micro-batches of the batch.

        On a GPU the host goes on while the device computes: it waits when the update is read, and under fp16, whose
        next loss scale depends on this update.
        """
        self.step += 1
        rate = learning_rate(self.step, self._config.train)
        scale = self._scale.scale if self._scale else 1.0
        factor = scale / len(batch.micro_batches)  # which a ramp of the batch changes
        frozen = frozen_levels(self.step, self._config.train, self._levels)
        self._plain.frozen_levels = frozen
        self._micro_step.start_update()
        losses = [
            self._micro_step(part, dropout_seed(self._config, self.step, index), factor)
            for part, index in zip(batch.parts, batch.micro_batches, strict=True)
        ]
        with self.phases("optimizer"):
            norm = grad_norm(self._gradients.all(), backend=optimizer_backend(self._config.kernels)) / scale
            set_learning_rate(self._optimizer, rate, frozen)
            self._optimizer.step(gradient_scale=gradient_factor(norm, self._config.train.clip, scale))
            self._evaluating.forget()
            if self._scale:
                self._scale.update(overflow=not norm.isfinite())
            self._gradients.clear()

        read = told(self.ranks, self.step, losses, norm, rate)
        return Pending(read, done=self._device.type == "cpu" or self._scale is not None)

    def outputs(self, arguments: Mapping[str, Tensor], **options: Any) -> Tensor:
        """What the model gives, dropout off."""
        return self._evaluating.outputs(arguments, **options)

    def last_logits(self, tokens: Tensor) -> Tensor:
        """Logits (B, V) float32 on the CPU after the last token."""
        return self._evaluating.last_logits(tokens)

    def model_state(self) -> dict[str, Tensor]:
        """The working weights by name, on the CPU."""
        return {name: p.detach().cpu() for name, p in self._weights.items()}

    def write(self, folder: Path) -> None:
        """Write masters and moments."""
        scale = self._scale or LossScale()
        progress = Progress(self.step, updates_applied(self._optimizer), scale.scale, scale.clean)
        write_state(folder, 0, self._fragments(), self._optimizer, progress)

    def read(self, folder: Path) -> None:
        """Take up a training state, whatever engine and world size wrote it."""
        check_parameters(folder, list(self._weights))
        progress = read_state(folder, self._fragments(), self._optimizer)
        self.step = progress.step
        if self._scale:
            self._scale = restored_scale(progress)
        self._evaluating.forget()
        if self._low:
            self._round_masters()

    @torch.no_grad()
    def _round_masters(self) -> None:
        torch._foreach_copy_(list(self._weights.values()), list(self._masters.values()))

    def _fragments(self) -> list[Fragment]:
        return [Fragment(name, 0, m.numel(), m, 0) for name, m in self._masters.items()]
