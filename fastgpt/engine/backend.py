"""Which implementation of the operations goes with a device."""

import torch
from fastgpt_kernels import Backend, Ops, load_ops


def ops_for(backend: Backend, device: torch.device) -> Ops:
    """The operations for tensors on a device: `auto` looks at where they lie, not at what the machine has.

    Raises:
        UnsupportedInput: the backend cannot run here.
    """
    return load_ops("torch" if backend == "auto" and device.type == "cpu" else backend)
