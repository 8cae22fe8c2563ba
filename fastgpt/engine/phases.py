"""Where the time of an update goes: an engine names its phases to an observer, which by default is nobody."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol


class Phases(Protocol):
    """Is told when a phase of an update begins and ends."""

    def __call__(self, name: str) -> AbstractContextManager[Any]:
        """A context around the phase: "data", "forward", "backward" or "optimizer"; each micro-batch has its own."""


def unobserved(name: str) -> AbstractContextManager[None]:
    """Nobody looks."""
    return nullcontext()
