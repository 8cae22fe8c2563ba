from collections.abc import Callable

import pytest
import torch
from fastgpt_kernels import load_ops

from fastgpt.config import ModelConfig
from fastgpt.errors import UserError
from fastgpt.model import GPT
from fastgpt.model.init import initial_value
from fastgpt.model.levels import levels, number_of_levels
from fastgpt.model.task import TaskShape, new_task_model
from fastgpt.model.transfer import transferred_values

SEED = 5


def test_levels_go_from_the_embeddings_to_the_output_layer(config_of: Callable[..., ModelConfig]) -> None:
    heights = levels(dict(new_task_model(config_of(norm="pre"), load_ops("torch"), TaskShape(2)).named_parameters()))
    found = {name: heights[name] for name in heights if name.endswith("weight")}
    assert {height: next(n for n in found if found[n] == height) for height in range(4)} == {
        0: "token_embedding.weight",
        1: "blocks.0.norm_1.weight",
        2: "blocks.1.norm_1.weight",
        3: "task_head.weight",
    }
    assert heights["final_norm.weight"] == 2 and heights["position_embedding.weight"] == 0


@pytest.mark.parametrize("blocks", [None, 2, 1, 0, -1])
def test_so_many_blocks_are_taken_over_from_the_bottom(model: GPT, blocks: int | None) -> None:
    source = dict(model.named_parameters())
    value = transferred_values(source, model.config, SEED, blocks=blocks)
    for name, height in levels(source).items():
        shape = tuple(source[name].shape)
        fresh = initial_value(name, shape, model.config, SEED)
        assert not torch.equal(fresh, source[name]), name
        taken = blocks is None or height <= blocks
        assert torch.equal(value(name, shape), source[name] if taken else fresh), name


def test_new_tokens_start_as_those_of_a_new_model_and_an_output_layer_is_left_out(model: GPT) -> None:
    source = dict(model.named_parameters()) | {"task_head.weight": torch.ones(2, model.config.n_embd)}
    config = model.config.model_copy(update={"vocab_size": model.config.vocab_size + 3000})
    value = transferred_values(source, config, SEED)
    old, width = model.token_embedding.weight.shape
    table = value("token_embedding.weight", (old + 3000, width))
    assert torch.equal(table[:old], model.token_embedding.weight)
    assert table[old:].std().item() == pytest.approx(0.02, rel=0.02) and abs(table[old:].mean().item()) < 5e-4
    head = value("task_head.weight", (2, width))
    assert torch.equal(head, initial_value("task_head.weight", (2, width), config, SEED))


def test_what_does_not_fit_is_refused(model: GPT) -> None:
    source = dict(model.named_parameters())
    with pytest.raises(UserError, match="has 2 blocks; 3 of them cannot be transferred"):
        transferred_values(source, model.config, SEED, blocks=3)
    with pytest.raises(UserError, match=r"position_embedding.weight has shape \(13, 21\).*\(14, 21\)"):
        transferred_values(source, model.config, SEED)("position_embedding.weight", (14, 21))


def test_new_tokens_come_before_the_positions_of_a_single_table(config_of: Callable[..., ModelConfig]) -> None:
    config = config_of(norm="post", embedding="table")
    old = torch.randn(config.vocab_size + config.context, config.n_embd)
    larger = config.model_copy(update={"vocab_size": config.vocab_size + 3})
    table = transferred_values({"token_embedding.weight": old}, larger, SEED)(
        "token_embedding.weight", (config.vocab_size + 3 + config.context, config.n_embd)
    )
    assert torch.equal(table[: config.vocab_size], old[: config.vocab_size])
    assert torch.equal(table[config.vocab_size + 3 :], old[config.vocab_size :])


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("frozen", [0, 1, 2, 3])
def test_frozen_levels_have_zeros_for_gradients_and_the_others_their_own(
    frozen: int, checkpointed: bool, config_of: Callable[..., ModelConfig], scramble: Callable[[GPT], GPT], norm: str
) -> None:
    model = new_task_model(config_of(norm=norm), load_ops("torch"), TaskShape(2))
    scramble(model)
    tokens = torch.tensor([[[5, 1, 2, 6]], [[5, 3, 3, 6]]])
    arguments = {"tokens": tokens, "targets": tokens, "extract": torch.tensor([[3], [3]])}
    names, parameters = zip(*model.named_parameters(), strict=True)
    heights = levels(names)
    assert number_of_levels(names) == 4

    def gradients(levels_frozen: int) -> dict[str, torch.Tensor]:
        loss = model.eval()(
            **arguments,
            labels=torch.tensor([0, 1]),
            frozen_levels=levels_frozen,
            checkpoint_activations=checkpointed,
        )
        return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))

    whole, found = gradients(0), gradients(frozen)
    for name in names:
        expected = torch.zeros_like(whole[name]) if heights[name] < frozen else whole[name]
        assert torch.equal(found[name], expected), name
        assert whole[name].any(), name
