"""Residual sums that are one operation with the norm after them, against the same sums and norms one by one."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fastgpt_kernels import Ops, load_ops
from fastgpt_kernels.testing import assert_close
from torch import Tensor, nn

from fastgpt.config import ModelConfig
from fastgpt.model import GPT, build_model
from fastgpt.model.dropout import Masks, Site, dropout_seeds

SEED = 5


def one_by_one(model: GPT, tokens: Tensor) -> Tensor:
    """The final hidden states of a pre-norm model: every sum rounded and read again by its norm."""
    ops, p = model.ops, model.config.dropout
    seeds = dropout_seeds(SEED, model.config.n_layer)

    def normed(x: Tensor, module: nn.Module) -> Tensor:
        return ops.layer_norm(x, module.weight, module.bias)

    tables = model.token_embedding.weight, model.position_embedding.weight
    x = ops.embedding(tokens, *tables, dropout_p=p, seed=seeds[0, Site.EMBEDDING])
    for block, row in zip(model.blocks, seeds, strict=True):
        attended = block.attention(normed(x, block.norm_1), Masks(p, row))
        n = ops.dropout_add(attended, x, p, row[Site.ATTENTION_OUTPUT])
        x = ops.dropout_add(block.mlp(normed(n, block.norm_2)), n, p, row[Site.MLP_OUTPUT])
    return normed(x, model.final_norm)


def output_and_gradients(model: GPT, hidden: Tensor) -> list[Tensor]:
    dout = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(2)).to(hidden.dtype)
    return [hidden.detach(), *torch.autograd.grad(hidden, list(model.parameters()), dout)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_pre_norm_stack_is_as_close_to_the_mathematics_as_sums_and_norms_one_by_one(
    checkpointed: bool,
    dropout: float,
    dtype: torch.dtype,
    config_of: Callable[..., ModelConfig],
    scramble: Callable[[GPT], GPT],
) -> None:
    config = config_of(n_layer=3, dropout=dropout)
    model = scramble(build_model(config, load_ops("torch"))).to(dtype)
    exact = GPT(config, load_ops("reference")).double()
    exact.load_state_dict(model.state_dict())
    tokens = torch.arange(22).view(2, 11)
    ours = model.hidden(tokens, dropout_seed=SEED, checkpoint_activations=checkpointed)
    assert_close(
        ours=output_and_gradients(model, ours),
        theirs=output_and_gradients(model, one_by_one(model, tokens)),
        oracle=output_and_gradients(exact, one_by_one(exact, tokens)),
        dtypes=[dtype] * (1 + len(list(model.parameters()))),
    )


def counted(ops: Ops) -> tuple[Ops, Counter[str]]:
    """The operations, and how often each is called."""
    calls: Counter[str] = Counter()

    def count(name: str) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            calls[name] += 1
            return getattr(ops, name)(*args, **options)

        return call

    return ops._replace(**{name: count(name) for name in Ops._fields[1:]}), calls


@pytest.mark.parametrize(
    ("norm", "checkpointed", "layer_norms", "sums"),
    # what is recomputed joins each branch before it goes on
    [("pre", False, 1, 0), ("pre", True, 1, 3), ("post", False, 0, 0), ("post", True, 0, 0)],
)
def test_every_sum_is_one_operation_with_the_norm_after_it(
    norm: str, checkpointed: bool, layer_norms: int, sums: int, config_of: Callable[..., ModelConfig]
) -> None:
    ops, calls = counted(load_ops("torch"))
    config = config_of(n_layer=3, norm=norm, dropout=0.3)
    model = build_model(config, ops)
    model.hidden(torch.zeros(1, 5, dtype=torch.int64), dropout_seed=SEED, checkpoint_activations=checkpointed)
    assert calls["add_layer_norm"] == 2 * config.n_layer
    assert (calls["layer_norm"], calls["dropout_add"]) == (layer_norms, sums)


def kept(model: GPT, tokens: Tensor) -> int:
    """How many tensors the size of the stream a recomputed forward pass keeps for its backward pass."""
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(x: Tensor) -> Tensor:
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        model.hidden(tokens, dropout_seed=SEED, checkpoint_activations=True)
    stream = tokens.numel() * model.config.n_embd * model.token_embedding.weight.element_size()
    return sum(storage.nbytes() == stream for storage in storages.values())


def test_a_recomputed_block_keeps_one_tensor(norm: str, config_of: Callable[..., ModelConfig]) -> None:
    few, more = (
        kept(
            build_model(config_of(n_layer=layers, norm=norm, dropout=0.3), load_ops("torch")), torch.zeros(2, 11).long()
        )
        for layers in (2, 5)
    )
    assert more - few == 3
