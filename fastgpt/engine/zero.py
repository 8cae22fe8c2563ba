"""DeepSpeed ZeRO, stages 0 to 3. The only file that imports deepspeed."""

import io
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from fastgpt_kernels import grad_norm
from torch import Tensor
from torch.utils.cpp_extension import _get_build_directory

from fastgpt.config import Config
from fastgpt.data.source import MicroBatch, RankBatch
from fastgpt.engine.base import Pending, dropout_seed, told
from fastgpt.engine.compiled import compile_blocks
from fastgpt.engine.deepspeed_schema import Key, check_further_keys
from fastgpt.engine.deepspeed_settings import deepspeed_settings, our_settings
from fastgpt.engine.evaluating import Evaluating
from fastgpt.engine.layouts import PlainLayout, layout_of
from fastgpt.engine.micro_step import arguments_of
from fastgpt.engine.optimizer import adam, gradient_factor, optimizer_backend, set_learning_rate, updates_applied
from fastgpt.engine.phases import Phases, unobserved
from fastgpt.engine.precision import DTYPES, LossScale, told_of_divergence
from fastgpt.engine.ranks import Ranks
from fastgpt.engine.schedule import frozen_levels, learning_rate
from fastgpt.engine.state import Progress, check_parameters, read_state, restored_scale, write_state
from fastgpt.engine.swap_folder import SwapFolder
from fastgpt.errors import SharedError, UserError
from fastgpt.model.init import InitialValues, initial_values, initialise
from fastgpt.model.language_model import LanguageModel
from fastgpt.model.levels import number_of_levels

log = logging.getLogger(__name__)


