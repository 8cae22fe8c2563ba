"""The optimizer and the norm of the gradients: many tensors at once, in Triton on a GPU and by PyTorch elsewhere.

Importing this file imports no Triton.
"""

import importlib.util
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, overload

import torch
from torch import Tensor

from fastgpt_kernels.compiler import hidden_once_loaded
from fastgpt_kernels.errors import UnsupportedInput, raise_if_any
from fastgpt_kernels.multi_tensor import TableCache

Form: TypeAlias = Literal["adamw", "gpt1"]
OptimBackend: TypeAlias = Literal["auto", "triton", "torch"]

GRADIENTS = (torch.float32, torch.float16, torch.bfloat16)
WORKING = (torch.float16, torch.bfloat16)
MOMENTS = ("exp_avg", "exp_avg_sq")
REMEDY = "No backend takes these arguments: correct the call."
STATE_REMEDY = "The state is of another optimizer: load one that torch.optim.AdamW or FusedAdamW wrote."
# so short that float32 sums of squares keep their digits
NORM_CHUNK = 1_024
# elements for each thread of a CPU whose float32 gradient is made and used while it is in the cache: fewer would leave
# more of the time to the waking of threads
UPDATE_CHUNK = 1_048_576


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
        reasons += _against_backend(backend)
        self.form: Form = form
        self.backend: OptimBackend = backend
        self._working, found = _pairs(working)
        reasons += found
        self._tables: TableCache[Any] = TableCache()
        # "fused" tells PyTorch, and readers of `defaults`, that step counts lie beside the parameters
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "fused": True}
        raise_if_any(reasons + _against_constants(defaults), "FusedAdamW", backend, REMEDY)
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group; constants that it does not name are the optimizer's."""
        raise_if_any(_against_constants(self.defaults | param_group), "FusedAdamW", self.backend, REMEDY)
        hidden_once_loaded(torch.optim.Optimizer.add_param_group)(self, param_group)

    def set_working(self, working: Mapping[Tensor, Tensor] | Iterable[tuple[Tensor, Tensor]] | None) -> None:
        """Replace the working copies, for parameters that are made after the optimizer, as ZeRO's partitions are.

        Args:
            working: as at the optimizer's making.

        Raises:
            UnsupportedInput: a copy that does not fit its parameter; nothing has changed.
        """
        pairs, reasons = _pairs(working)
        raise_if_any(reasons, "FusedAdamW.set_working", self.backend, REMEDY)
        self._working = pairs

    def __getstate__(self) -> dict[str, Any]:
        own = {"form": self.form, "backend": self.backend, "_working": self._working}
        return super().__getstate__() | own

    def __setstate__(self, state: dict[str, Any]) -> None:
        backend = state.get("backend") or self.backend
        raise_if_any(_against_groups(state["param_groups"]), "FusedAdamW.load_state_dict", backend, STATE_REMEDY)
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
                    _update_by_torch(alike, constants, lr, float(scale))
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
            for reason in (*_against_member(master, self._gradient(master), device), *_against_moments(master, state)):
                found.setdefault(reason, []).append(f"parameter {place} of group {number}")
        reasons = []
        for reason, names in found.items():
            others = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            reasons.append(f"{names[0]}{others} {reason}")
        reasons += _against_one_element(scale, "gradient_scale", device)
        for number, group in enumerate(self.param_groups):
            reasons += [f"group {number}: {reason}" for reason in _against_constants(group)]
            reasons += _against_one_element(group["lr"], f"lr of group {number}", device)
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
    raise_if_any(_against_backend(backend), "grad_norm", backend, REMEDY)
    if not xs:
        return torch.zeros((), dtype=torch.float32, device="cpu")
    device = xs[0].device
    use_triton = _on_device(backend, device) == "triton"
    raise_if_any(_against_norm(xs, device, use_triton), "grad_norm", "triton" if use_triton else "torch", REMEDY)
    if use_triton:
        _check_triton(device, "grad_norm")
    with torch.no_grad():
        if use_triton:
            from fastgpt_kernels import gradient_norm

            return gradient_norm.norm(xs)
        return _norm_by_torch(xs)


def _update_by_torch(members: Sequence[Member], constants: Constants, lr: float, scale: float) -> None:
    """One update by PyTorch's fused AdamW, also of GPT-1's form: both differ only in their constants at a step.

    With c1 and c2 the bias corrections, AdamW with eps / sqrt(c2) for eps and weight_decay sqrt(c2) / c1 for
    weight_decay has sqrt(v) + eps times 1 / sqrt(c2) as its denominator and lr sqrt(c2) / c1 weight_decay as its decay.
    """
    by_step: dict[float, list[Member]] = {}
    for member in members:
        by_step.setdefault(member.step.item() + 1.0 if constants.form == "gpt1" else 0.0, []).append(member)
    grad_scale = None
    if scale != 1.0:
        # the kernel divides by it
        inverse = 1.0 / scale if scale else math.inf
        grad_scale = torch.tensor(inverse, dtype=torch.float32, device=members[0].master.device)
    for step, alike in by_step.items():
        eps, weight_decay = constants.eps, constants.weight_decay
        beta1, beta2 = constants.betas
        if constants.form == "gpt1":
            correction = math.sqrt(1.0 - beta2**step)
            eps, weight_decay = eps / correction, weight_decay * correction / (1.0 - beta1**step)
        torch._foreach_add_([member.step for member in alike], 1.0)
        for parts in _parts(alike):
            torch._fused_adamw_(
                [part.master for part in parts],
                [part.gradient for part in parts],
                [part.exp_avg for part in parts],
                [part.exp_avg_sq for part in parts],
                [],
                [part.step for part in parts],
                lr=lr,
                beta1=beta1,
                beta2=beta2,
                weight_decay=weight_decay,
                eps=eps,
                amsgrad=False,
                maximize=False,
                grad_scale=grad_scale,
            )
            for part in parts:
                if part.working is not None:
                    part.working.copy_(part.master)


