"""The optimizer and the norm of the gradients: many tensors at once, in Triton on a GPU and by PyTorch elsewhere.

Importing this file imports no Triton.
"""

import importlib.util
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from fastgpt_kernels.compiler import hidden_once_loaded
from fastgpt_kernels.errors import UnsupportedInput, raise_if_any
from fastgpt_kernels.multi_tensor import TableCache
from fastgpt_kernels.optim_arguments import (
    MOMENTS,
    Constants,
    Form,
    Member,
    OptimBackend,
    against_backend,
    against_constants,
    against_groups,
    against_member,
    against_moments,
    against_norm,
    against_one_element,
    working_pairs,
)
from fastgpt_kernels.torch_ops import adamw as torch_adamw
from fastgpt_kernels.torch_ops import gradient_norm as torch_norm

REMEDY = "No backend takes these arguments: correct the call."
STATE_REMEDY = "The state is of another optimizer: load one that torch.optim.AdamW or FusedAdamW wrote."


class FusedAdamW(torch.optim.Optimizer):
    """AdamW, or GPT-1's own Adam, in one pass over parameters, moments, gradients and working copies.

    With the bias corrections c1 = 1 - beta1^t and c2 = 1 - beta2^t:

        adamw:  p <- p - lr (m / c1 / (sqrt(v / c2) + eps) + weight_decay p)
        gpt1:   p <- p - lr sqrt(c2) / c1 (m / (sqrt(v) + eps) + weight_decay p)

    Parameters and moments are float32, gradients float32, float16 or bfloat16. State and its dictionary are those of
    `torch.optim.AdamW(fused=True)`, in both directions; `form`, `backend` and `working` are not part of it. Which
    tensors decay is said by parameter groups, each with its own lr, betas, eps and weight_decay.

    On a GPU each parameter group takes two launches for each combination of dtypes, and the host never waits for the
    device. In a CUDA graph, let "lr" of the groups be a tensor on the device, and call `step` once with the same
    gradient tensors before the capture. The torch backend reads the step counts and `gradient_scale` on the host.

    DeepSpeed's ZeRO takes it as a client optimizer where "zero_allow_untested_optimizer" is true.

    Args:
        params: tensors, or parameter groups.
        lr: learning rate; a number, or a tensor of one element.
        betas: decay rates of the two moments, at least 0 and below 1.
        eps: added to the denominator.
        weight_decay: decoupled decay.
        form: "adamw", or "gpt1" (bias-corrected decay, eps outside the bias correction).
        backend: "triton", "torch", or "auto": triton for tensors on a GPU, else torch.
        working: pairs, or a mapping, of a parameter and a float16 or bfloat16 tensor of its shape, which receives the
            new value rounded in the same pass. Where the parameter has no gradient, that of its working copy counts:
            the gradient in 16 bits, which PyTorch lets no float32 parameter have.

    Raises:
        UnsupportedInput: for arguments outside these; `step` raises it for tensors that it cannot take.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        form: Form = "adamw",
        backend: OptimBackend = "auto",
        working: Mapping[Tensor, Tensor] | Iterable[tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        reasons = []
        if form not in ("adamw", "gpt1"):
            reasons.append(f"form is {form!r}; it must be 'adamw' or 'gpt1'")
        reasons += against_backend(backend)
        self.form: Form = form
        self.backend: OptimBackend = backend
        self._working, found = working_pairs(working)
        reasons += found
        self._tables: TableCache[Any] = TableCache()
        # "fused" tells PyTorch, and readers of `defaults`, that step counts lie beside the parameters
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "fused": True}
        raise_if_any(reasons + against_constants(defaults), "FusedAdamW", backend, REMEDY)
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group; constants that it does not name are the optimizer's."""
        raise_if_any(against_constants(self.defaults | param_group), "FusedAdamW", self.backend, REMEDY)
        hidden_once_loaded(torch.optim.Optimizer.add_param_group)(self, param_group)

    def set_working(self, working: Mapping[Tensor, Tensor] | Iterable[tuple[Tensor, Tensor]] | None) -> None:
        """Replace the working copies, for parameters that are made after the optimizer, as ZeRO's partitions are.

        Args:
            working: as at the optimizer's making.

        Raises:
            UnsupportedInput: a copy that does not fit its parameter; nothing has changed.
        """
        pairs, reasons = working_pairs(working)
        raise_if_any(reasons, "FusedAdamW.set_working", self.backend, REMEDY)
        self._working = pairs

    def __getstate__(self) -> dict[str, Any]:
        own = {"form": self.form, "backend": self.backend, "_working": self._working}
        return super().__getstate__() | own

    def __setstate__(self, state: dict[str, Any]) -> None:
        backend = state.get("backend") or self.backend
        raise_if_any(against_groups(state["param_groups"]), "FusedAdamW.load_state_dict", backend, STATE_REMEDY)
        super().__setstate__(state)
        self._tables = TableCache()
        for group in self.param_groups:
            group["fused"] = True

    @overload  # type: ignore[override]
    def step(self, closure: None = None, *, gradient_scale: float | Tensor = 1.0) -> None: ...

    @overload
    def step(self, closure: Callable[[], float], *, gradient_scale: float | Tensor = 1.0) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None, *, gradient_scale: float | Tensor = 1.0) -> float | None:
        """One update of every parameter that has a gradient.

        Args:
            closure: computes the loss, and gradients, anew.
            gradient_scale: factor of all gradients, such as 1 / loss scale and what clipping asks for; a number, or a
                tensor of one element on the device of the parameters. Where it is not finite, nothing changes: let it
                be NaN where the gradients' norm is not finite. The torch backend leaves float32 gradients multiplied.

        Returns:
            What the closure returned.

        Raises:
            UnsupportedInput: a parameter, gradient or scale that it cannot take; nothing has changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        scale = gradient_scale
        if isinstance(scale, Tensor) and scale.numel() == 1 and scale.device.type == "cpu":
            scale = scale.item()
        members = [
            (number, place, master)
            for number, group in enumerate(self.param_groups)
            for place, master in enumerate(group["params"])
            if self._gradient(master) is not None
        ]
        if not members:
            return loss
        device = members[0][2].device
        name = _on_device(self.backend, device)
        self._check(members, device, scale, name)
        if isinstance(scale, float | int) and not math.isfinite(scale):
            return loss
        if name == "torch" and isinstance(scale, Tensor):
            scale = scale.item()
            if not math.isfinite(scale):
                return loss
        for group in self.param_groups:
            together: dict[Any, list[Member]] = {}
            for master in group["params"]:
                if self._gradient(master) is not None:
                    member = self._member(master)
                    working = None if member.working is None else member.working.dtype
                    together.setdefault((member.gradient.dtype, working), []).append(member)
            constants = Constants(self.form, group["betas"], group["eps"], group["weight_decay"])
            lr = group["lr"]
            if isinstance(lr, Tensor) and (name == "torch" or lr.device.type == "cpu"):
                lr = lr.item()
            for alike in together.values():
                if name == "triton":
                    from fastgpt_kernels import adamw

                    adamw.update(alike, constants, lr, scale, self._tables)
                else:
                    torch_adamw.update(alike, constants, lr, float(scale))
        # a backward through a graph that is older must not go unnoticed
        written = [master for _, _, master in members]
        written += [self._working[master] for master in written if master in self._working]
        torch.autograd.graph.increment_version(written)
        return loss

    def _gradient(self, master: Tensor) -> Tensor | None:
        working = self._working.get(master)
        return working.grad if master.grad is None and working is not None else master.grad

    def _member(self, master: Tensor) -> Member:
        state = self.state[master]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=master.device)
            state["exp_avg"] = torch.zeros_like(master)
            state["exp_avg_sq"] = torch.zeros_like(master)
        step = state["step"]
        if not isinstance(step, Tensor) or step.dtype != torch.float32 or step.device != master.device:
            # a state that was written by an optimizer with its counts elsewhere
            step = state["step"] = torch.as_tensor(step, dtype=torch.float32).to(master.device)
        gradient = self._gradient(master)
        assert gradient is not None
        for name in MOMENTS:
            # those of a parameter that lay otherwise in memory
            state[name] = state[name].contiguous()
        return Member(
            master, gradient.contiguous(), state["exp_avg"], state["exp_avg_sq"], step, self._working.get(master)
        )

    def _check(
        self, members: Sequence[tuple[int, int, Tensor]], device: torch.device, scale: float | Tensor, backend: str
    ) -> None:
        found: dict[str, list[str]] = {}
        for number, place, master in members:
            state = self.state.get(master, {})
            for reason in (*against_member(master, self._gradient(master), device), *against_moments(master, state)):
                found.setdefault(reason, []).append(f"parameter {place} of group {number}")
        reasons = []
        for reason, names in found.items():
            others = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            reasons.append(f"{names[0]}{others} {reason}")
        reasons += against_one_element(scale, "gradient_scale", device)
        for number, group in enumerate(self.param_groups):
            reasons += [f"group {number}: {reason}" for reason in against_constants(group)]
            reasons += against_one_element(group["lr"], f"lr of group {number}", device)
        raise_if_any(reasons, "FusedAdamW.step", backend, REMEDY)
        if backend == "triton":
            _check_triton(device, "FusedAdamW.step")


def grad_norm(tensors: Iterable[Tensor], *, backend: OptimBackend = "auto") -> Tensor:
    """The L2 norm of all elements of all tensors, in their order: a deterministic sum, and no wait for the device.

    Squares of a whole chunk, and the sum over chunks, do not overflow before the norm itself does, nor do they vanish:
    on a GPU they are summed in float64; on a CPU in float32 within chunks of 1,024, and where that range was too small,
    once more in float64. Another order of the tensors, or another device, may change the last bit.

    Args:
        tensors: on one device, float32, float16 or bfloat16 (float64 without Triton, too), of any shapes and sizes.
        backend: "triton", "torch", or "auto": triton for tensors on a GPU, else torch.

    Returns:
        A float32 tensor of no dimensions on their device; 0 on the CPU where there are no tensors. Infinite or NaN
        elements make it so.

    Raises:
        UnsupportedInput: for arguments outside these.
    """
    xs = [x.detach() for x in tensors]
    raise_if_any(against_backend(backend), "grad_norm", backend, REMEDY)
    if not xs:
        return torch.zeros((), dtype=torch.float32, device="cpu")
    device = xs[0].device
    use_triton = _on_device(backend, device) == "triton"
    raise_if_any(against_norm(xs, device, use_triton), "grad_norm", "triton" if use_triton else "torch", REMEDY)
    if use_triton:
        _check_triton(device, "grad_norm")
    with torch.no_grad():
        if use_triton:
            from fastgpt_kernels import gradient_norm

            return gradient_norm.norm(xs)
        return torch_norm.norm(xs)


def _on_device(backend: OptimBackend, device: torch.device) -> Literal["triton", "torch"]:
    if backend != "auto":
        return backend
    return "triton" if device.type == "cuda" and importlib.util.find_spec("triton") else "torch"


def _check_triton(device: torch.device, operation: str) -> None:
    """Triton's kernels run on a GPU, or in the interpreter."""
    remedy = "Set backend to 'torch' to run it without Triton."
    if not importlib.util.find_spec("triton"):
        raise UnsupportedInput(f"{operation} (triton) cannot run here", ["Triton is not installed"], remedy)
    from fastgpt_kernels import launch

    if device.type != "cuda" and not launch.INTERPRETED:
        reason = f"the parameters are on {device}; a GPU is needed, or TRITON_INTERPRET=1 from the start"
        raise UnsupportedInput(f"{operation} (triton) cannot take this input", [reason], remedy)