class DeepSpeedZero:
    """An update on every rank at once; the numerics of `SingleProcess`, summed in another order."""

    def __init__(
        self,
        build: Callable[[], LanguageModel],
        config: Config,
        precision: str,
        device: torch.device,
        ranks: Ranks,
        values: InitialValues | None = None,
    ) -> None:
        deepspeed = _import_deepspeed(device, ranks.local_rank)
        self.ranks = ranks
        self.step = 0
        self.phases: Phases = unobserved
        self._config = config
        self._device = device
        self._precision = precision
        self._stage = config.engine.zero_stage
        self._gathered = deepspeed.zero.GatheredParameters
        if self._stage == 0 and precision != "fp32":
            log.warning(
                "DeepSpeed's ZeRO stage 0 accumulates and reduces %s gradients in %s; "
                "stages 1 to 3 do it in fp32, as the single engine does",
                precision,
                precision,
            )
        if device.type == "cpu" and "cpu" in (config.engine.offload_optimizer, config.engine.offload_parameters):
            log.warning("engine.device is cpu: what is offloaded to the CPU stays in the same memory, and saves none")
        self._swap_folder = _swap_folder(config, deepspeed, ranks)
        nvme_folder = str(self._swap_folder.path) if self._swap_folder else None
        settings = deepspeed_settings(config, precision, ranks.world_size, nvme_folder=nvme_folder)
        with _prints_logged():
            # takes over torch's process group, which ZeRO-3's sharded construction needs already
            deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
            values = values or initial_values(config.model, config.train.seed)
            self._model = self._build(build, values, deepspeed, settings)
        if config.engine.compile:
            self._compile(deepspeed)
        self._weights = dict(self._model.named_parameters())
        shapes = {name: _shape(p) for name, p in self._weights.items()}
        optimizer = adam(self._weights, shapes, config.train, config.kernels)
        with _prints_logged():
            self._engine, *_ = deepspeed.initialize(
                model=self._model, optimizer=optimizer, config=settings, dist_init_required=False
            )
        self._layout = layout_of(self._engine.optimizer, self._stage, self._weights, ranks)
        self._evaluating = Evaluating(self._engine, config.model, DTYPES[precision], device)

    def update(self, batch: RankBatch) -> Pending:
        """Begin one update from this rank's micro-batches."""
        self.step += 1
        rate = learning_rate(self.step, self._config.train)
        self._frozen_levels = frozen_levels(self.step, self._config.train, number_of_levels(self._weights))
        set_learning_rate(self._layout.optimizer, rate, self._frozen_levels)
        self._evaluating.forget()
        skipped = self._engine.skipped_steps
        losses: list[Tensor] = []
        self._engine.train()
        self._accumulate_over(len(batch.parts))
        for position, (part, index) in enumerate(zip(batch.parts, batch.micro_batches, strict=True)):
            if losses:
                self._engine.step()  # counts micro-batches: the step after the last one is the update
            self._engine.set_gradient_accumulation_boundary(position == len(batch.parts) - 1)
            losses.append(self._accumulate(part, index))
        with self.phases("optimizer"):
            norm = self._clip() if isinstance(self._layout, PlainLayout) else None
            with told_of_divergence():
                self._engine.step()
        if norm is None:
            norm = self._engine.get_global_grad_norm() if self._engine.skipped_steps == skipped else math.inf
        read = told(self.ranks, self.step, losses, norm, rate)
        return Pending(read, done=self._device.type == "cpu")

    def outputs(self, arguments: Mapping[str, Tensor], **options: Any) -> Tensor:
        """What the model gives, dropout off."""
        return self._evaluating.outputs(arguments, **options)

    def last_logits(self, tokens: Tensor) -> Tensor:
        """Logits (B, V) float32 on the CPU after the last token."""
        return self._evaluating.last_logits(tokens)

    def model_state(self) -> dict[str, Tensor] | None:
        """The working weights by name on rank 0's CPU, gathered one at a time."""
        if self._stage == 3:
            # after an evaluation what it has gathered ahead, for a backward pass that does not come, is on its way
            self._engine.empty_partition_cache()
        state = {}
        for name, parameter in self._weights.items():
            with self._gathered([parameter], enabled=self._stage == 3):
                if self.ranks.rank == 0:
                    state[name] = parameter.detach().to("cpu", copy=True)
        return state if self.ranks.rank == 0 else None

    def write(self, folder: Path) -> None:
        """Write the fp32 pieces that this rank owns."""
        scale = self._layout.loss_scale() if self._precision == "fp16" else LossScale()
        progress = Progress(self.step, updates_applied(self._layout.optimizer), scale.scale, scale.clean)
        write_state(folder, self.ranks.rank, self._layout.fragments(), self._layout.optimizer, progress)

    def read(self, folder: Path) -> None:
        """Take up a training state, whatever engine and world size wrote it."""
        check_parameters(folder, list(self._weights))
        progress = read_state(folder, self._layout.fragments(to_fill=True), self._layout.optimizer)
        self.step = progress.step
        if self._precision == "fp16":
            self._layout.set_loss_scale(restored_scale(progress))
        self._layout.refresh_weights()
        self._evaluating.forget()

    def _build(
        self, build: Callable[[], LanguageModel], values: InitialValues, deepspeed: Any, settings: dict[str, Any]
    ) -> LanguageModel:
        """The model with its initial values, at stage 3 sharded as each module is made."""
        if self._stage < 3:
            model = build().to(DTYPES[self._precision]).to(self._device)
            initialise(model, values)
            return model
        with deepspeed.zero.Init(config_dict_or_path=settings):
            model = build()
        for name, parameter in model.named_parameters():
            with self._gathered([parameter], modifier_rank=0), torch.no_grad():
                if self.ranks.rank == 0:
                    parameter.copy_(values(name, tuple(parameter.shape)))
        return model

    def _compile(self, deepspeed: Any) -> None:
        """Compile the blocks, before DeepSpeed puts its hooks into the model."""
        for block in self._model.blocks if self._stage == 3 else ():
            # within a graph no module can gather its parameters: the block gathers all of them around it
            deepspeed.utils.set_z3_leaf_module(block, True)
        compile_blocks(self._model.blocks)

    def _accumulate(self, part: MicroBatch, micro_batch: int) -> Tensor:
        """Add one micro-batch's gradient to those of the update; returns its mean loss."""
        with self.phases("data"):
            arguments = arguments_of(part, self._device)
        with self.phases("forward"):
            loss: Tensor = self._engine(
                **arguments,
                dropout_seed=dropout_seed(self._config, self.step, micro_batch),
                checkpoint_activations=self._config.train.activation_checkpointing,
                loss_gradient=self._loss_gradient(),
                frozen_levels=self._frozen_levels,
            )
        with self.phases("backward"):
            self._engine.backward(loss)
        return loss.detach()

    def _accumulate_over(self, micro_batches: int) -> None:
        """Let the coming update have so many micro-batches a rank, as the ramp of the batch asks.

        The engine's own count of micro-batches, modulo their number, would lose the boundary of an update where that
        number changes: each micro-batch is told whether it is the last one.
        """
        if micro_batches != self._engine.gradient_accumulation_steps():
            ranks, size = self.ranks.world_size, self._config.train.micro_batch_size
            self._engine.set_train_batch_size(micro_batches * size * ranks)

    def _loss_gradient(self) -> float | None:
        """What DeepSpeed's `backward` multiplies the loss by."""
        share = 1.0 / float(self._engine.gradient_accumulation_steps())
        if self._precision != "fp16":
            return share
        # at stage 0 DeepSpeed 0.19 keeps a scale that its `backward` leaves out
        return share * self._layout.loss_scale().scale if self._stage > 0 else None

    def _clip(self) -> float:
        """Clip the reduced gradients where DeepSpeed does not; gradients that are not finite are dropped."""
        gradients = [p.grad for p in self._weights.values() if p.grad is not None]
        norm = grad_norm(gradients, backend=optimizer_backend(self._config.kernels))
        if norm.isfinite():
            torch._foreach_mul_(gradients, gradient_factor(norm, self._config.train.clip, scale=1.0))
        else:
            # the optimizer passes over weights without a gradient, so that the update is skipped whole
            for parameter in self._weights.values():
                parameter.grad = None
        return float(norm)


