"""Which number format a run computes in, and the loss scale that fp16 needs."""

import logging
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from fastgpt.config import DEVICE
from fastgpt.errors import SharedError, UserError

log = logging.getLogger(__name__)

# how much faster a product must be in bf16, which costs digits and a master copy of the weights
WORTH_IT = 1.2

DIVERGED = "fp16 gradients overflow even unscaled: the run has diverged. Lower train.lr or use engine.precision=bf16"

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_device(name: str, gpu: int = 0, *, setting: str = "engine.device") -> torch.device:
    """`auto` is this rank's GPU where there is one, else the CPU.

    Args:
        name: auto, cpu, cuda or cuda:N.
        gpu: this rank's, by its number among those that it sees.
        setting: what the user calls the name, for errors.

    Raises:
        UserError: another name, or a GPU that is not there.
    """
    if not re.fullmatch(DEVICE, name):
        raise UserError(f"{setting}: {name!r} is not known; allowed: auto, cpu, cuda, cuda:N")
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = int(name.partition(":")[2]) if ":" in name else gpu
    if index >= count:
        available = f"cuda:0 to cuda:{count - 1}" if count else "cpu only"
        raise UserError(f"{setting}: {name} asks for GPU {index}, and this machine has {available}")
    return torch.device("cuda", index)


def resolve_precision(name: str, device: torch.device) -> str:
    """`auto` is bf16 where the device multiplies bf16 matrices faster than fp32, else fp32; the choice is logged.

    A GPU says so itself. On a CPU both are timed: instruction sets that it names may be emulated, or slow.

    Raises:
        UserError: fp16 on a CPU.
    """
    if name == "fp16" and device.type == "cpu":
        raise UserError("engine.precision: fp16 needs a GPU; on a CPU use bf16 or fp32")
    if name != "auto":
        return name
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
        reason = "the GPU computes in bf16" if fast else "the GPU has no bf16 units"
    else:
        ratio = product_seconds(torch.float32) / product_seconds(torch.bfloat16)
        fast = ratio >= WORTH_IT
        reason = f"bf16 products are {ratio:.1f} times as fast as fp32's on this CPU"
    precision = "bf16" if fast else "fp32"
    log.info("engine.precision auto: %s, because %s", precision, reason)
    return precision


def product_seconds(dtype: torch.dtype) -> float:
    """The shortest time of a matrix product of GPT-2's size on the CPU, a few milliseconds."""
    x, weight = torch.ones(256, 768, dtype=dtype), torch.ones(3072, 768, dtype=dtype)
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        torch.nn.functional.linear(x, weight)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


@dataclass
class LossScale:
    """Dynamic loss scaling: halve at an overflow, double once `window` updates have gone without one.

    The rule of "Mixed Precision Training" (Micikevicius et al., 2018), section 3.2, counted as DeepSpeed counts, which
    is given the same constants: both engines scale alike.
    """

    scale: float = 2.0**16
    clean: int = 0  # updates since the last overflow
    window: int = 1000
    smallest: float = 1.0

    def update(self, overflow: bool) -> None:
        """Take note of one update.

        Raises:
            SharedError: an overflow although the scale is as small as it may be.
        """
        if overflow:
            if self.scale <= self.smallest:
                raise SharedError(DIVERGED)
            self.scale = max(self.scale / 2, self.smallest)
            self.clean = 0
            return
        if self.clean and self.clean % self.window == 0:
            self.scale *= 2
        self.clean += 1


@contextmanager
def told_of_divergence() -> Iterator[None]:
    """Raise `LossScale`'s error where DeepSpeed's loss scale, counted alike, is as small as it may be.

    Raises:
        SharedError: see there; all ranks see the same overflow.
    """
    try:
        yield
    except Exception as problem:
        # it has no class of its own for this
        if "loss scale already at minimum" not in str(problem):
            raise
        raise SharedError(DIVERGED) from problem
