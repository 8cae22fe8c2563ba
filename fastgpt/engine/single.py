"""One process, no DeepSpeed: the plain form of an update, which the other engine is held to."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from fastgpt_kernels import grad_norm
from torch import Tensor

from fastgpt.config import Config
from fastgpt.data.source import Batch
from fastgpt.engine.base import Pending, Update, dropout_seed, global_loss
from fastgpt.engine.host import to_device
from fastgpt.engine.optimizer import adam, gradient_factor, optimizer_backend, set_learning_rate, updates_applied
from fastgpt.engine.phases import Phases, unobserved
from fastgpt.engine.precision import DTYPES, LossScale
from fastgpt.engine.ranks import Ranks
from fastgpt.engine.schedule import learning_rate
from fastgpt.engine.state import Fragment, Progress, check_parameters, read_state, restored_scale, write_state
from fastgpt.model.cache import CachedLogits
from fastgpt.model.gpt import GPT
from fastgpt.model.init import initialise


class SingleProcess:
    """Weights in the run's precision, fp32 master weights and moments, gradients accumulated in fp32."""

    def __init__(self, build: Callable[[], GPT], config: Config, precision: str, device: torch.device) -> None:
        self.ranks = Ranks()
        self.step = 0
        self.phases: Phases = unobserved
        self._config = config
        self._device = device
        self._model = build().to(DTYPES[precision]).to(device)
        initialise(self._model, config.train.seed)
        self._weights = dict(self._model.named_parameters())
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
        # fp32 sums of gradients in 16 bits, by the name of the weight
        self._sums: dict[str, Tensor] = {}
        self._sampler: CachedLogits | None = None

    def update(self, batch: Batch) -> Pending:
        """Begin one update from all micro-batches of the batch.

        On a GPU the host goes on while the device computes: it waits when the update is read, and under fp16, whose
        next loss scale depends on this update.
        """
        self.step += 1
        rate = learning_rate(self.step, self._config.train)
        losses = [
            self._accumulate(tokens, index) for tokens, index in zip(batch.tokens, batch.micro_batches, strict=True)
        ]
        with self.phases("optimizer"):
            scale = self._scale.scale if self._scale else 1.0
            norm = grad_norm(self._gradients(), backend=optimizer_backend(self._config.kernels)) / scale
            set_learning_rate(self._optimizer, rate)
            self._optimizer.step(gradient_scale=gradient_factor(norm, self._config.train.clip, scale))
            self._sampler = None
            if self._scale:
                self._scale.update(overflow=not norm.isfinite())
            for parameter in (*self._masters.values(), *self._weights.values()):
                parameter.grad = None

        def read(step: int = self.step) -> Update:
            loss, size = global_loss(self.ranks, losses), float(norm)
            applied = math.isfinite(size)
            return Update(step, loss, size if applied else math.inf, rate, applied)

        return Pending(read, done=self._device.type == "cpu" or self._scale is not None)

    def evaluation_loss(self, inputs: Tensor, targets: Tensor) -> float:
        """Summed loss (nats) of a batch, dropout off."""
        with torch.no_grad():
            self._model.eval()
            return float(self._model(inputs.to(self._device), targets=targets.to(self._device), reduction="sum"))

    def last_logits(self, tokens: Tensor) -> Tensor:
        """Logits (B, V) float32 on the CPU after the last token."""
        self._model.eval()
        if self._sampler is None:
            dtype = next(iter(self._weights.values())).dtype
            self._sampler = CachedLogits(self._model, self._config.model, dtype=dtype, device=self._device)
        return self._sampler(tokens).float().cpu()

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
        self._sampler = None
        if self._low:
            self._round_masters()

    def _accumulate(self, tokens: npt.NDArray[np.int64], micro_batch: int) -> Tensor:
        """Add one micro-batch's gradient to the masters'; returns its mean loss. tokens (B, T + 1)."""
        config = self._config
        self._model.train()
        factor = (self._scale.scale if self._scale else 1.0) / config.micro_batches
        with self.phases("data"):
            x = to_device(tokens, self._device)
        with self.phases("forward"):
            loss: Tensor = self._model(
                x[:, :-1],
                targets=x[:, 1:],
                dropout_seed=dropout_seed(config, self.step, micro_batch),
                checkpoint_activations=config.train.activation_checkpointing,
                loss_gradient=factor,
            )
        with self.phases("backward"):
            (loss * factor).backward()  # type: ignore[no-untyped-call]
            if self._low and config.micro_batches > 1:
                self._add_up()
        return loss.detach()

    @torch.no_grad()
    def _add_up(self) -> None:
        """Add the gradients of a micro-batch to the masters' in fp32. One alone is left to the weights in 16 bits."""
        for name, weight in self._weights.items():
            if weight.grad is None:
                continue
            master = self._masters[name]
            if master.grad is not None:
                master.grad.add_(weight.grad)
            else:
                # its memory is kept from update to update
                if name not in self._sums:
                    self._sums[name] = torch.empty_like(master, requires_grad=False)
                master.grad = self._sums[name].copy_(weight.grad)
            weight.grad = None

    def _gradients(self) -> list[Tensor]:
        """Those of an update: in fp32, or in 16 bits where one micro-batch is all."""
        pairs = zip(self._masters.values(), self._weights.values(), strict=True)
        found = (weight.grad if master.grad is None else master.grad for master, weight in pairs)
        return [gradient for gradient in found if gradient is not None]

    @torch.no_grad()
    def _round_masters(self) -> None:
        torch._foreach_copy_(list(self._weights.values()), list(self._masters.values()))

    def _fragments(self) -> list[Fragment]:
        return [Fragment(name, 0, m.numel(), m, 0) for name, m in self._masters.items()]
