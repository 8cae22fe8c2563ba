"""A rank that died, as those that are left see it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from fastgpt.errors import RankLost

# what gloo and NCCL say where a connection breaks or nobody answers: they have no class of their own for it
WORDS = (
    "closed by peer",
    "reset by peer",
    "Broken pipe",
    "timed out",
    "Timed out",
    "timeout",
    "remote process exited",
    "unhandled system error",
)


@contextmanager
def told_of_lost_ranks() -> Iterator[None]:
    """Raise `RankLost` where ranks fail to talk within, because one of them is gone or does not answer."""
    try:
        yield
    except RuntimeError as problem:
        known = isinstance(problem, dist.DistError) or "gloo" in str(problem)
        if not known or not any(word in str(problem) for word in WORDS):
            raise
        raise RankLost(str(problem).strip().partition("\n")[0]) from problem
