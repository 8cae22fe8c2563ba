"""On what a measurement was made: device, versions, commit, clocks, load.

    python -m benchmarks.environment

prints it as JSON. The runner asks a process of its own, so that it holds no memory of the GPU while others measure.
"""

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "triton", "numpy", "deepspeed", "transformers", "pytest-benchmark", "liger-kernel")
CLOCKS = ("clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw", "power.limit", "temperature.gpu")


def describe() -> dict[str, Any]:
    """Everything that a reader of a figure needs to know about the machine."""
    found: dict[str, Any] = {
        "device": device_name(),
        "kind": "gpu" if torch.cuda.is_available() else "cpu",
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "load": load(),
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
            "driver": ask_driver("driver_version").get("driver_version"),
        }
    return found


def device_name() -> str:
    """The GPU, or the processor."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name()


def cpu_name() -> str:
    """The processor's own name where Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def versions() -> dict[str, str | None]:
    """Of the packages that are installed, and of what PyTorch was built with."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    cudnn = torch.backends.cudnn.version() if torch.cuda.is_available() else None
    return found | {"cuda": torch.version.cuda, "cudnn": None if cudnn is None else str(cudnn)}


def load() -> list[float]:
    """The load averages of the last 1, 5 and 15 minutes: other jobs on the same cores."""
    return [round(x, 2) for x in os.getloadavg()]


def clocks() -> dict[str, str]:
    """The GPU's clocks (MHz), power (W) and temperature (degrees Celsius) at this moment; nothing without a driver."""
    return ask_driver(*CLOCKS) if torch.cuda.is_available() else {}


def ask_driver(*names: str) -> dict[str, str]:
    """What nvidia-smi says of the first GPU."""
    command = ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader,nounits", "--id=0"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    values = [value.strip() for value in result.stdout.strip().split(",")]
    return dict(zip(names, values, strict=True)) if len(values) == len(names) else {}


def commit() -> str:
    """The short name of the commit, with -dirty where files differ from it; "unknown" outside a repository."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=7", "--exclude=*"]
    try:
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return "unknown"
    return result.stdout.strip() or "unknown"


if __name__ == "__main__":
    json.dump(describe(), sys.stdout)
