"""The objective of fine-tuning, held to the sums written out, and to transformers where it has the piece."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fastgpt_kernels import load_ops
from torch import Tensor

from fastgpt.config import ModelConfig
from fastgpt.errors import UserError
from fastgpt.model import GPT
from fastgpt.model.build import new_model
from fastgpt.model.convert import to_hugging_face
from fastgpt.model.init import initial_value
from fastgpt.model.task import TaskModel, TaskShape, new_task_model, pool, shared_mask

# two examples of two sequences; the tokens that follow, -100 after the last real one
TOKENS = torch.tensor([[[5, 1, 2, 6, 0], [5, 3, 6, 0, 0]], [[5, 1, 6, 0, 0], [5, 2, 4, 1, 6]]])
FOLLOWING = torch.tensor(
    [
        [[1, 2, 6, -100, -100], [3, 6, -100, -100, -100]],
        [[1, 6, -100, -100, -100], [2, 4, 1, 6, -100]],
    ]
)
EXTRACT = torch.tensor([[3, 2], [2, 4]])

SHAPES = {
    "classes": (TaskShape(3), 1, torch.tensor([2, 0])),
    "similarity": (TaskShape(2), 2, torch.tensor([1, 0])),
    "choice": (TaskShape(1, choice=True), 2, torch.tensor([1, 0])),
    "score": (TaskShape(1, regression=True), 2, torch.tensor([0.25, 0.75])),
    "concat": (TaskShape(3, pooling="concat"), 1, torch.tensor([2, 0])),
    "hidden layer": (TaskShape(2, head_units=5), 2, torch.tensor([1, 0])),
    "choice through a hidden layer": (TaskShape(1, choice=True, head_units=5), 2, torch.tensor([1, 0])),
}

FORMS: dict[str, dict[str, Any]] = {
    "pre": {"norm": "pre"},
    "post": {"norm": "post"},
    "lstm": {"kind": "lstm", "n_head": None, "n_units": 17},
}


@pytest.fixture(params=SHAPES)
def case(request: pytest.FixtureRequest) -> tuple[TaskShape, dict[str, Tensor]]:
    shape, sequences, labels = SHAPES[request.param]
    arguments = {
        "tokens": TOKENS[:, :sequences],
        "targets": FOLLOWING[:, :sequences],
        "extract": EXTRACT[:, :sequences],
        "labels": labels,
    }
    return shape, arguments


@pytest.fixture(params=FORMS)
def task_model(
    config_of: Callable[..., ModelConfig], request: pytest.FixtureRequest, scramble: Callable[[GPT], GPT]
) -> Callable[..., TaskModel]:
    def make(shape: TaskShape, **changes: Any) -> TaskModel:
        model = new_task_model(config_of(**FORMS[request.param], **changes), load_ops("torch"), shape)
        scramble(model)
        return model

    return make


def written_out(model: TaskModel, arguments: dict[str, Tensor]) -> Tensor:
    """L3 in float64, one sequence at a time and without padding."""
    shape, losses, lm_losses = model.shape, [], []
    for tokens, targets, extract, label in zip(*arguments.values(), strict=True):
        read = []
        for row, following, end in zip(tokens, targets, extract, strict=True):
            length = int(end) + 1
            hidden = model.hidden(row[None, :length])[0]
            parts = [hidden[-1]]
            if shape.pooling == "concat":
                parts += [hidden.max(0).values, hidden.mean(0)]
            read.append(torch.cat(parts))
            logits = hidden[:-1] @ model.token_embedding.weight.T
            lm_losses.append(F.cross_entropy(logits, following[: length - 1]))
        outputs = torch.stack(read) if shape.choice else torch.stack(read).sum(0)
        last = model.task_head
        if shape.head_units:
            hidden = last.hidden
            outputs, last = (outputs @ hidden.weight.T + hidden.bias).clamp(min=0), last.output
        scores = (outputs @ last.weight.T + last.bias).flatten()
        losses.append((scores[0] - label) ** 2 if shape.regression else F.cross_entropy(scores, label))
    return torch.stack(losses).mean() + shape.lm_weight * torch.stack(lm_losses).mean()


def gradients(model: TaskModel, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def test_the_objective_and_its_gradient_are_those_of_the_sums_written_out(
    task_model: Callable[..., TaskModel], case: tuple[TaskShape, dict[str, Tensor]]
) -> None:
    shape, arguments = case
    model = task_model(shape).double().eval()
    arguments["labels"] = arguments["labels"].double() if shape.regression else arguments["labels"]
    expected, loss = written_out(model, arguments), model(**arguments)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    ours = gradients(model, model(**arguments))
    for name, gradient in gradients(model, expected).items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-9, atol=1e-12, msg=name)


def test_lambda_weighs_the_language_model_and_0_leaves_it_out(task_model: Callable[..., TaskModel]) -> None:
    arguments = {"tokens": TOKENS, "targets": FOLLOWING, "extract": EXTRACT, "labels": torch.tensor([1, 0])}
    losses = [task_model(TaskShape(2, lm_weight=weight)).eval()(**arguments).item() for weight in (0.0, 0.5, 1.0)]
    assert losses[2] - losses[0] == pytest.approx(2 * (losses[1] - losses[0]), rel=1e-5)
    assert losses[1] > losses[0] + 0.1
    without = task_model(TaskShape(2, lm_weight=0.0)).eval()(**arguments | {"targets": None})
    assert without.item() == losses[0]


def test_padding_changes_nothing(
    task_model: Callable[..., TaskModel], case: tuple[TaskShape, dict[str, Tensor]]
) -> None:
    shape, arguments = case
    model = task_model(shape).double().eval()
    padded = dict(arguments, tokens=F.pad(arguments["tokens"], (0, 4), value=7))
    padded["targets"] = F.pad(arguments["targets"], (0, 4), value=-100)
    other = dict(padded, tokens=F.pad(arguments["tokens"], (0, 4), value=2))
    torch.testing.assert_close(model(**padded), model(**other), rtol=1e-12, atol=0)
    forward = ("tokens", "extract")
    scores, longer = (model(**{name: given[name] for name in forward}) for given in (arguments, padded))
    torch.testing.assert_close(scores, longer, rtol=1e-12, atol=1e-14)


def test_the_order_of_the_two_texts_of_a_similarity_does_not_matter(task_model: Callable[..., TaskModel]) -> None:
    model = task_model(TaskShape(2)).double().eval()
    there = model(TOKENS, extract=EXTRACT)
    back = model(TOKENS.flip(1), extract=EXTRACT.flip(1))
    torch.testing.assert_close(there, back, rtol=1e-12, atol=0)


def test_one_mask_drops_for_all_choices_of_an_example_and_another_for_the_next() -> None:
    mask = shared_mask(torch.ones(2, 3, 4000), 0.25, seed=1)
    assert mask.shape == (2, 1, 4000) and mask.unique().tolist() == pytest.approx([0, 1 / 0.75])
    assert (mask == 0).float().mean().item() == pytest.approx(0.25, abs=0.02)
    assert not torch.equal(mask[0], mask[1])
    assert torch.equal(mask, shared_mask(torch.ones(2, 3, 4000), 0.25, seed=1))
    assert not torch.equal(mask, shared_mask(torch.ones(2, 3, 4000), 0.25, seed=2))


def test_dropout_at_the_output_layer_acts_in_training_alone_and_asks_for_a_seed(
    task_model: Callable[..., TaskModel],
) -> None:
    model = task_model(TaskShape(2, dropout=0.5))
    arguments = {"tokens": TOKENS, "extract": EXTRACT}
    first, again, other = (model.train()(**arguments, dropout_seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    with pytest.raises(UserError, match="dropout_seed"):
        model(**arguments)
    assert torch.equal(model.eval()(**arguments), model(**arguments, dropout_seed=1))


@pytest.mark.parametrize("choice", [False, True])
def test_a_hidden_layer_has_a_mask_at_each_of_its_two_maps_that_the_sequences_of_an_example_share(
    task_model: Callable[..., TaskModel], choice: bool
) -> None:
    model = task_model(TaskShape(1 if choice else 2, choice=choice, head_units=400, dropout=0.5)).train()
    read: list[Tensor] = []
    for layer in (model.task_head.hidden, model.task_head.output):
        layer.register_forward_pre_hook(lambda layer, inputs: read.append(inputs[0].detach()))
    torch.nn.init.constant_(model.task_head.hidden.weight, 0.0)
    torch.nn.init.constant_(model.task_head.hidden.bias, 1.0)
    model(TOKENS, extract=EXTRACT, dropout_seed=1)
    activations, units = read
    assert units.unique().tolist() == [0, 2]  # of ones: dropped, or 1 / (1 - p)
    assert (units == 0).float().mean().item() == pytest.approx(0.5, abs=0.1)
    assert not torch.equal(units[0], units[1])
    if choice:
        for x in (activations, units):
            assert torch.equal(x[:, 0] == 0, x[:, 1] == 0)
    model.eval()
    read.clear()
    model(TOKENS, extract=EXTRACT)
    assert read[1].unique().tolist() == [1]


def test_a_linear_output_layer_has_the_names_that_it_had() -> None:
    config = ModelConfig(n_layer=1, n_head=1, n_embd=4, context=5, vocab_size=6)
    heads = {}
    for units in (None, 3):
        names = dict(new_task_model(config, load_ops("torch"), TaskShape(2, head_units=units)).named_parameters())
        heads[units] = {name: tuple(p.shape) for name, p in names.items() if name.startswith("task_head")}
    assert heads[None] == {"task_head.weight": (2, 4), "task_head.bias": (2,)}
    assert heads[3] == {
        "task_head.hidden.weight": (3, 4),
        "task_head.hidden.bias": (3,),
        "task_head.output.weight": (2, 3),
        "task_head.output.bias": (2,),
    }
    values = {name: initial_value(name, shape, config, 1) for name, shape in heads[3].items()}
    assert 0.1 < values["task_head.hidden.weight"].abs().max() <= 4**-0.5
    assert not values["task_head.output.bias"].any()


def test_without_examples_it_is_a_language_model(task_model: Callable[..., TaskModel]) -> None:
    model = task_model(TaskShape(2)).eval()
    gpt = new_model(model.config, model.ops)
    gpt.load_state_dict({name: p for name, p in model.state_dict().items() if not name.startswith("task_head")})
    tokens = TOKENS[:, 0]
    assert torch.equal(model(tokens), gpt.eval()(tokens))
    assert torch.equal(model(tokens, targets=FOLLOWING[:, 0]), gpt(tokens, targets=FOLLOWING[:, 0]))


def test_checkpointed_activations_give_the_same_gradients(task_model: Callable[..., TaskModel]) -> None:
    model = task_model(TaskShape(2), dropout=0.1).train()
    arguments = {"tokens": TOKENS, "targets": FOLLOWING, "extract": EXTRACT, "labels": torch.tensor([1, 0])}
    kept, recomputed = (
        gradients(model, model(**arguments, dropout_seed=3, checkpoint_activations=again)) for again in (False, True)
    )
    assert all(torch.equal(gradient, recomputed[name]) for name, gradient in kept.items())


def test_the_largest_and_the_mean_are_those_of_the_real_tokens() -> None:
    x = torch.tensor([[[1.0, -5.0], [3.0, -7.0], [99.0, 99.0]]])
    pooled = pool(x, torch.tensor([1]), "concat")
    assert pooled.tolist() == [[3.0, -7.0, 3.0, -5.0, 2.0, -6.0]]


def test_logits_are_those_of_transformers_with_two_heads(config_of: Callable[..., ModelConfig]) -> None:
    transformers = pytest.importorskip("transformers")
    config = config_of(norm="post", n_embd=24, vocab_size=37)
    model = new_task_model(config, load_ops("torch"), TaskShape(1, choice=True)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    gpt = GPT(config, model.ops)
    gpt.load_state_dict({name: p for name, p in model.state_dict().items() if not name.startswith("task_head")})
    state, settings = to_hugging_face(gpt)
    settings |= {"num_labels": 1, "summary_type": "cls_index", "summary_first_dropout": 0.0}
    theirs = transformers.OpenAIGPTDoubleHeadsModel(transformers.OpenAIGPTConfig(**settings)).eval()
    theirs.load_state_dict(
        {
            **copy.deepcopy(state),
            "lm_head.weight": state["transformer.tokens_embed.weight"],
            "multiple_choice_head.summary.weight": model.task_head.weight.detach(),
            "multiple_choice_head.summary.bias": model.task_head.bias.detach(),
        }
    )
    with torch.no_grad():
        found = theirs(TOKENS, mc_token_ids=EXTRACT)
        torch.testing.assert_close(model(TOKENS, extract=EXTRACT), found.mc_logits, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model(TOKENS.flatten(0, 1)), found.logits.flatten(0, 1), rtol=1e-4, atol=1e-5)
