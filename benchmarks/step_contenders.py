"""Who is measured in a training step, each in a process of its own, with its own way to build and to update.

Those that are not ours train as a careful user does, by the loop of nanoGPT's train.py: autocast, gradient
accumulation, `clip_grad_norm_`, a fused AdamW with decay on matrices and tables, gradients set to None.
"""

import contextlib
import importlib.util
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import torch
from fastgpt_kernels import load_ops
from fastgpt_kernels.native.library import reasons_against
from torch import Tensor, nn

from benchmarks.contenders import Unavailable
from benchmarks.step_models import PlainGPT
from benchmarks.step_worker import OURS, ZERO
from fastgpt.config import Config
from fastgpt.data.source import Batch
from fastgpt.engine.base import Pending, evaluation_loss
from fastgpt.engine.phases import Phases, unobserved
from fastgpt.engine.prepare import prepare
from fastgpt.engine.ranks import Ranks, join
from fastgpt.launchers import ALONE
from fastgpt.model.gpt import GPT
from fastgpt.model.init import decays
from fastgpt.train.start import set_up

# these start from our initial weights
SAME_WEIGHTS = (*OURS, "plain", "plain-compile", "plain-compile-cudnn", "plain-fp32")
ABOUT = {
    "ours": "the single engine, as `fastgpt train` runs it",
    "ours-no-graph": "ours without its CUDA graph",
    "reference": "ours with PyTorch's operations in the place of Triton's",
    **{name: f"the DeepSpeed engine, ZeRO-{stage}, one rank" for name, stage in ZERO.items()},
    "plain": "plain PyTorch, bf16 autocast over fp32 weights",
    "plain-compile": "plain under torch.compile",
    "plain-compile-cudnn": "plain under torch.compile, SDPA by cuDNN",
    "ours-compile": "ours with engine.compile",
    "plain-fp32": "plain PyTorch in fp32",
    "transformers": "GPT2LMHeadModel with SDPA, bf16 autocast",
    "liger": "transformers with Liger's layer norm and cross-entropy",
    "nanogpt": "nanoGPT from --peer-path, fp32 as its default on a CPU",
    "nanogpt-bf16": "nanoGPT, bf16 autocast",
    "nanogpt-bf16-compile": "nanoGPT, bf16 autocast, torch.compile",
}
NAMES = tuple(ABOUT)
NANOGPT_MULTIPLE = 64  # its train.py rounds GPT-2's 50,257 words up to 50,304


class Job(NamedTuple):
    """What all contenders of a run do."""

    config: Config
    device: torch.device
    peer_path: Path | None


class Trainer(Protocol):
    """One contender: a model, its optimizer, and its way of an update."""

    dtype: str
    phases: Phases

    def evaluate(self, tokens: Tensor) -> float:
        """Mean loss on tokens (B, T + 1), dropout off."""

    def update(self, batch: Batch) -> None:
        """One update; the device may still be at it at the return."""

    def loss(self) -> float:
        """Mean loss of the last update; not a number where that one was not applied."""


def defaults(device: str, peer_path: Path | None) -> list[str]:
    """Who takes part where nobody is chosen."""
    if device == "cpu":
        names = ["ours", "plain", "plain-compile", "plain-fp32", "transformers"]
        return names + (["nanogpt", "nanogpt-bf16", "nanogpt-bf16-compile"] if peer_path else [])
    names = ["ours", "reference", "plain", "plain-compile", "plain-compile-cudnn", "ours-compile"]
    names += ["transformers", "liger"]
    return names + (["nanogpt-bf16", "nanogpt-bf16-compile"] if peer_path else [])


def check_available(name: str, job: Job) -> None:
    """Refuse who cannot take part here.

    Raises:
        Unavailable: with the reason.
    """
    config, gpu = job.config, job.device.type == "cuda"
    if config.model.attention != "dense" and name not in OURS:
        raise Unavailable("it has no windows in its attention")
    if config.model.embedding != "separate" and name not in OURS:
        raise Unavailable("it has no table of tokens and positions together")
    if name == "reference" and not _has_own_kernels(config, gpu):
        raise Unavailable("ours runs PyTorch's operations already")
    if name == "ours-compile" and config.engine.compile:
        raise Unavailable("ours is compiled already")
    if name in ZERO and not importlib.util.find_spec("deepspeed"):
        raise Unavailable("deepspeed is not installed")
    if name == "ours-no-graph" and not (gpu and config.engine.cuda_graph):
        raise Unavailable("ours has no CUDA graph already")
    if name in ("plain-compile-cudnn", "liger") and not gpu:
        raise Unavailable("it needs a GPU")
    for other, package in (("transformers", "transformers"), ("liger", "transformers"), ("liger", "liger_kernel")):
        if name == other and not importlib.util.find_spec(package):
            raise Unavailable(f"{package} is not installed")
    if config.model.norm == "post" and name in ("transformers", "liger"):
        raise Unavailable("transformers' GPT-1 has no SDPA attention")
    if name.startswith("nanogpt"):
        if job.peer_path is None:
            raise Unavailable("it needs --peer-path")
        if config.model.norm == "post":
            raise Unavailable("nanoGPT has GPT-2's block only")


