"""Errors that a user can mend: one clear line each, exit code 2, no traceback."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input: the message says what, where, what is allowed, and the remedy.

    The command line prints it without a traceback and exits with code 2.
    """


class SharedError(UserError):
    """A user's error that every rank of a run raises alike: rank 0 tells it for all."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`" Did you mean X?"` with the nearest of the `known` spellings, or the empty string."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" Did you mean {near[0]}?" if near else ""