def _parts(members: Sequence[Member]) -> Iterator[list[Member]]:
    """The members with float32 gradients, to be updated one list after the other.

    As they are where nothing is rounded. Else in pieces: on its way from and to 16 bits a piece stays in the cache.
    """
    as_they_are = [member for member in members if not _rounds(member)]
    if as_they_are:
        yield as_they_are
    size = UPDATE_CHUNK * torch.get_num_threads()
    widened: Tensor | None = None
    for member in members:
        if not _rounds(member):
            continue
        *flat, working = (None if x is None else x.view(-1) for x in (*member[:4], member.working))
        for start in range(0, member.master.numel(), size):
            master, gradient, exp_avg, exp_avg_sq = (x[start : start + size] for x in flat if x is not None)
            if gradient.dtype != torch.float32:
                if widened is None:
                    widened = torch.empty(size, dtype=torch.float32, device=gradient.device)
                gradient = widened[: len(gradient)].copy_(gradient)
            piece = None if working is None else working[start : start + size]
            yield [Member(master, gradient, exp_avg, exp_avg_sq, member.step, piece)]


def _rounds(member: Member) -> bool:
    return member.gradient.dtype != torch.float32 or member.working is not None


def _norm_by_torch(xs: Sequence[Tensor]) -> Tensor:
    """The norm of chunks in float32, then of those norms in float64."""
    parts = []
    for x in xs:
        for piece in _widened(x.reshape(-1)):
            whole = piece.numel() // NORM_CHUNK * NORM_CHUNK
            if whole:
                parts.append(torch.linalg.vector_norm(piece[:whole].view(-1, NORM_CHUNK), dim=1).double())
            if whole < piece.numel():
                parts.append(torch.linalg.vector_norm(piece[whole:]).double().view(1))
    if not parts:
        return torch.zeros((), device=xs[0].device)
    norm: Tensor = torch.linalg.vector_norm(torch.cat(parts))
    # squares beyond float32's range: the way to float64 is slow on a CPU, but such gradients are rare
    if not 1e-15 < norm.item() < math.inf:
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(x.double()) for x in xs]))
    return norm.float()


def _widened(flat: Tensor) -> Iterator[Tensor]:
    """All of a tensor in float32 at least; 16 bits piece by piece, each in the cache and overwritten by the next."""
    if flat.dtype not in WORKING:
        yield flat
        return
    size = UPDATE_CHUNK * torch.get_num_threads()
    memory = torch.empty(min(size, flat.numel()), dtype=torch.float32, device=flat.device)
    for start in range(0, flat.numel(), size):
        piece = flat[start : start + size]
        yield memory[: piece.numel()].copy_(piece)


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


def _against_backend(backend: object) -> list[str]:
    allowed = backend in ("auto", "triton", "torch")
    return [] if allowed else [f"backend is {backend!r}; it must be 'auto', 'triton' or 'torch'"]


def _against_groups(groups: Sequence[Mapping[str, Any]]) -> list[str]:
    """Reasons against parameter groups of a state that is loaded."""
    reasons = []
    for number, group in enumerate(groups):
        found = [f"has {name}" for name in ("amsgrad", "maximize") if group.get(name)]
        if group.get("decoupled_weight_decay") is False and group["weight_decay"]:
            found.append("adds its weight decay to the gradient")
        reasons += [f"group {number} {reason}" for reason in found]
        reasons += [f"group {number}: {reason}" for reason in _against_constants(group)]
    return reasons


def _against_moments(master: Tensor, state: Mapping[str, Any]) -> list[str]:
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


def _against_constants(group: Mapping[str, Any]) -> list[str]:
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


def _pairs(
    working: Mapping[Tensor, Tensor] | Iterable[tuple[Tensor, Tensor]] | None,
) -> tuple[dict[Tensor, Tensor], list[str]]:
    """Working copies by their parameter, and the reasons against them."""
    pairs = dict(working or ())
    reasons: list[str] = []
    for number, (master, copy) in enumerate(pairs.items()):
        reasons += _against_working(master, copy, f"working copy {number}")
    return pairs, reasons


def _against_working(master: Tensor, copy: Tensor, name: str) -> list[str]:
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


def _against_member(master: Tensor, gradient: Tensor | None, device: torch.device) -> list[str]:
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


def _against_one_element(x: float | Tensor, name: str, device: torch.device) -> list[str]:
    if not isinstance(x, Tensor):
        return []
    reasons = []
    if x.numel() != 1 or not x.is_floating_point():
        reasons.append(f"{name} is a tensor of {x.numel()} x {x.dtype}; it must be one floating-point number")
    if x.device != device and x.device.type != "cpu":
        reasons.append(f"{name} is on {x.device} and the parameters on {device}")
    return reasons


def _against_norm(xs: Sequence[Tensor], device: torch.device, use_triton: bool) -> list[str]:
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
