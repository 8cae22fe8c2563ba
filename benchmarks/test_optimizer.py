"""AdamW, with bf16 working copies and clipping's factor, and the norm of the gradients, on a GPT-2's parameters."""

import pytest
import torch
from fastgpt_kernels import FusedAdamW, grad_norm
from fastgpt_kernels.testing import assert_close

from benchmarks.shapes import MODELS, parameter_shapes
from benchmarks.work import Work, bytes_of

CONSTANTS = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
LR, SCALE = 1e-3, 0.5


def eager_step(masters, working, lr):
    """PyTorch's fused AdamW, then the copies."""
    optimizer = torch.optim.AdamW(masters, lr, fused=True, capturable=masters[0].is_cuda, **CONSTANTS)
    # its kernel divides the gradients by this, as a gradient scaler has it do
    optimizer.grad_scale = torch.full((), 1.0 / SCALE, device=masters[0].device)
    optimizer.found_inf = torch.zeros((), device=masters[0].device)

    def step():
        optimizer.step()
        torch._foreach_copy_(working, masters)

    return step


def our_step(masters, working, lr, backend):
    pairs = zip(masters, working, strict=True)
    optimizer = FusedAdamW(masters, lr, working=pairs, backend=backend, **CONSTANTS)
    return lambda: optimizer.step(gradient_scale=SCALE)


def step_of(name, masters, working, lr):
    return eager_step(masters, working, lr) if name == "eager" else our_step(masters, working, lr, name)


def assert_right(name, device):
    """A first update of a few parameters, beside PyTorch's own and the formula in float64."""
    generator = torch.Generator().manual_seed(0)
    values, gradients = (
        [torch.randn(shape, generator=generator) for shape in ((5, 300), (7,), (2048,))] for _ in range(2)
    )
    beta1, beta2 = CONSTANTS["betas"]
    oracle = []
    for value, gradient in zip(values, gradients, strict=True):
        g = gradient.double() * SCALE
        m, v = (1 - beta1) * g / (1 - beta1), (1 - beta2) * g**2 / (1 - beta2)
        p = value.double()
        oracle.append(p - LR * (m / (v.sqrt() + CONSTANTS["eps"]) + CONSTANTS["weight_decay"] * p))
    results = []
    for each in (name, "eager"):
        masters = [value.clone().to(device).requires_grad_() for value in values]
        working = [torch.empty_like(m, dtype=torch.bfloat16, requires_grad=False) for m in masters]
        for master, gradient in zip(masters, gradients, strict=True):
            master.grad = gradient.clone().to(device)
        with torch.no_grad():
            step_of(each, masters, working, LR)()
        results.append([m.detach().double().cpu() for m in masters])
        assert all(torch.equal(m.detach().bfloat16(), w) for m, w in zip(masters, working, strict=True))
    assert_close(*results, oracle, [torch.float32] * len(oracle))


@pytest.mark.operation("adamw", cases=MODELS, directions=("call",))
def test_adamw(case, contender, contender_name, device, scale, draw, verify, measure):
    verify(lambda: assert_right(contender_name, device))
    masters = [draw(*shape, dtype=torch.float32).requires_grad_() for shape in parameter_shapes(case, scale)]
    working = [torch.empty_like(m, dtype=torch.bfloat16, requires_grad=False) for m in masters]
    for master in masters:
        master.grad = draw(*master.shape, dtype=torch.float32)
    # a CUDA graph reads the learning rate where it lies
    lr = torch.tensor(LR, device=device) if device == "cuda" else LR
    step = step_of(contender_name, masters, working, lr)
    work = Work(
        "byte",
        "read gradient, master and moments, write master and moments (28 bytes in float32), write the bf16 copy (2)",
        7 * bytes_of(*masters) + bytes_of(*working),
    )
    measure(lambda ops, *_: step(), *masters, work=work)


@pytest.mark.operation("grad_norm", cases=MODELS, directions=("call",))
def test_grad_norm(case, contender, contender_name, scale, draw, verify, measure):
    gradients = [draw(*shape, dtype=torch.float32) for shape in parameter_shapes(case, scale)]
    norm = torch.nn.utils.get_total_norm if contender_name == "eager" else grad_norm
    few = gradients[2:8]
    oracle = torch.linalg.vector_norm(torch.cat([x.flatten().double().cpu() for x in few]))
    theirs = torch.nn.utils.get_total_norm(few).double().cpu()
    verify(lambda: assert_close([norm(few).double().cpu()], [theirs], [oracle], [torch.float32]))
    work = Work("byte", "read every gradient", bytes_of(*gradients))
    measure(lambda ops, *xs: norm(xs), *gradients, work=work)
