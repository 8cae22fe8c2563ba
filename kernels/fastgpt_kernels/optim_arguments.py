"""What the optimizer and the norm of gradients are given, and every reason why they cannot take it."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

Form: TypeAlias = Literal["adamw", "gpt1"]
OptimBackend: TypeAlias = Literal["auto", "triton", "torch"]

GRADIENTS = (torch.float32, torch.float16, torch.bfloat16)
WORKING = (torch.float16, torch.bfloat16)
MOMENTS = ("exp_avg", "exp_avg_sq")


class Member(NamedTuple):
    """One parameter and what its update reads and writes."""

    master: Tensor
    gradient: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor
    working: Tensor | None


class Constants(NamedTuple):
    """What a parameter group says, the learning rate apart."""

    form: Form
    betas: tuple[float, float]
    eps: float
    weight_decay: float


def against_backend(backend: object) -> list[str]:
    """Reasons against the name of a backend."""
    allowed = backend in ("auto", "triton", "torch")
    return [] if allowed else [f"backend is {backend!r}; it must be 'auto', 'triton' or 'torch'"]


def against_groups(groups: Sequence[Mapping[str, Any]]) -> list[str]:
    """Reasons against parameter groups of a state that is loaded."""
    reasons = []
    for number, group in enumerate(groups):
        found = [f"has {name}" for name in ("amsgrad", "maximize") if group.get(name)]
        if group.get("decoupled_weight_decay") is False and group["weight_decay"]:
            found.append("adds its weight decay to the gradient")
        reasons += [f"group {number} {reason}" for reason in found]
        reasons += [f"group {number}: {reason}" for reason in against_constants(group)]
    return reasons


def against_moments(master: Tensor, state: Mapping[str, Any]) -> list[str]:
    """Reasons against moments that were loaded for a parameter."""
    reasons = []
    for name in MOMENTS:
        moment = state.get(name)
        if state and not isinstance(moment, Tensor):
            reasons.append(f"has a state without {name}")
        elif isinstance(moment, Tensor):
            found = (tuple(moment.shape), moment.dtype, moment.device)
            needed = (tuple(master.shape), torch.float32, master.device)
            if found != needed:
                words = [
                    f"{shape} {str(dtype).removeprefix('torch.')} on {device}"
                    for shape, dtype, device in (found, needed)
                ]
                reasons.append(f"has {name} of shape {words[0]}; it must be {words[1]}")
    return reasons


def against_constants(group: Mapping[str, Any]) -> list[str]:
    """Reasons against a parameter group's numbers."""
    reasons = []
    lr = group["lr"]
    if isinstance(lr, Tensor):
        if lr.numel() != 1 or not lr.is_floating_point():
            reasons.append(f"lr is a tensor of {lr.numel()} x {lr.dtype}; it must be one floating-point number")
    elif not (lr >= 0.0 and math.isfinite(lr)):
        reasons.append(f"lr is {lr}; it must be at least 0 and finite")
    betas = group["betas"]
    if not isinstance(betas, tuple | list) or len(betas) != 2 or not all(0.0 <= beta < 1.0 for beta in betas):
        reasons.append(f"betas are {betas}; they must be two numbers, at least 0 and below 1")
    return reasons + [
        f"{name} is {group[name]}; it must be at least 0 and finite"
        for name in ("eps", "weight_decay")
        if not (group[name] >= 0.0 and math.isfinite(group[name]))
    ]


def working_pairs(
    working: Mapping[Tensor, Tensor] | Iterable[tuple[Tensor, Tensor]] | None,
) -> tuple[dict[Tensor, Tensor], list[str]]:
    """Working copies by their parameter, and the reasons against them."""
    pairs = dict(working or ())
    reasons: list[str] = []
    for number, (master, copy) in enumerate(pairs.items()):
        reasons += against_working(master, copy, f"working copy {number}")
    return pairs, reasons


def against_working(master: Tensor, copy: Tensor, name: str) -> list[str]:
    """Reasons against a working copy of a parameter."""
    reasons = []
    if copy.dtype not in WORKING:
        reasons.append(f"{name} is {copy.dtype}; supported: float16, bfloat16")
    if copy.shape != master.shape:
        reasons.append(f"{name} has shape {tuple(copy.shape)} and its parameter {tuple(master.shape)}")
    if copy.device != master.device:
        reasons.append(f"{name} is on {copy.device} and its parameter on {master.device}")
    if not copy.is_contiguous():
        reasons.append(f"{name} is not contiguous")
    return reasons


def against_member(master: Tensor, gradient: Tensor | None, device: torch.device) -> list[str]:
    """Reasons against a parameter and its gradient, beside others on a device."""
    reasons = []
    if master.dtype != torch.float32:
        reasons.append(f"is {master.dtype}; an optimizer keeps float32, and 16-bit weights as working copies of it")
    if master.device != device:
        reasons.append(f"is on {master.device} and others on {device}")
    if not master.is_contiguous():
        reasons.append("is not contiguous")
    assert gradient is not None
    if gradient.layout != torch.strided:
        reasons.append(f"has a gradient of layout {gradient.layout}; it must be dense")
    if gradient.dtype not in GRADIENTS:
        reasons.append(f"has a gradient of {gradient.dtype}; supported: float32, float16, bfloat16")
    if gradient.device != master.device:
        reasons.append(f"has a gradient on {gradient.device}")
    return reasons


def against_one_element(x: float | Tensor, name: str, device: torch.device) -> list[str]:
    """Reasons against a number that may be a tensor."""
    if not isinstance(x, Tensor):
        return []
    reasons = []
    if x.numel() != 1 or not x.is_floating_point():
        reasons.append(f"{name} is a tensor of {x.numel()} x {x.dtype}; it must be one floating-point number")
    if x.device != device and x.device.type != "cpu":
        reasons.append(f"{name} is on {x.device} and the parameters on {device}")
    return reasons


def against_norm(xs: Sequence[Tensor], device: torch.device, use_triton: bool) -> list[str]:
    """Reasons against the tensors of a norm."""
    supported = GRADIENTS if use_triton else (*GRADIENTS, torch.float64)
    reasons = []
    for number, x in enumerate(xs):
        if x.dtype not in supported:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in supported)
            reasons.append(f"tensor {number} is {x.dtype}; supported: {names}")
        if x.layout != torch.strided:
            reasons.append(f"tensor {number} has layout {x.layout}; it must be dense")
        if x.device != device:
            reasons.append(f"tensor {number} is on {x.device} and others on {device}")
    return reasons
