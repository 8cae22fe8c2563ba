"""A language model with the output layer of a task: what GPT-1's fine-tuning trains.

Radford et al. 2018, section 3.2: the activation h of the last block at the extract token goes through a linear layer,
P(y | x) = softmax(h W), and the objective is L3 = L2 + lambda L1, the task's loss and that of the language model.
Section 3.3 and figure 1: similarity reads both orders and adds the two activations before the linear layer; a choice
has a linear layer of one output, and the softmax goes over the choices. Pooling by concatenation, and a hidden layer of
ReLU units before the linear one, are those of Howard and Ruder 2018, section 3.3.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from fastgpt_kernels import Ops
from fastgpt_kernels.checks import Reduction
from torch import Tensor, nn

from fastgpt.config import ModelConfig
from fastgpt.errors import UserError
from fastgpt.model.cache import Cache
from fastgpt.model.gpt import GPT
from fastgpt.model.heads import IGNORED, language_model_loss
from fastgpt.model.language_model import LanguageModel
from fastgpt.model.layers import Linear
from fastgpt.model.lstm import LSTM
from fastgpt.model.seeds import fold

Pooling = Literal["extract", "concat", "mean"]

# what a micro-batch's seed is folded with for the masks of what the output layer, and its hidden layer's units, read
HEAD_DROPOUT = 4
HIDDEN_DROPOUT = 5


class TaskShape(NamedTuple):
    """What the output layer has to give, and how it is trained."""

    outputs: int  # classes; 1 for a choice, whose softmax goes over the sequences, and for a score
    choice: bool = False  # the sequences of an example are choices; else their activations are added
    regression: bool = False
    pooling: Pooling = "extract"
    lm_weight: float = 0.5  # lambda of L3
    dropout: float = 0.1  # of what each linear map of the output layer reads; one mask for an example's sequences
    head_units: int | None = None  # of a hidden layer; None is a linear output layer

    def inputs(self, width: int) -> int:
        """Activations that the output layer reads."""
        return 3 * width if self.pooling == "concat" else width


class HiddenLayerHead(nn.Module):
    """Activations (..., inputs) -> (..., outputs) through a hidden layer of ReLU units."""

    def __init__(self, inputs: int, units: int, outputs: int, ops: Ops) -> None:
        super().__init__()
        self.hidden = Linear(inputs, units, ops)
        self.output = Linear(units, outputs, ops)

    def forward(self, x: Tensor, drop: Callable[[Tensor], Tensor]) -> Tensor:
        """The output layer; `drop` acts on the units."""
        outputs: Tensor = self.output(drop(F.relu(self.hidden(x))))
        return outputs


class TaskModel(LanguageModel):
    """A language model whose last activations also go through the output layer of a task: see `new_task_model`."""

    def __init__(self, config: ModelConfig, ops: Ops, shape: TaskShape) -> None:
        super().__init__(config, ops)  # of the language model that is mixed in
        self.shape = shape
        inputs = shape.inputs(config.n_embd)
        self.task_head = (
            Linear(inputs, shape.outputs, ops)
            if shape.head_units is None
            else HiddenLayerHead(inputs, shape.head_units, shape.outputs, ops)
        )

    def forward(
        self,
        tokens: Tensor,
        *,
        targets: Tensor | None = None,
        reduction: Reduction = "mean",
        dropout_seed: int | Tensor | None = None,
        checkpoint_activations: bool = False,
        cache: Cache | None = None,
        last_only: bool = False,
        loss_gradient: float | Tensor | None = None,
        frozen_levels: int = 0,
        extract: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Tensor:
        """What the output layer makes of examples, or the objective L3; without `extract`, as a language model.

        Args:
            tokens: (B, K, T) int64: B examples of K sequences each, padded at their ends.
            targets: (B, K, T) int64, the token that follows each, or -100; needed for the objective where `lm_weight`
                is not 0.
            reduction: as for a language model.
            dropout_seed: an int, required where dropout is active.
            checkpoint_activations: as for a language model.
            cache: as for a language model.
            last_only: as for a language model.
            loss_gradient: as for a language model.
            frozen_levels: as for a language model.
            extract: (B, K) int64, where the last token of each sequence stands.
            labels: (B,) int64, classes or choices, or float32, scores; asks for the objective.

        Returns:
            (B, C) float32, the logits of C classes or choices, or scores with C = 1; with labels the mean of L3 over
            the examples, float32: cross-entropy in nats, or the mean squared error of scores, and `lm_weight` times
            the loss of the language model, which is the mean over all sequences of the mean over a sequence's targets.

        Raises:
            UserError: as for a language model; dropout is active at the output layer and has no seed that is an int.
        """
        if extract is None:
            return super().forward(
                tokens,
                targets=targets,
                reduction=reduction,
                dropout_seed=dropout_seed,
                checkpoint_activations=checkpoint_activations,
                cache=cache,
                last_only=last_only,
                loss_gradient=loss_gradient,
                frozen_levels=frozen_levels,
            )
        p, seeds = self._dropout(dropout_seed, tokens.device)
        x = self.hidden(
            tokens.flatten(0, 1),
            dropout_seed=seeds,
            checkpoint_activations=checkpoint_activations,
            frozen_levels=frozen_levels,
        )
        scores = self._scores(x, extract, dropout_seed)
        if labels is None:
            return scores
        loss = task_loss(scores, labels, regression=self.shape.regression)
        if self.shape.lm_weight:
            assert targets is not None, "the objective has a language model's part"
            logits = self.logits(x, p, seeds, frozen_levels)
            loss = loss + self.shape.lm_weight * self._language_model_loss(logits, targets.flatten(0, 1))
        return loss

    def _scores(self, x: Tensor, extract: Tensor, seed: int | Tensor | None) -> Tensor:
        """Hidden states (B K, T, N) -> (B, C) float32."""
        B, K = extract.shape
        pooled = self._dropped(pool(x, extract.flatten(), self.shape.pooling).view(B, K, -1), seed, HEAD_DROPOUT)
        if self.shape.choice:
            return _accurate(self._head(pooled, seed).squeeze(-1))
        return _accurate(self._head(pooled.sum(1), seed))

    def _head(self, x: Tensor, seed: int | Tensor | None) -> Tensor:
        """What the output layer makes of activations (B, K, inputs), or their sums (B, inputs)."""

        def drop(units: Tensor) -> Tensor:
            of_sequences = units.view(len(units), -1, units.shape[-1])
            return self._dropped(of_sequences, seed, HIDDEN_DROPOUT).view_as(units)

        outputs: Tensor = self.task_head(x, drop) if isinstance(self.task_head, HiddenLayerHead) else self.task_head(x)
        return outputs

    def _dropped(self, x: Tensor, seed: int | Tensor | None, place: int) -> Tensor:
        """x (B, K, N) under the output layer's dropout, which has a mask for each of its places."""
        if not self.training or not self.shape.dropout:
            return x
        if not isinstance(seed, int):
            raise UserError("the output layer's dropout is active: give dropout_seed as an int, or call eval()")
        return x * shared_mask(x, self.shape.dropout, fold(seed, place))

    def _language_model_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The mean over sequences of the mean over each one's targets, in nats; targets (B K, T)."""
        losses = language_model_loss(self.ops, logits, targets, "none", consume=torch.is_grad_enabled())
        counts = (targets != IGNORED).sum(-1).clamp(min=1)
        return (losses.sum(-1) / counts).mean()


