"""The error of a kernel that cannot do what it is asked: every reason, and the remedy."""

from collections.abc import Sequence


class UnsupportedInput(ValueError):  # noqa: N818 - the public name
    """An operation or a backend cannot take what it was given.

    The message names all the reasons at once, so that one correction is enough, and then the remedy::

        layer_norm (triton) cannot take this input:
          - x has 20000 columns; at most 16384 fit in registers
          - x is torch.float64; supported: float32, float16, bfloat16
        Set kernels.backend to 'torch' to run it without Triton.
    """

    def __init__(self, problem: str, reasons: Sequence[str], remedy: str) -> None:
        self.reasons = tuple(reasons)
        self.remedy = remedy
        super().__init__("\n".join([f"{problem}:", *(f"  - {reason}" for reason in reasons), remedy]))


def raise_if_any(reasons: Sequence[str], operation: str, backend: str, remedy: str) -> None:
    """Raise `UnsupportedInput` when there is at least one reason to."""
    if reasons:
        raise UnsupportedInput(f"{operation} ({backend}) cannot take this input", reasons, remedy)
