"""What "as close as PyTorch" means: for tests of kernels, and for benchmarks that check before they time."""

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from fastgpt_kernels.dispatch import Ops, load_ops

Call: TypeAlias = Callable[..., Tensor]


def output_and_gradients(call: Call, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The output of a call and the gradient of each of its inputs, in float64 on the CPU.

    The incoming gradient depends on the output's shape alone, and its values are exact in every dtype.
    """
    leaves = [x.detach().requires_grad_() for x in inputs]  # views keep their strides
    out = call(*leaves)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(out.numel())).mul(16).round().div(16)
    gradients = torch.autograd.grad(out, leaves, dout.to(out.device, out.dtype))
    return [x.detach().double().cpu() for x in (out, *gradients)]


def assert_as_close_as_torch(call: Callable[..., Tensor], *inputs: Tensor, ops: Ops) -> None:
    """Compare `call(ops, *inputs)`, its output and all gradients, with the reference in float64.

    The largest error may be twice that of the torch backend on the same inputs; where that is tiny, twice the spacing
    of the dtype at the largest oracle value.
    """
    torch_ops, reference = load_ops("torch"), load_ops("reference")
    assert_close(
        ours=output_and_gradients(lambda *xs: call(ops, *xs), inputs),
        theirs=output_and_gradients(lambda *xs: call(torch_ops, *xs), inputs),
        oracle=output_and_gradients(lambda *xs: call(reference, *xs), [x.double().cpu() for x in inputs]),
        dtypes=[inputs[0].dtype, *(x.dtype for x in inputs)],
    )


def assert_close(
    ours: Sequence[Tensor], theirs: Sequence[Tensor], oracle: Sequence[Tensor], dtypes: Sequence[torch.dtype]
) -> None:
    """Compare results, an output and its gradients, with an oracle by the rule of `assert_as_close_as_torch`."""
    names = ["the output", *(f"the gradient of input {i}" for i in range(len(oracle) - 1))]
    for name, our, their, exact, dtype in zip(names, ours, theirs, oracle, dtypes, strict=True):
        error = (our - exact).abs().max().item()
        peer_error = (their - exact).abs().max().item()
        allowed = 2.0 * max(peer_error, torch.finfo(dtype).eps * exact.abs().max().item())
        # written so that NaN fails
        if not error <= allowed:
            raise AssertionError(f"{name}: error {error:.3g}, allowed {allowed:.3g} (PyTorch: {peer_error:.3g})")
