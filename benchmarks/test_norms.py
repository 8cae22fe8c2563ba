"""Layer norm, alone and of a residual sum."""

import pytest

from benchmarks.shapes import ADDED_NORMS, NORMS
from benchmarks.work import Work, bytes_of

FEW = 128  # rows that are checked


@pytest.mark.operation("layer_norm", cases=NORMS, directions=("forward", "backward"))
def test_layer_norm(case, contender, draw, check, measure):
    x, weight, bias = draw(case.rows, case.N), draw(case.N), draw(case.N)

    def norm(ops, *inputs):
        return ops.layer_norm(*inputs)

    check(norm, x[:FEW], weight, bias)
    size = bytes_of(x)
    work = Work("byte", "read x, write y; backward: read x and dy, write dx", 2 * size, 3 * size)
    measure(norm, x, weight, bias, work=work)


@pytest.mark.operation("add_layer_norm", cases=ADDED_NORMS, directions=("forward", "backward"))
def test_add_layer_norm(case, contender, draw, check, measure):
    x, residual, weight, bias = draw(case.rows, case.N), draw(case.rows, case.N), draw(case.N), draw(case.N)

    def norm(ops, *inputs, dropout_p=case.dropout_p):
        return ops.add_layer_norm(*inputs, dropout_p=dropout_p, seed=1)

    check(lambda ops, *xs: norm(ops, *xs, dropout_p=0.0), x[:FEW], residual[:FEW], weight, bias)
    size = bytes_of(x)
    work = Work(
        "byte",
        "read x and the residual, write y and the sum; backward: read the sum, dy and its gradient, write dx, and with "
        "dropout the residual's gradient",
        4 * size,
        (5 if case.dropout_p else 4) * size,
    )
    measure(norm, x, residual, weight, bias, work=work)
