import pytest
import torch
import torch.nn.functional as F

from fastgpt.model.lookup import lookup


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_frequent_token_gets_the_whole_sum_of_its_gradients(dtype: torch.dtype) -> None:
    table = torch.randn(11, 5, dtype=dtype, requires_grad=True)
    ids = torch.tensor([3] * 2999 + [7] + [3] * 1000).view(4, 1000)
    gradient = (1 + 0.5 * torch.randn(4, 1000, 5)).to(dtype)
    rows = lookup(ids, table)
    assert torch.equal(rows, table[ids])
    rows.backward(gradient)
    exact = table.detach().double().requires_grad_()
    F.embedding(ids, exact).backward(gradient.double())
    # one rounding of each sum, and float32 accumulation over 3999 terms
    allowed = torch.finfo(dtype).eps * exact.grad.abs() + 3999 * torch.finfo(torch.float32).eps * exact.grad.abs().max()
    if dtype == torch.float64:
        allowed = 3999 * torch.finfo(dtype).eps * exact.grad.abs().max()
    assert ((table.grad - exact.grad).abs() <= allowed).all()
    assert table.grad.dtype == dtype
    assert (table.grad[[0, 1, 2, 4, 5, 6, 8, 9, 10]] == 0).all()


def test_ids_of_any_shape_are_looked_up() -> None:
    table = torch.randn(11, 5, dtype=torch.bfloat16, requires_grad=True)
    for shape in [(1,), (3, 7), (2, 1, 4)]:
        ids = torch.randint(11, shape)
        assert torch.equal(lookup(ids, table), table[ids])
        table.grad = None
        lookup(ids, table).sum().backward()
        assert torch.equal(table.grad[:, 0], ids.flatten().bincount(minlength=11).to(torch.bfloat16))


def test_an_id_past_the_table_is_an_error() -> None:
    with pytest.raises(IndexError):
        lookup(torch.tensor([11]), torch.zeros(11, 5, dtype=torch.bfloat16))
