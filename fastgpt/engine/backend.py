"""Which implementation of the operations goes with a device."""

import torch
from fastgpt_kernels import Backend, Ops, UnsupportedInput, load_ops

from fastgpt.errors import UserError


def ops_for(backend: Backend, device: torch.device, *, setting: str = "kernels.backend") -> Ops:
    """The operations for tensors on a device: `auto` looks at where they lie, not at what the machine has.

    Args:
        backend: as for `load_ops`.
        device: of the tensors.
        setting: what the user calls the backend, for errors.

    Raises:
        UserError: the backend is unknown, or cannot run here.
    """
    try:
        return load_ops("torch" if backend == "auto" and device.type == "cpu" else backend)
    except UnsupportedInput as problem:
        reason = " ".join(str(problem).split()).replace("kernels.backend", setting)
        raise UserError(f"{setting}: {reason}") from None
