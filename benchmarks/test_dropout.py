"""Dropout, alone and added to a residual. Masks differ between contenders, so what is checked is what dropout means."""

import pytest
import torch

from benchmarks.masks import rate_of
from benchmarks.shapes import RESIDUALS
from benchmarks.work import Work, bytes_of


def assert_dropout(out, x, p):
    """Kept elements are x / (1 - p), and about 1 - p of them are kept."""
    kept = out != 0
    torch.testing.assert_close(out[kept], (x / (1.0 - p))[kept])
    few = 10 * (p * (1.0 - p) / x.numel()) ** 0.5  # ten standard deviations
    assert abs(kept.float().mean().item() - (1.0 - p)) < few


@pytest.mark.operation("dropout", cases=RESIDUALS, directions=("forward", "backward"))
def test_dropout(case, contender, draw, verify, measure):
    x = draw(case.rows, case.N)

    def dropout(ops, x):
        return ops.dropout(x, case.dropout_p, 1)

    nonzero = torch.where(x == 0, 1.0, x)
    verify(lambda: assert_dropout(dropout(contender, nonzero), nonzero, rate_of(contender, case.dropout_p)))
    size = bytes_of(x)
    work = Work("byte", "read x, write y; backward: read dy, write dx", 2 * size, 2 * size)
    measure(dropout, x, work=work)


@pytest.mark.operation("dropout_add", cases=RESIDUALS, directions=("forward", "backward"))
def test_dropout_add(case, contender, draw, verify, measure):
    x, residual = draw(case.rows, case.N), draw(case.rows, case.N)

    def dropout_add(ops, x, residual):
        return ops.dropout_add(x, residual, case.dropout_p, 1)

    nonzero = torch.where(x == 0, 1.0, x)
    verify(
        lambda: assert_dropout(
            dropout_add(contender, nonzero, torch.zeros_like(x)), nonzero, rate_of(contender, case.dropout_p)
        )
    )
    size = bytes_of(x)
    formula = "read x and the residual, write the sum; backward: read dy, write dx (the residual's gradient is dy)"
    measure(dropout_add, x, residual, work=Work("byte", formula, 3 * size, 2 * size))