def _has_own_kernels(config: Config, gpu: bool) -> bool:
    if gpu:
        return load_ops(config.kernels.backend).name == "triton"
    native = config.kernels.backend in ("auto", "native") and not reasons_against()
    return native and config.engine.precision != "fp32"


def load(name: str, job: Job) -> Trainer:
    """A contender, ready to train, in the process that is to be its own."""
    if name in OURS:
        return Ours(job, name)
    config = job.config
    if config.engine.threads:
        torch.set_num_threads(config.engine.threads)
    if name.startswith("nanogpt"):
        return nanogpt(name, job)
    if name in ("transformers", "liger"):
        model = hugging_face(config, liger=name == "liger").to(job.device)
        return Peer(job, model, shifted_loss(model, liger=name == "liger"), adamw(model, config), torch.bfloat16)
    if name == "plain-compile-cudnn":
        only_cudnn()
    model = PlainGPT(config.model, config.train.seed).to(job.device)
    step = torch.compile(model) if "compile" in name else model
    return Peer(job, model, step, adamw(model, config), None if name == "plain-fp32" else torch.bfloat16)


class Ours:
    """`fastgpt train`, from its start to its engine."""

    def __init__(self, job: Job, name: str) -> None:
        tree = job.config.model_dump()
        if name == "reference":
            tree["kernels"]["backend"] = "torch"
        if name == "ours-compile":
            tree["engine"]["compile"] = True
        if name == "ours-no-graph":
            tree["engine"]["cuda_graph"] = False
        if name in ZERO:
            tree["engine"] |= {"kind": "deepspeed", "zero_stage": ZERO[name]}
        config = Config.model_validate(tree)
        config = set_up(config, job.device, threads=config.engine.threads)
        ops = load_ops(config.kernels.backend)
        precision = config.engine.precision
        self.dtype = precision
        kind: Literal["single", "deepspeed"] = "deepspeed" if name in ZERO else "single"
        # a process group of its own, which the end of the process ends
        ranks = join(ALONE, job.device, config.engine.timeout_minutes) if name in ZERO else Ranks()
        self.engine: Any = prepare(
            lambda: GPT(config.model, ops), config, kind=kind, precision=precision, device=job.device, ranks=ranks
        )
        self.last: Pending | None = None

    @property
    def phases(self) -> Phases:
        found: Phases = self.engine.phases
        return found

    @phases.setter
    def phases(self, observer: Phases) -> None:
        self.engine.phases = observer

    def evaluate(self, tokens: Tensor) -> float:
        return evaluation_loss(self.engine, tokens[:, :-1], tokens[:, 1:]) / tokens[:, 1:].numel()

    def update(self, batch: Batch) -> None:
        before, self.last = self.last, self.engine.update(batch)
        if before is not None:
            _ = before.update  # as the training loop does: one update late

    def loss(self) -> float:
        return self.last.update.loss if self.last and self.last.update.applied else float("nan")


class Peer:
    """Anybody else: `step(tokens, targets)` is the mean loss in training, `model` holds the weights."""

    def __init__(
        self,
        job: Job,
        model: nn.Module,
        step: Callable[[Tensor, Tensor], Tensor],
        optimizer: torch.optim.Optimizer,
        autocast: torch.dtype | None,
        plain_step: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        self.job, self.model, self.step, self.optimizer = job, model, step, optimizer
        # what is not compiled evaluates too: another mode would be compiled for one loss
        self.plain_step = plain_step or (model if isinstance(step, nn.Module) else step)
        self.autocast = autocast
        self.dtype = "bf16 autocast" if autocast else "fp32"
        self.phases: Phases = unobserved
        self.losses: list[Tensor] = []

    def context(self) -> contextlib.AbstractContextManager[Any]:
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self.job.device.type, self.autocast)

    def evaluate(self, tokens: Tensor) -> float:
        tokens = tokens.to(self.job.device)
        self.model.eval()
        with torch.no_grad(), self.context():
            return float(self.plain_step(tokens[:, :-1], tokens[:, 1:].contiguous()))

    def update(self, batch: Batch) -> None:
        train = self.job.config.train
        self.model.train()
        self.losses = []
        for rows in batch.tokens:
            with self.phases("data"):
                tokens = self.to_device(torch.from_numpy(rows))
            with self.phases("forward"), self.context():
                loss = self.step(tokens[:, :-1], tokens[:, 1:].contiguous())
            with self.phases("backward"):
                (loss / len(batch.tokens)).backward()
            self.losses.append(loss.detach())
        with self.phases("optimizer"):
            if train.clip:
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), train.clip)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

    def to_device(self, tokens: Tensor) -> Tensor:
        if self.job.device.type == "cpu":
            return tokens
        return tokens.pin_memory().to(self.job.device, non_blocking=True)

    def loss(self) -> float:
        return float(torch.stack(self.losses).double().mean())


