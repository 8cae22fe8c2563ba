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
from fastgpt.model.dropout import dropout_seeds, masks_of_layers

DROPOUT = 0.3
# the first block, to which no branch comes, and another; where each sum is normalised, none comes to any
BLOCKS = {"pre, first": 0, "pre": 1, "post": 1}


def block_of(kind: str, ops: Ops) -> nn.Module:
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 32, "context": 11, "vocab_size": 7, "dropout": DROPOUT}
    config = ModelConfig.model_validate(shape | {"norm": kind.split(",")[0]})
    return build_model(config, ops, seed=3).blocks[BLOCKS[kind]]


def inputs_of(kind: str, dtype: torch.dtype) -> list[Tensor | None]:
    """A branch and a stream."""
    both = torch.randn(2, 2, 11, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
    return [both[0] if kind == "pre" else None, both[1]]


def outputs_and_gradients(kind: str, block: nn.Module, inputs: list[Tensor | None], seed: int) -> list[Tensor]:
    leaves = [None if x is None else x.detach().requires_grad_() for x in inputs]
    seeds = dropout_seeds(seed, 2).to(inputs[1].device)
    outs = [y for y in block(*leaves, masks_of_layers(DROPOUT, seeds, 2)[BLOCKS[kind]]) if y is not None]
    douts = [torch.linspace(-1, 1, y.numel()).view(y.shape).to(y) for y in outs]
    wanted = [x for x in leaves if x is not None]
    return [*(y.detach() for y in outs), *torch.autograd.grad(outs, [*wanted, *block.parameters()], douts)]


def assert_one_graph_serves_every_seed(
    kind: str, block: nn.Module, inputs: list[Tensor | None], backend: str, exact: nn.Module
) -> None:
    """As close as the block without a compiler, by the rule of `fastgpt_kernels.testing`; `exact` is the oracle."""
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend=backend)
    wide = next(exact.parameters()).dtype
    results = []
    for seed in (5, 6):
        with torch._dynamo.config.patch(error_on_recompile=seed != 5):
            ours = outputs_and_gradients(kind, compiled, inputs, seed)
        eager = outputs_and_gradients(kind, block, inputs, seed)
        widened = [None if x is None else x.to(wide) for x in inputs]
        oracle = outputs_and_gradients(kind, exact, widened, seed)
        assert_close(ours, eager, oracle, [result.dtype for result in ours])
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
@pytest.mark.parametrize("kind", ["pre", "post"])
def test_a_block_compiles_to_one_graph_that_serves_every_seed(kind: str, backend: str, dtype: torch.dtype) -> None:
    block = block_of(kind, load_ops("torch")).to(dtype)
    assert_one_graph_serves_every_seed(kind, block, inputs_of(kind, dtype), backend, copy.deepcopy(block).double())


def test_the_first_block_compiles_too() -> None:
    kind = "pre, first"
    block = block_of(kind, load_ops("torch"))
    exact = copy.deepcopy(block).double()
    assert_one_graph_serves_every_seed(kind, block, inputs_of(kind, torch.float32), "aot_eager", exact)


@pytest.mark.parametrize("kind", ["pre", "post"])
def test_a_block_of_triton_kernels_does_too(kind: str, device: str) -> None:
    block = block_of(kind, load_ops("triton")).to(device)
    # the same kernels in the same order: the very bits
    inputs = on(device, inputs_of(kind, torch.float32))
    assert_one_graph_serves_every_seed(kind, block, inputs, "aot_eager", block)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["pre", "post"])
def test_inductor_compiles_a_block_of_triton_kernels(kind: str, device: str) -> None:
    block = block_of(kind, load_ops("triton")).to(device, torch.bfloat16)
    inputs = on(device, inputs_of(kind, torch.bfloat16))
    # the masks of these kernels depend on no dtype
    assert_one_graph_serves_every_seed(kind, block, inputs, "inductor", copy.deepcopy(block).float())


def on(device: str, inputs: list[Tensor | None]) -> list[Tensor | None]:
    return [None if x is None else x.to(device) for x in inputs]
