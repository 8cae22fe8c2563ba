"""What an operation must do at the least, whoever does it: what rates are counted in."""

from typing import Literal, NamedTuple

from torch import Tensor


class Work(NamedTuple):
    """Floating-point operations, or bytes read and written, of each direction, and how they were counted."""

    unit: Literal["FLOP", "byte"]
    formula: str
    forward: float
    backward: float = 0.0

    def of(self, direction: str) -> float:
        """The work of a direction of `timing.steps`."""
        both = {"forward": self.forward, "backward": self.backward}
        return both.get(direction) or sum(both.values())


def few_of(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The first rows (..., N) of each, as many as are soon checked: more than there are programs that share a sum."""
    return tuple(x[: max(300, 2**21 // x.shape[-1])] for x in tensors)


def bytes_of(*tensors: Tensor) -> int:
    """The size of tensors, were they dense."""
    return sum(x.numel() * x.element_size() for x in tensors)
