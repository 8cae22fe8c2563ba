"""What the device can do at most, as far as its maker says."""

import torch

# Dense bf16 tensor-core rates in FLOP/s, from NVIDIA's data sheets; the first name that the device's contains counts.
_PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12, "B200": 2250e12}


def peak_flops(device: torch.device) -> float | None:
    """Peak bf16 FLOP/s of a GPU, or None where it is not known (every CPU)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for model, peak in _PEAKS.items() if model in name), None)
