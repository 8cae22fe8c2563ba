import pytest
import torch
import torch.nn.functional as F
from fastgpt_kernels import Ops, load_ops
from torch import Tensor

from fastgpt.model import GPT
from fastgpt.model.heads import language_model_loss

SHAPES = [(1, 1, 1), (2, 3, 7), (1, 5, 50257), (3, 300, 1001)]


@pytest.fixture
def ops() -> Ops:
    return load_ops("torch")


def logits_and_targets(shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    logits = (4 * torch.randn(shape, generator=generator)).to(dtype).requires_grad_()
    targets = torch.randint(shape[-1], shape[:-1], generator=generator)
    ignored = torch.rand(shape[:-1], generator=generator) < 0.3
    ignored[0, 0] = False
    return logits, targets.masked_fill(ignored, -100)


def torch_loss(logits: Tensor, targets: Tensor, reduction: str) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction=reduction)


@pytest.mark.parametrize("consume", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_loss_and_gradient_are_as_close_to_float64_as_twice_pytorch(
    shape: tuple[int, int, int], dtype: torch.dtype, reduction: str, consume: bool, ops: Ops
) -> None:
    logits, targets = logits_and_targets(shape, dtype)
    weights = torch.randn(targets.numel(), generator=torch.Generator().manual_seed(2))
    results = []
    for x, loss in [
        (logits.detach().double(), torch_loss),
        (logits.detach(), lambda x, *rest: torch_loss(x.float(), *rest)),
        (logits.detach(), lambda x, *rest: language_model_loss(ops, x.clone(), *rest, consume=consume)),
    ]:
        value = loss(x.requires_grad_(), targets, reduction)
        scalar = (value.flatten() * weights.to(value.dtype)).sum() if reduction == "none" else value
        results.append((value.detach().flatten(), torch.autograd.grad(scalar, x)[0]))
    for oracle, theirs, ours, precision in zip(*results, (torch.float32, dtype), strict=True):
        floor = torch.finfo(precision).eps * oracle.abs().max()
        allowed = 2 * torch.maximum((theirs - oracle).abs().max(), floor)
        assert (ours - oracle).abs().max() <= allowed
    assert results[2][0].dtype == torch.float32
    assert results[2][1].dtype == dtype


def test_a_batch_without_targets_has_sum_zero_and_zero_gradient(ops: Ops) -> None:
    logits, _ = logits_and_targets((2, 3, 7), torch.bfloat16)
    targets = torch.full((2, 3), -100)
    total = language_model_loss(ops, logits, targets, reduction="sum")
    total.backward()
    assert total == 0
    assert (logits.grad == 0).all()
    assert language_model_loss(ops, logits, targets, reduction="none").eq(0).all()
    assert language_model_loss(ops, logits, targets).isnan()


def test_a_loss_scale_acts_before_fp16_gradients_underflow(ops: Ops) -> None:
    logits, targets = logits_and_targets((8, 1024, 11), torch.float16)
    (2.0**16 * language_model_loss(ops, logits, targets)).backward()
    counting = logits.grad[targets != -100]
    assert (counting != 0).float().mean() > 0.99


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_model_given_targets_returns_the_loss_of_its_logits(model: GPT, tokens: Tensor, reduction: str) -> None:
    targets = tokens.roll(-1, 1).masked_fill(tokens == tokens[0, 3], -100)
    loss = model(tokens, targets=targets, reduction=reduction)
    torch.testing.assert_close(loss, language_model_loss(model.ops, model(tokens), targets, reduction))
    assert loss.shape == (targets.shape if reduction == "none" else ())


@pytest.mark.parametrize("announced", [0.25, 0.5])
def test_a_gradient_known_in_advance_changes_nothing_but_roundings(
    model: GPT, tokens: Tensor, announced: float
) -> None:
    targets = tokens.roll(-1, 1)
    found = []
    for loss_gradient in (None, announced):
        loss = model(tokens, targets=targets, loss_gradient=loss_gradient)
        found.append([loss.detach(), *torch.autograd.grad(0.25 * loss, list(model.parameters()))])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_only_a_loss_that_gets_a_gradient_consumes_the_logits(model: GPT, tokens: Tensor) -> None:
    consumed: list[bool] = []
    cross_entropy = model.ops.cross_entropy

    def spy(logits: Tensor, targets: Tensor, *, consume: bool, **options: object) -> Tensor:
        consumed.append(consume)
        return cross_entropy(logits, targets, consume=consume, **options)

    spied = GPT(model.config, model.ops._replace(cross_entropy=spy))
    spied(tokens, targets=tokens)
    with torch.no_grad():
        spied(tokens, targets=tokens)
    assert consumed == [True, False]
