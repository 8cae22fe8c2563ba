"""What the device can do at most, as far as its maker says."""

import torch

from fastgpt.plan.hardware import GPUS


def peak_flops(device: torch.device) -> float | None:
    """Peak dense bf16 FLOP/s of a GPU, or None where it is not known (every CPU)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    # the longest that the device's name contains: an H100 PCIe is no H100
    known = sorted(GPUS.values(), key=lambda gpu: len(gpu.device), reverse=True)
    return next((gpu.peak for gpu in known if gpu.device in name), None)
