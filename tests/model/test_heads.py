import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastgpt.model import heads
from fastgpt.model.heads import language_model_loss

SHAPES = [(1, 1, 1), (2, 3, 7), (1, 5, 50257), (3, 300, 1001)]


def logits_and_targets(shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    logits = (4 * torch.randn(shape, generator=generator)).to(dtype).requires_grad_()
    targets = torch.randint(shape[-1], shape[:-1], generator=generator)
    ignored = torch.rand(shape[:-1], generator=generator) < 0.3
    ignored[0, 0] = False
    return logits, targets.masked_fill(ignored, -100)


def torch_loss(logits: Tensor, targets: Tensor, reduction: str) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction=reduction)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_loss_and_gradient_are_as_close_to_float64_as_twice_pytorch(
    shape: tuple[int, int, int], dtype: torch.dtype, reduction: str
) -> None:
    logits, targets = logits_and_targets(shape, dtype)
    weights = torch.randn(targets.numel(), generator=torch.Generator().manual_seed(2))
    results = []
    for x, loss in [
        (logits.detach().double(), torch_loss),
        (logits.detach(), lambda x, *rest: torch_loss(x.float(), *rest)),
        (logits.detach(), language_model_loss),
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


@given(st.integers(1, 5), st.integers(1, 9), st.integers(1, 13), st.integers(1, 40))
def test_the_size_of_the_row_buffer_changes_nothing(batch: int, length: int, columns: int, elements: int) -> None:
    logits, targets = logits_and_targets((batch, length, columns), torch.float64)
    whole = language_model_loss(logits, targets)
    gradient = torch.autograd.grad(whole, logits)[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(heads._BUFFER_ELEMENTS, "cpu", elements)
        in_pieces = language_model_loss(logits, targets)
        assert torch.equal(in_pieces, whole)
        assert torch.equal(torch.autograd.grad(in_pieces, logits)[0], gradient)


def test_the_gradient_is_that_of_the_loss() -> None:
    logits, targets = logits_and_targets((2, 3, 5), torch.float64)
    assert torch.autograd.gradcheck(lambda x: language_model_loss(x, targets, "none"), logits)


def test_a_batch_without_targets_has_sum_zero_and_zero_gradient() -> None:
    logits, _ = logits_and_targets((2, 3, 7), torch.bfloat16)
    targets = torch.full((2, 3), -100)
    total = language_model_loss(logits, targets, reduction="sum")
    total.backward()
    assert total == 0
    assert (logits.grad == 0).all()
    assert language_model_loss(logits, targets, reduction="none").eq(0).all()
    assert language_model_loss(logits, targets).isnan()


def test_a_loss_scale_acts_before_fp16_gradients_underflow() -> None:
    logits, targets = logits_and_targets((8, 1024, 11), torch.float16)
    (2.0**16 * language_model_loss(logits, targets)).backward()
    counting = logits.grad[targets != -100]
    assert (counting != 0).float().mean() > 0.99
