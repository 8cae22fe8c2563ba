"""Errors that a user can mend: one clear line each, exit code 2, no traceback."""

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """Bad input: the message says what, where, what is allowed, and the remedy.

    The command line prints it without a traceback and exits with code 2.
    """


class SharedError(UserError):
    """A user's error that every rank of a run raises alike: rank 0 tells it for all."""


@contextmanager
def alike_on_every_rank() -> Iterator[None]:
    """A user's error that is raised within is one that every rank raises."""
    try:
        yield
    except UserError as problem:
        raise SharedError(str(problem)) from None


class RankLost(Exception):  # noqa: N818 - named as its message is
    """Another rank of the run died, or cannot be reached. The run goes on from its newest checkpoint, on any ranks."""

    def __init__(self, reason: str) -> None:
        super().__init__(
            f"another rank died or cannot be reached ({reason}). If it left no error of its own, look at its host. "
            "The same command goes on from the newest checkpoint, also on fewer ranks"
        )


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`" Did you mean X?"` with the nearest of the `known` spellings, or the empty string."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" Did you mean {near[0]}?" if near else ""
