"""Both blocks as one graph each: what eager computes, and one graph for all seeds."""

import copy
import os

import pytest
import torch

# before any kernel is defined: a process either interprets or compiles
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from fastgpt_kernels import Ops, load_ops
from fastgpt_kernels.testing import assert_close
from torch import Tensor, nn

from fastgpt.config import ModelConfig
from fastgpt.model import build_model
from fastgpt.model.dropout import Masks, dropout_seeds

DROPOUT = 0.3


def block_of(norm: str, ops: Ops) -> nn.Module:
    config = ModelConfig.model_validate(
        {"n_layer": 1, "n_head": 2, "n_embd": 32, "context": 11, "vocab_size": 7, "norm": norm, "dropout": DROPOUT}
    )
    return build_model(config, ops, seed=3).blocks[0]


def input_of(dtype: torch.dtype) -> Tensor:
    return torch.randn(2, 11, 32, dtype=dtype, generator=torch.Generator().manual_seed(1))


def output_and_gradients(block: nn.Module, x: Tensor, seed: int) -> list[Tensor]:
    x = x.detach().requires_grad_()
    y = block(x, Masks(DROPOUT, dropout_seeds(seed, 1)[0].to(x.device)))
    loss = (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device).view(y.shape)).sum()
    return [y.detach(), *torch.autograd.grad(loss, [x, *block.parameters()])]


def assert_one_graph_serves_every_seed(block: nn.Module, x: Tensor, backend: str, exact: nn.Module) -> None:
    """As close as the block without a compiler, by the rule of `fastgpt_kernels.testing`; `exact` is the oracle."""
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend=backend)
    wide = next(exact.parameters()).dtype
    results = []
    for seed in (5, 6):
        with torch._dynamo.config.patch(error_on_recompile=seed != 5):
            ours = output_and_gradients(compiled, x, seed)
        eager = output_and_gradients(block, x, seed)
        assert_close(ours, eager, output_and_gradients(exact, x.to(wide), seed), [result.dtype for result in ours])
        results.append(ours[0])
    assert not torch.equal(*results), "the mask did not follow the seed"


# float32 and 16 bits go other ways than each other; Inductor compiles C++, which takes its time
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        ("aot_eager", torch.float32),
        ("aot_eager", torch.bfloat16),
        ("inductor", torch.bfloat16),
        pytest.param("inductor", torch.float32, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_a_block_compiles_to_one_graph_that_serves_every_seed(norm: str, backend: str, dtype: torch.dtype) -> None:
    block = block_of(norm, load_ops("torch")).to(dtype)
    assert_one_graph_serves_every_seed(block, input_of(dtype), backend, copy.deepcopy(block).double())


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_a_block_of_triton_kernels_does_too(norm: str, device: str) -> None:
    block = block_of(norm, load_ops("triton")).to(device)
    # the same kernels in the same order: the very bits
    assert_one_graph_serves_every_seed(block, input_of(torch.float32).to(device), "aot_eager", block)


@pytest.mark.gpu
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_inductor_compiles_a_block_of_triton_kernels(norm: str, device: str) -> None:
    block = block_of(norm, load_ops("triton")).to(device, torch.bfloat16)
    x = input_of(torch.bfloat16).to(device)
    # the masks of these kernels depend on no dtype
    assert_one_graph_serves_every_seed(block, x, "inductor", copy.deepcopy(block).float())
