"""GPUs as their makers' data sheets have them, and how much of that anybody has measured.

Rates are FLOP/s and bytes/s, decimal. Links count one direction; data sheets add up both.
"""

from typing import NamedTuple

from fastgpt.errors import UserError, did_you_mean


class Gpu(NamedTuple):
    """One GPU, the node that it is usually sold in, and what it costs."""

    device: str  # what PyTorch's name of the device contains
    peak: float  # dense bf16 tensor-core rate
    product: float  # best bf16 matrix product that was measured
    fp32: float  # float32 rate without tensor cores
    bandwidth: float  # of its memory
    memory: int
    link: float  # to the other GPUs of its node
    network: float  # of each GPU to other nodes
    attention: float  # FlashAttention-2's causal forward at head size 64 and 1,024 positions
    host: int  # memory of the host that comes with it
    hourly: float  # US dollars


# FlashAttention-2 uses 35% of an H100 where it uses up to 73% of an A100, for which it was written (abstracts of
# arXiv:2407.08608 and 2307.08691): on Ampere and Ada its share of the peak is larger by their quotient.
_HOPPER = 229e12 / 989e12  # figure 5 of arXiv:2407.08608
_AMPERE = _HOPPER * 73 / 35
# Where nobody has published a best product: what an H100 reaches of its peak.
_SHARE = 792e12 / 989e12

# of host memory with each GPU: a DGX A100 or H100 has 2 TB for 8; a desktop's is a guess
_SERVER, _DESKTOP = 256 * 10**9, 64 * 10**9

# Data sheets: NVIDIA H100, H200, A100, DGX B200, L40S, and the whitepapers of Ampere GA102 and Ada. Best products:
# github.com/mag-/gpu_benchmark (A100, H100, H100 PCIe); an 8192^3 product on an H200. Prices: llm.c's runs (discussion
# 677: 24 hours of 8 H100s for $672; discussion 481: $14 an hour for 8 A100s); the others are guesses.
GPUS = {
    "h100": Gpu("H100", 989e12, 792e12, 67e12, 3.35e12, 80 * 10**9, 450e9, 50e9, _HOPPER * 989e12, _SERVER, 3.5),
    "h200": Gpu("H200", 989e12, 790e12, 67e12, 4.8e12, 141 * 10**9, 450e9, 50e9, _HOPPER * 989e12, _SERVER, 4.0),
    "h100-pcie": Gpu(
        "H100 PCIe", 756e12, 499e12, 51e12, 2.0e12, 80 * 10**9, 64e9, 25e9, _HOPPER * 756e12, _SERVER, 2.5
    ),
    "b200": Gpu(
        "B200", 2250e12, 2250e12 * _SHARE, 75e12, 8.0e12, 180 * 10**9, 900e9, 50e9, _HOPPER * 2250e12, _SERVER, 6.0
    ),
    "a100-80": Gpu("A100", 312e12, 268e12, 19.5e12, 2.039e12, 80 * 10**9, 300e9, 25e9, _AMPERE * 312e12, _SERVER, 1.75),
    "a100-40": Gpu("A100", 312e12, 268e12, 19.5e12, 1.555e12, 40 * 10**9, 300e9, 25e9, _AMPERE * 312e12, _SERVER, 1.3),
    "l40s": Gpu(
        "L40S", 362e12, 362e12 * _SHARE, 91.6e12, 0.864e12, 48 * 10**9, 32e9, 12.5e9, _AMPERE * 362e12, _SERVER, 1.0
    ),
    "rtx4090": Gpu(
        "RTX 4090",
        165e12,
        165e12 * _SHARE,
        82.6e12,
        1.008e12,
        24 * 10**9,
        32e9,
        1.25e9,
        _AMPERE * 165e12,
        _DESKTOP,
        0.5,
    ),
    "rtx3090": Gpu(
        "RTX 3090", 71e12, 71e12 * _SHARE, 35.6e12, 0.936e12, 24 * 10**9, 32e9, 1.25e9, _AMPERE * 71e12, _DESKTOP, 0.25
    ),
}


def find_gpu(name: str) -> Gpu:
    """The GPU of a name, whatever its case.

    Raises:
        UserError: it is not in the table.
    """
    known = name.lower().replace("_", "-")
    if known not in GPUS:
        raise UserError(f"--gpu: {name!r} is not known; allowed: {', '.join(GPUS)}.{did_you_mean(known, GPUS)}")
    return GPUS[known]
