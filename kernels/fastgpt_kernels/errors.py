"""The error of a kernel that cannot do what it is asked: every reason, and the remedy."""

from collections.abc import Sequence


class UnsupportedInput(ValueError):  # noqa: N818 - the public name
    """An operation or a backend cannot take what it was given: `UnsupportedInput(problem, reasons, remedy)`.

    The message names all the reasons at once, so that one correction is enough, and then the remedy::

        layer_norm (triton) cannot take this input:
          - x has 20000 columns; at most 16384 fit in registers
          - x is torch.float64; supported: float32, float16, bfloat16
        Set kernels.backend to 'torch' to run it without Triton.

    Under `torch.compile(fullgraph=True)` PyTorch raises an error of its own, whose message has the reasons.
    """

    # made of its arguments alone: the compiler traces no __init__ of an exception, and shows the arguments

    @property
    def reasons(self) -> tuple[str, ...]:
        """Each reason once."""
        return tuple(dict.fromkeys(self.args[1]))

    @property
    def remedy(self) -> str:
        """What to do."""
        return str(self.args[2])

    def __str__(self) -> str:
        return "\n".join([f"{self.args[0]}:", *(f"  - {reason}" for reason in self.reasons), self.remedy])


def raise_if_any(reasons: Sequence[str], operation: str, backend: str, remedy: str) -> None:
    """Raise `UnsupportedInput` when there is at least one reason to."""
    if reasons:
        raise UnsupportedInput(f"{operation} ({backend}) cannot take this input", reasons, remedy)
