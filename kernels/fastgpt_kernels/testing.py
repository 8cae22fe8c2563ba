"""What "as close as PyTorch" means: for tests of kernels, and for benchmarks that check before they time."""

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from fastgpt_kernels.builtin import BUILTIN
from fastgpt_kernels.dispatch import load_ops
from fastgpt_kernels.ops import Ops

Call: TypeAlias = Callable[..., Tensor | tuple[Tensor, ...]]


def output_and_gradients(call: Call, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The outputs of a call (one, or a tuple) and the gradients of its floating-point inputs, in float64 on the CPU.

    The incoming gradients depend on the outputs' shapes alone, and their values are exact in every dtype. An input that
    the outputs do not depend on has a gradient of zeros.
    """
    return [x.double().cpu() for x in results_of(call, inputs)]


def results_of(call: Call, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The same as they are: in their own dtypes, on their device."""
    leaves = [x.detach().requires_grad_() if x.is_floating_point() else x for x in inputs]  # views keep their strides
    result = call(*leaves)
    outs = result if isinstance(result, tuple) else (result,)
    douts = [_incoming(out, place) for place, out in enumerate(outs)]
    wanted = [x for x in leaves if x.requires_grad]
    gradients = torch.autograd.grad(outs, wanted, douts, allow_unused=True, materialize_grads=True)
    return [x.detach() for x in (*outs, *gradients)]


def assert_as_close_as_torch(call: Callable[..., Tensor | tuple[Tensor, ...]], *inputs: Tensor, ops: Ops) -> None:
    """Compare `call(ops, *inputs)`, its outputs and all gradients, with the reference in float64.

    The largest error may be twice that of PyTorch's built-ins (`fastgpt_kernels.builtin`) on the same inputs; where
    that is tiny, twice the spacing of the result's dtype at the largest oracle value. Inputs that hold no
    floating-point numbers are passed on as they are. The reference runs where the inputs are: a GPU computes in float64
    what takes a CPU seconds.
    """
    ours = results_of(lambda *xs: call(ops, *xs), inputs)
    assert_close(ours, *pytorch_and_oracle(call, inputs), [x.dtype for x in ours])


def pytorch_and_oracle(
    call: Callable[..., Tensor | tuple[Tensor, ...]], inputs: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """What `assert_as_close_as_torch` compares with, which depends on no backend: PyTorch's results, and the oracle."""
    exact = [x.double() if x.is_floating_point() else x for x in inputs]
    theirs = results_of(lambda *xs: call(BUILTIN, *xs), inputs)
    return theirs, results_of(lambda *xs: call(load_ops("reference"), *xs), exact)


def assert_close(
    ours: Sequence[Tensor], theirs: Sequence[Tensor], oracle: Sequence[Tensor], dtypes: Sequence[torch.dtype]
) -> None:
    """Compare results with an oracle by the rule of `assert_as_close_as_torch`; each has its own dtype's floor."""
    for place, (our, their, exact, dtype) in enumerate(zip(ours, theirs, oracle, dtypes, strict=True)):
        name = f"result {place} of {len(oracle)} (outputs, then gradients)"
        if our.shape != exact.shape:
            raise AssertionError(f"{name}: shape {tuple(our.shape)}, not {tuple(exact.shape)}")
        error = (our.double() - exact).abs().max().item()
        peer_error = (their.double() - exact).abs().max().item()
        allowed = 2.0 * max(peer_error, torch.finfo(dtype).eps * exact.abs().max().item())
        # written so that NaN fails
        if not error <= allowed:
            raise AssertionError(f"{name}: error {error:.3g}, allowed {allowed:.3g} (PyTorch: {peer_error:.3g})")


def _incoming(out: Tensor, place: int) -> Tensor:
    generator = torch.Generator().manual_seed(out.numel() + place)
    return torch.randn(out.shape, generator=generator).mul(16).round().div(16).to(out.device, out.dtype)
