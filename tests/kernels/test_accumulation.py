import pytest
import torch
from fastgpt_kernels import accumulate, accumulation
from hypothesis import given
from hypothesis import strategies as st


@pytest.fixture(params=[2**19, 7], ids=["one piece", "many pieces"])
def pieces(request, monkeypatch):
    monkeypatch.setattr(accumulation, "PIECE", request.param)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (0,), (1,), (13, 17), (3, 5, 7)])
def test_a_sum_has_every_bit_of_pytorch_s(shape, dtype, pieces):
    total, x = torch.randn(shape), torch.randn(shape).to(dtype)
    expected = total.clone().add_(x)
    assert accumulate(total, x) is total and torch.equal(total, expected)


@given(st.integers(1, 40), st.integers(1, 40))
def test_views_that_are_not_dense_are_added_too(rows, columns):
    total, x = torch.randn(columns, rows).t(), torch.randn(rows, columns + 3).bfloat16()[:, 3:]
    expected = total + x
    assert torch.equal(accumulate(total, x), expected)


def test_shapes_that_do_not_fit_are_pytorch_s_error():
    with pytest.raises(RuntimeError):
        accumulate(torch.zeros(3), torch.zeros(4).bfloat16())
