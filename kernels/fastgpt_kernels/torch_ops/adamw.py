"""AdamW by PyTorch's fused kernel, with 16-bit gradients and working copies in pieces that stay in a CPU's cache."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastgpt_kernels.optim_arguments import Constants, Member

# elements for each thread of a CPU whose float32 gradient is made and used while it is in the cache: fewer would leave
# more of the time to the waking of threads
UPDATE_CHUNK = 1_048_576


def update(members: Sequence[Member], constants: Constants, lr: float, scale: float) -> None:
    """One update by PyTorch's fused AdamW, also of GPT-1's form: both differ only in their constants at a step.

    With c1 and c2 the bias corrections, AdamW with eps / sqrt(c2) for eps and weight_decay sqrt(c2) / c1 for
    weight_decay has sqrt(v) + eps times 1 / sqrt(c2) as its denominator and lr sqrt(c2) / c1 weight_decay as its decay.
    """
    by_step: dict[float, list[Member]] = {}
    for member in members:
        by_step.setdefault(member.step.item() + 1.0 if constants.form == "gpt1" else 0.0, []).append(member)
    grad_scale = None
    if scale != 1.0:
        # the kernel divides by it
        inverse = 1.0 / scale if scale else math.inf
        grad_scale = torch.tensor(inverse, dtype=torch.float32, device=members[0].master.device)
    for step, alike in by_step.items():
        eps, weight_decay = constants.eps, constants.weight_decay
        beta1, beta2 = constants.betas
        if constants.form == "gpt1":
            correction = math.sqrt(1.0 - beta2**step)
            eps, weight_decay = eps / correction, weight_decay * correction / (1.0 - beta1**step)
        torch._foreach_add_([member.step for member in alike], 1.0)
        for parts in _parts(alike):
            torch._fused_adamw_(
                [part.master for part in parts],
                [part.gradient for part in parts],
                [part.exp_avg for part in parts],
                [part.exp_avg_sq for part in parts],
                [],
                [part.step for part in parts],
                lr=lr,
                beta1=beta1,
                beta2=beta2,
                weight_decay=weight_decay,
                eps=eps,
                amsgrad=False,
                maximize=False,
                grad_scale=grad_scale,
            )
            for part in parts:
                if part.working is not None:
                    part.working.copy_(part.master)


def _parts(members: Sequence[Member]) -> Iterator[list[Member]]:
    """The members with float32 gradients, to be updated one list after the other.

    As they are where nothing is rounded. Else in pieces: on its way from and to 16 bits a piece stays in the cache.
    """
    as_they_are = [member for member in members if not _rounds(member)]
    if as_they_are:
        yield as_they_are
    size = UPDATE_CHUNK * torch.get_num_threads()
    widened: Tensor | None = None
    for member in members:
        if not _rounds(member):
            continue
        *flat, working = (None if x is None else x.view(-1) for x in (*member[:4], member.working))
        for start in range(0, member.master.numel(), size):
            master, gradient, exp_avg, exp_avg_sq = (x[start : start + size] for x in flat if x is not None)
            if gradient.dtype != torch.float32:
                if widened is None:
                    widened = torch.empty(size, dtype=torch.float32, device=gradient.device)
                gradient = widened[: len(gradient)].copy_(gradient)
            piece = None if working is None else working[start : start + size]
            yield [Member(master, gradient, exp_avg, exp_avg_sq, member.step, piece)]


def _rounds(member: Member) -> bool:
    return member.gradient.dtype != torch.float32 or member.working is not None