class TaskGPT(TaskModel, GPT):
    """A GPT with an output layer."""


class TaskLSTM(TaskModel, LSTM):
    """An LSTM with an output layer."""


def new_task_model(config: ModelConfig, ops: Ops, shape: TaskShape) -> TaskModel:
    """The model of `config.kind` with the output layer of a task, its parameters allocated and not initialised."""
    return (TaskLSTM if config.kind == "lstm" else TaskGPT)(config, ops, shape)


def task_loss(
    scores: Tensor, labels: Tensor, *, regression: bool, reduction: Literal["mean", "none"] = "mean"
) -> Tensor:
    """Cross-entropy in nats, or squared error: scores (B, C) float32, labels (B,); a scalar, or (B,) for "none"."""
    if regression:
        return F.mse_loss(scores.squeeze(-1), labels, reduction=reduction)
    return F.cross_entropy(scores, labels, reduction=reduction)


def pool(x: Tensor, extract: Tensor, pooling: Pooling) -> Tensor:
    """Hidden states (R, T, N) of sequences that end at `extract` (R,) -> (R, N), or (R, 3 N) for "concat".

    "extract" is the activation at the end; "mean" that of the whole sequence; "concat" the end, maximum and mean.
    """
    last = x[torch.arange(len(x), device=x.device), extract]
    if pooling == "extract":
        return last
    real = (torch.arange(x.shape[1], device=x.device) <= extract[:, None]).unsqueeze(-1)  # (R, T, 1)
    mean = ((_accurate(x) * real).sum(1) / (extract[:, None] + 1)).to(x.dtype)
    if pooling == "mean":
        return mean
    largest = x.masked_fill(~real, -torch.inf).amax(1)
    return torch.cat([last, largest, mean], dim=-1)


def shared_mask(x: Tensor, p: float, seed: int) -> Tensor:
    """A dropout mask for x (B, K, N) that all K sequences of an example share: 0 or 1 / (1 - p), (B, 1, N).

    Drawn on the CPU, so that it is the same on every device.
    """
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(x.shape[0], 1, x.shape[2], generator=generator) >= p
    return (kept / (1 - p)).to(x.device, x.dtype)


def _accurate(scores: Tensor) -> Tensor:
    """In float32 at least, for the loss."""
    return scores if scores.dtype == torch.float64 else scores.float()
