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

    All count updates, not tokens: under a ramp of the batch an early update has fewer of these.
    """
    if train.schedule == "gpt1":
        done = step - 1
        if done < train.warmup_steps:
            return train.lr * done / train.warmup_steps
        return train.lr * 0.5 * (1 + math.cos(math.pi * done / train.steps))
    if step <= train.warmup_steps:
        return train.lr * step / train.warmup_steps
    if train.schedule == "constant":
        return train.lr
    progress = (step - train.warmup_steps) / max(1, (train.decay_steps or train.steps) - train.warmup_steps)
    return train.min_lr + (train.lr - train.min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
