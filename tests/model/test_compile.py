"""Both blocks as one graph each: what eager computes, and one graph for all seeds."""

import os

import pytest
import torch

# before any kernel is defined: a process either interprets or compiles
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from fastgpt_kernels import Ops, load_ops
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


def assert_one_graph_serves_every_seed(block: nn.Module, x: Tensor, backend: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend=backend)
    results = []
    for seed in (5, 6):
        with torch._dynamo.config.patch(error_on_recompile=seed != 5):
            ours = output_and_gradients(compiled, x, seed)
        torch.testing.assert_close(ours, output_and_gradients(block, x, seed))
        results.append(ours[0])
    assert not torch.equal(*results), "the mask did not follow the seed"


# Inductor compiles C++, which takes its time: once, for the block that the larger models have
@pytest.mark.parametrize(("norm", "backend"), [("pre", "inductor"), ("post", "aot_eager")])
def test_a_block_compiles_to_one_graph_that_serves_every_seed(norm: str, backend: str) -> None:
    # in float64, where another order of sums is far from any mistake
    block = block_of(norm, load_ops("torch")).double()
    assert_one_graph_serves_every_seed(block, input_of(torch.float64), backend)


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_a_block_of_triton_kernels_does_too(norm: str) -> None:
    block = block_of(norm, load_ops("triton"))
    assert_one_graph_serves_every_seed(block, input_of(torch.float32), "aot_eager")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_inductor_compiles_a_block_of_triton_kernels(norm: str) -> None:
    block = block_of(norm, load_ops("triton")).cuda()
    assert_one_graph_serves_every_seed(block, input_of(torch.float32).cuda(), "inductor")