def check_deepspeed(config: Config, device: torch.device, local_rank: int, place: Callable[[Key], str]) -> None:
    """Check a user's own keys of DeepSpeed's configuration against the DeepSpeed that is installed.

    Args:
        config: the settings.
        device: this rank's.
        local_rank: of this process on its host.
        place: "file:line" of a setting, by its name in parts.

    Raises:
        UserError: a key that DeepSpeed does not know, or a value that it refuses; or it is not installed.
    """
    if config.engine.deepspeed:
        deepspeed = _import_deepspeed(device, local_rank)
        precision = "bf16" if config.engine.precision == "auto" else config.engine.precision
        ours = our_settings(config, precision, world_size=1)
        check_further_keys(ours, config.engine.deepspeed, deepspeed.runtime.config.DeepSpeedConfig, place)


def _swap_folder(config: Config, deepspeed: Any, ranks: Ranks) -> SwapFolder | None:
    """This rank's folder on a disk, where `nvme` is asked for.

    Raises:
        SharedError: on some host it cannot be, or DeepSpeed cannot read and write there.
    """
    if config.engine.nvme_folder is None:
        return None
    folder = problem = None
    try:
        if not deepspeed.ops.op_builder.AsyncIOBuilder().is_compatible(verbose=False):
            raise UserError(
                "nvme: DeepSpeed reads and writes a disk by libaio, whose headers or library are missing here. "
                "Install them (Debian: apt install libaio-dev), or offload to cpu"
            )
        folder = SwapFolder(Path(config.engine.nvme_folder))
        _tell_of_locks()
    except UserError as reason:
        problem = str(reason)
    problems = {one for one in ranks.gather(problem) if one}
    if problems:
        raise SharedError("; ".join(sorted(problems)))
    return folder


def _tell_of_locks() -> None:
    """Name the lock files for which the load of DeepSpeed's asynchronous I/O would wait, in silence and for ever."""
    for extension in ("pin_memory", "async_io"):
        lock = Path(_get_build_directory(extension, verbose=False)) / "lock"
        if lock.exists():
            log.warning("waiting for whoever compiles DeepSpeed's %s; if nobody does, delete %s", extension, lock)


def _shape(parameter: Tensor) -> tuple[int, ...]:
    """The whole shape, also of a parameter that ZeRO-3 has sharded."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


@contextmanager
def _prints_logged() -> Iterator[None]:
    """DeepSpeed prints memory statistics while it starts: they belong in a debug log."""
    printed = io.StringIO()
    try:
        with redirect_stdout(printed):
            yield
    finally:
        for line in printed.getvalue().splitlines():
            log.debug("deepspeed: %s", line)


def _not_about_our_optimizer(record: logging.LogRecord) -> bool:
    """DeepSpeed warns of every optimizer but its own and PyTorch's; ours is held to PyTorch's by tests."""
    return "untested optimizer" not in record.getMessage()


def _tell_deepspeed_its_device(device: torch.device, local_rank: int) -> None:
    """In its own variables: it takes the GPU whose number is LOCAL_RANK, which is not the rank's where it sees few."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    if device.type == "cuda":
        os.environ["LOCAL_RANK"] = str(device.index)
    else:
        os.environ.setdefault("LOCAL_RANK", str(local_rank))  # which only a launcher would have set


def _import_deepspeed(device: torch.device, local_rank: int) -> Any:
    """DeepSpeed, quiet, and told which accelerator it is on.

    Raises:
        UserError: it is not installed.
    """
    _tell_deepspeed_its_device(device, local_rank)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed calls collectives by names that torch has renamed: nothing that a user could change
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    try:
        import deepspeed
    except ImportError as problem:
        raise UserError(
            f"engine.kind: deepspeed cannot be used: {problem}. Install it (pip install 'deepspeed>=0.19.8'), "
            "or start without a launcher and with engine.kind=single"
        ) from None
    deepspeed.utils.logger.setLevel(logging.WARNING)
    deepspeed.utils.logger.addFilter(_not_about_our_optimizer)
    # On a CPU DeepSpeed compiles an all-reduce for inference at its start. Training has no use for it, it takes a
    # minute, and a process killed meanwhile leaves a lock file behind that every later start would wait for, for ever.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
