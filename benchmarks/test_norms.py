"""Layer norm, alone and of a residual sum."""

import pytest
import torch

from benchmarks import masks
from benchmarks.shapes import ADDED_NORMS, NORMS
from benchmarks.work import Work, bytes_of, few_of


@pytest.mark.operation("layer_norm", cases=NORMS, directions=("forward", "backward"))
def test_layer_norm(case, contender, draw, check, measure):
    x, weight, bias = draw(case.rows, case.N), draw(case.N), draw(case.N)

    def norm(ops, *inputs):
        return ops.layer_norm(*inputs)

    check(norm, *few_of(x), weight, bias)
    size = bytes_of(x)
    work = Work("byte", "read x, write y; backward: read x and dy, write dx", 2 * size, 3 * size)
    measure(norm, x, weight, bias, work=work)


@pytest.mark.operation("add_layer_norm", cases=ADDED_NORMS, directions=("forward", "backward"))
def test_add_layer_norm(case, contender, draw, check, measure):
    x, residual, weight, bias = draw(case.rows, case.N), draw(case.rows, case.N), draw(case.N), draw(case.N)

    def norm(ops, *inputs, dropout_p=case.dropout_p):
        return ops.add_layer_norm(*inputs, dropout_p=dropout_p, seed=1)

    def dropout():
        # beside a residual of 0, the sum is 0 where x is dropped and nowhere else
        nonzero, nothing = torch.where(few[0] == 0, 1.0, few[0]), torch.zeros_like(few[1])
        masked = lambda ops, z, x, *others: ops.add_layer_norm(x * z.to(x.dtype), *others)  # noqa: E731
        call = lambda *xs: norm(contender, *xs)  # noqa: E731
        masks.assert_as_close(
            call,
            masked,
            lambda found: found[1] != 0,
            masks.rate_of(contender, case.dropout_p),
            nonzero,
            nothing,
            *few[2:],
        )

    few = *few_of(x, residual), weight, bias
    check(lambda ops, *xs: norm(ops, *xs, dropout_p=0.0), *few, also=dropout if case.dropout_p else None)
    size = bytes_of(x)
    work = Work(
        "byte",
        "read x and the residual, write y and the sum; backward: read the sum, dy and its gradient, write dx, and with "
        "dropout the residual's gradient",
        4 * size,
        (5 if case.dropout_p else 4) * size,
    )
    measure(norm, x, residual, weight, bias, work=work)
