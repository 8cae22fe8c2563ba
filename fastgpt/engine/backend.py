"""Which implementation of the operations goes with a device."""

import logging

import torch
from fastgpt_kernels import Backend, Ops, UnsupportedInput, load_ops

from fastgpt.errors import UserError

log = logging.getLogger(__name__)


def ops_for(
    backend: Backend, device: torch.device, dtype: torch.dtype | None = None, *, setting: str = "kernels.backend"
) -> Ops:
    """The operations for tensors on a device: `auto` looks at where they lie, not at what the machine has.

    Args:
        backend: as for `load_ops`. `auto` on a CPU is native for bfloat16 where that can run, which is logged, else
            torch.
        device: of the tensors.
        dtype: of the tensors, where it is known and a few seconds for compiling are well spent.
        setting: what the user calls the backend, for errors.

    Raises:
        UserError: the backend is unknown, or cannot run here.
    """
    try:
        if backend == "auto" and device.type == "cpu":
            return _for_cpu(dtype)
        return load_ops(backend)
    except UnsupportedInput as problem:
        reason = " ".join(str(problem).split()).replace("kernels.backend", setting)
        raise UserError(f"{setting}: {reason}") from None


def _for_cpu(dtype: torch.dtype | None) -> Ops:
    if dtype == torch.bfloat16:
        try:
            ops = load_ops("native")
        except UnsupportedInput as problem:
            log.info(
                "kernels.backend auto: torch, because the native kernels cannot run: %s", "; ".join(problem.reasons)
            )
        else:
            log.info("kernels.backend auto: native, which is for bf16 on this kind of CPU")
            return ops
    return load_ops("torch")
