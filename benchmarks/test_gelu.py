"""GELU alone, after a bias, and after the up-projection; and that projection alone."""

import pytest

from benchmarks.shapes import MLPS
from benchmarks.work import Work, bytes_of, few_of

FORMULA = "read x, write y; backward: read x and dy, write dx"


@pytest.mark.operation("gelu", cases=MLPS, directions=("forward", "backward"))
def test_gelu(case, contender, draw, check, measure):
    x = draw(case.rows, 4 * case.N)

    def gelu(ops, x):
        return ops.gelu(x)

    check(gelu, *few_of(x))
    measure(gelu, x, work=Work("byte", FORMULA, 2 * bytes_of(x), 3 * bytes_of(x)))


@pytest.mark.operation("bias_gelu", cases=MLPS, directions=("forward", "backward"))
def test_bias_gelu(case, contender, draw, check, measure):
    x, bias = draw(case.rows, 4 * case.N), draw(4 * case.N)

    def gelu(ops, x, bias):
        return ops.bias_gelu(x, bias)

    check(gelu, *few_of(x), bias)
    measure(gelu, x, bias, work=Work("byte", FORMULA, 2 * bytes_of(x), 3 * bytes_of(x)))


@pytest.mark.operation("linear", cases=MLPS, directions=("forward", "backward"))
def test_linear(case, contender, draw, check, measure):
    inputs, work = up_projection(case, draw)

    def linear(ops, *inputs):
        return ops.linear(*inputs)

    check(linear, *few_of(inputs[0]), *inputs[1:])
    measure(linear, *inputs, work=work)


@pytest.mark.operation("linear_gelu", cases=MLPS, directions=("forward", "backward"))
def test_linear_gelu(case, contender, draw, check, measure):
    inputs, work = up_projection(case, draw)

    def gelu(ops, *inputs):
        return ops.linear_gelu(*inputs)

    check(gelu, *few_of(inputs[0]), *inputs[1:])
    measure(gelu, *inputs, work=work)


def up_projection(case, draw):
    """x (rows, N), weight (4N, N) and bias (4N,), and what their product is."""
    rows, N = case.rows, case.N
    product = 2 * rows * N * 4 * N
    work = Work("FLOP", "2 rows N 4N; backward: twice that, for dx and dW", product, 2 * product)
    return (draw(rows, N), draw(4 * N, N) * N**-0.5, draw(4 * N)), work