def adamw(model: nn.Module, config: Config) -> torch.optim.AdamW:
    """PyTorch's fused AdamW with the constants of the settings."""
    train = config.train
    groups = [
        {"params": [p for p in model.parameters() if decays(p.shape) is decay], "weight_decay": weight_decay}
        for decay, weight_decay in ((True, train.weight_decay), (False, 0.0))
    ]
    return torch.optim.AdamW(groups, lr=train.lr, betas=(train.beta1, train.beta2), eps=train.eps, fused=True)


def only_cudnn() -> None:
    """Leave SDPA no other backend than cuDNN's, in this process."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.backends.cuda.enable_math_sdp(False)


def hugging_face(config: Config, *, liger: bool) -> nn.Module:
    """transformers' GPT-2 with random weights, on which its own defaults decide whatever the settings do not."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(config.train.seed)
    shape, p = config.model, config.model.dropout
    settings = GPT2Config(
        vocab_size=shape.vocab_size,
        n_positions=shape.context,
        n_embd=shape.n_embd,
        n_layer=shape.n_layer,
        n_head=shape.n_head,
        resid_pdrop=p,
        embd_pdrop=p,
        attn_pdrop=p,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
        attn_implementation="sdpa",
    )
    model: nn.Module = GPT2LMHeadModel(settings)
    if liger:
        from liger_kernel.transformers import functional

        class LigerNorm(nn.LayerNorm):
            def forward(self, x: Tensor) -> Tensor:
                normed: Tensor = functional.liger_layer_norm(x, self.weight, self.bias, self.eps)
                return normed

        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.__class__ = LigerNorm  # same parameters, another forward
    return model


def shifted_loss(model: nn.Module, *, liger: bool) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss of a transformers model on targets that are shifted already."""
    if liger:
        from liger_kernel.transformers import functional

        def by_liger(tokens: Tensor, targets: Tensor) -> Tensor:
            logits = model(input_ids=tokens).logits
            loss: Tensor = functional.liger_cross_entropy(logits.flatten(0, 1), targets.flatten())
            return loss

        return by_liger

    def by_transformers(tokens: Tensor, targets: Tensor) -> Tensor:
        loss: Tensor = model(input_ids=tokens, labels=targets, shift_labels=targets).loss
        return loss

    return by_transformers


def nanogpt(name: str, job: Job) -> Peer:
    """nanoGPT's model and optimizer, from its folder."""
    assert job.peer_path is not None
    module = module_of(job.peer_path)
    config, shape = job.config, job.config.model
    torch.manual_seed(config.train.seed)
    if job.device.type == "cuda":  # as its train.py does
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    settings = module.GPTConfig(
        block_size=shape.context,
        vocab_size=-(-shape.vocab_size // NANOGPT_MULTIPLE) * NANOGPT_MULTIPLE,
        n_layer=shape.n_layer,
        n_head=shape.n_head,
        n_embd=shape.n_embd,
        dropout=shape.dropout,
        bias=True,
    )
    model: Any = module.GPT(settings).to(job.device)
    train = config.train
    optimizer = model.configure_optimizers(train.weight_decay, train.lr, (train.beta1, train.beta2), job.device.type)
    compiled = torch.compile(model) if name.endswith("compile") else model

    def step_of(called: Callable[..., Any]) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda tokens, targets: called(tokens, targets)[1]

    autocast = None if name == "nanogpt" else torch.bfloat16
    return Peer(job, model, step_of(compiled), optimizer, autocast, step_of(model))


def module_of(folder: Path) -> Any:
    """model.py of a folder, under a name that nothing else has."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", folder / "model.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclass asks for it
    spec.loader.exec_module(module)
    return module


def is_nanogpt(folder: Path) -> bool:
    """Whether a folder has the model.py of nanoGPT."""
    try:
        text = (folder / "model.py").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False
    wanted: Iterable[str] = ("class GPTConfig", "class GPT(", "def configure_optimizers")
    return all(words in text for words in wanted)
