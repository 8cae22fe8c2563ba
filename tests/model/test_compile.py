"""Both blocks as one graph each, on the torch backend: what eager computes, and one graph for all seeds."""

import pytest
import torch
from fastgpt_kernels import load_ops
from torch import Tensor, nn

from fastgpt.config import ModelConfig
from fastgpt.model import build_model
from fastgpt.model.dropout import Masks, dropout_seeds

DROPOUT = 0.3


def output_and_gradients(block: nn.Module, x: Tensor, seed: int) -> list[Tensor]:
    x = x.detach().requires_grad_()
    y = block(x, Masks(DROPOUT, dropout_seeds(seed, 1)[0]))
    loss = (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum()
    return [y.detach(), *torch.autograd.grad(loss, [x, *block.parameters()])]


# Inductor compiles C++, which takes its time: once, for the block that the larger models have
@pytest.mark.parametrize(("norm", "backend"), [("pre", "inductor"), ("post", "aot_eager")])
def test_a_block_compiles_to_one_graph_that_serves_every_seed(norm: str, backend: str) -> None:
    config = ModelConfig.model_validate(
        {"n_layer": 1, "n_head": 2, "n_embd": 24, "context": 11, "vocab_size": 7, "norm": norm, "dropout": DROPOUT}
    )
    # in float64, where another order of sums is far from any mistake
    block = build_model(config, load_ops("torch"), seed=3).blocks[0].double()
    x = torch.randn(2, 11, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend=backend)
    results = []
    for seed in (5, 6):
        with torch._dynamo.config.patch(error_on_recompile=seed != 5):
            ours = output_and_gradients(compiled, x, seed)
        torch.testing.assert_close(ours, output_and_gradients(block, x, seed))
        results.append(ours[0])
    assert not torch.equal(*results), "the mask did not follow the seed"
