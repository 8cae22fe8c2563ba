"""The learning rate as a pure function of the update's number: nothing to save, nothing to restore."""

import math

from fastgpt.config import TrainConfig


def learning_rate(step: int, train: TrainConfig) -> float:
    """The learning rate of update `step`, counting from 1.

    `cosine`: linear warm-up over `warmup_steps` updates, then half a cosine from `lr` to `min_lr` at update
    `decay_steps`, by default the last, and `min_lr` from there ("Language Models are Few-Shot Learners", appendix B).
    `gpt1`: linear warm-up, then 0.5 (1 + cos(pi x)) with x the share of ALL updates behind us (not of those after the
    warm-up), read one update late, so that the first update has rate 0: the schedule of the code published with
    "Improving Language Understanding by Generative Pre-Training".
    `constant`: linear warm-up, then `lr`.
    `linear`: min(x / w, 1) (1 - x) of `lr`, with x the share of all updates behind us and w that of the warm-up: the
    schedule of fine-tuning in the code published with the same paper; the first update of a warm-up has rate 0.
    `slanted`: from `min_lr` in a line up to `lr` at the end of the warm-up, and down to `min_lr` again at the end: the
    slanted triangular learning rates of "Universal Language Model Fine-tuning for Text Classification", section 3.2,
    whose cut_frac is the warm-up (0.1) and whose ratio is lr / min_lr (32).

    All count updates, not tokens: under a ramp of the batch an early update has fewer of these.
    """
    if train.schedule == "gpt1":
        done = step - 1
        if done < train.warmup_steps:
            return train.lr * done / train.warmup_steps
        return train.lr * 0.5 * (1 + math.cos(math.pi * done / train.steps))
    if train.schedule in ("linear", "slanted"):
        return _triangle(step - 1, train)
    if step <= train.warmup_steps:
        return train.lr * step / train.warmup_steps
    if train.schedule == "constant":
        return train.lr
    progress = (step - train.warmup_steps) / max(1, (train.decay_steps or train.steps) - train.warmup_steps)
    return train.min_lr + (train.lr - train.min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def frozen_levels(step: int, train: TrainConfig, levels: int) -> int:
    """How many of a model's levels, from the bottom, update `step` leaves as they are.

    The gradual unfreezing of "Universal Language Model Fine-tuning for Text Classification", section 3.3: at first the
    highest level alone is trained, and one more after every `unfreeze_every` updates.
    """
    if train.unfreeze_every is None:
        return 0
    return max(0, levels - 1 - (step - 1) // train.unfreeze_every)


def _triangle(done: int, train: TrainConfig) -> float:
    """`linear` and `slanted`, after so many updates."""
    warm = train.warmup_steps if train.warmup_share is None else train.warmup_share * train.steps
    if train.schedule == "linear":
        return train.lr * (min(done / warm, 1.0) if warm else 1.0) * (1 - done / train.steps)
    cut = math.floor(warm)
    height = done / cut if done < cut else 1 - (done - cut) / (train.steps - cut)
    return train.min_lr + (train.lr - train.min_lr) * height
