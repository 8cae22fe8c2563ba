from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from fastgpt_kernels import load_ops
from torch import Tensor

from fastgpt.config import ModelConfig
from fastgpt.model import GPT, build_model
from fastgpt.model.block import PostNormBlock, PreNormBlock
from fastgpt.model.dropout import Masks, Site, dropout_seeds, masks_of_layers

NO_DROPOUT = Masks(p=0.0, seeds=None)
Block = PreNormBlock | PostNormBlock


def attention(block: Block, x: Tensor) -> Tensor:
    """Head by head and query by query, as the equation says."""
    q, k, v = (x @ block.attention.qkv.weight.T + block.attention.qkv.bias).chunk(3, -1)
    size = x.shape[-1] // 3
    out = torch.zeros_like(x)
    for head in range(3):
        part = slice(head * size, (head + 1) * size)
        for i in range(x.shape[1]):
            scores = (q[:, i : i + 1, part] * k[:, : i + 1, part]).sum(-1) / size**0.5
            out[:, i, part] = (scores.softmax(-1)[..., None] * v[:, : i + 1, part]).sum(1)
    return out @ block.attention.out.weight.T + block.attention.out.bias


def mlp(block: Block, x: Tensor) -> Tensor:
    up = x @ block.mlp.up.weight.T + block.mlp.up.bias
    return F.gelu(up, approximate="tanh") @ block.mlp.down.weight.T + block.mlp.down.bias


def normed(x: Tensor, module: torch.nn.Module) -> Tensor:
    variance, mean = torch.var_mean(x, -1, correction=0, keepdim=True)
    return (x - mean) / (variance + 1e-5).sqrt() * module.weight + module.bias


def block_and_input(
    norm: str, config_of: Callable[..., ModelConfig], scramble: Callable[[GPT], GPT]
) -> tuple[Block, Tensor]:
    model = scramble(build_model(config_of(norm=norm), load_ops("torch"))).double()
    return model.blocks[1], torch.randn(2, 5, 21, dtype=torch.float64)


@torch.no_grad()
def test_a_post_norm_block_normalises_each_sum(
    config_of: Callable[..., ModelConfig], scramble: Callable[[GPT], GPT]
) -> None:
    block, x = block_and_input("post", config_of, scramble)
    n = normed(x + attention(block, x), block.norm_1)
    expected = normed(n + mlp(block, n), block.norm_2)
    branch, h = block(None, x, NO_DROPOUT)
    assert branch is None
    torch.testing.assert_close(h, expected)


@torch.no_grad()
def test_a_pre_norm_block_normalises_what_each_branch_reads(
    config_of: Callable[..., ModelConfig], scramble: Callable[[GPT], GPT]
) -> None:
    block, x = block_and_input("pre", config_of, scramble)
    n = x + attention(block, normed(x, block.norm_1))
    branch = mlp(block, normed(n, block.norm_2))
    torch.testing.assert_close(block(None, x, NO_DROPOUT), (branch, n))
    # the branch and the stream that the block before hands on
    terms = 0.3 * x, 0.7 * x
    torch.testing.assert_close(block(*terms, NO_DROPOUT), (branch, n))


@torch.no_grad()
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_each_branch_is_dropped_before_it_joins_the_stream(
    norm: str, config_of: Callable[..., ModelConfig], scramble: Callable[[GPT], GPT]
) -> None:
    block, x = block_and_input(norm, config_of, scramble)
    masks = masks_of_layers(0.4, dropout_seeds(5, 2), 2)[1]
    drop = load_ops("torch").dropout

    def attended(x: torch.Tensor) -> torch.Tensor:
        return drop(block.attention(x, masks), 0.4, masks.seed_at(Site.ATTENTION_OUTPUT))

    def fed(x: torch.Tensor) -> torch.Tensor:
        return drop(mlp(block, x), 0.4, masks.seed_at(Site.MLP_OUTPUT))

    if norm == "pre":
        before = torch.randn_like(x)
        entered = x + drop(before, 0.4, dropout_seeds(5, 2)[0, Site.MLP_OUTPUT])
        n = entered + attended(normed(entered, block.norm_1))
        # the branch that is still open is whole: it is dropped where it is added
        expected = mlp(block, normed(n, block.norm_2)), n
    else:
        before = None
        n = normed(x + attended(x), block.norm_1)
        expected = None, normed(n + fed(n), block.norm_2)
    torch.testing.assert_close(block(before, x, masks), expected)
