"""Logits, their cross-entropy, and the two in one.

Contenders divide their work differently between forward and backward: only both together compare.
"""

import pytest
import torch

from benchmarks.contenders import OURS
from benchmarks.shapes import LINEAR_LOSSES, LOGITS, LOSSES
from benchmarks.timing import incoming
from benchmarks.work import Work, bytes_of

FEW = 128  # rows that are checked


@pytest.mark.operation("cross_entropy", cases=LOSSES, directions=("both",))
def test_cross_entropy(case, contender, contender_name, draw, draw_integers, check, measure):
    logits, targets = draw(case.rows, case.V), draw_integers(case.V, case.rows)
    kept = logits.clone()
    # as in training, where it is loss scale / micro-batches; the others have no use for it
    known = {"expected_gradient": incoming(logits.new_empty((), dtype=torch.float32))} if contender_name in OURS else {}

    def loss(ops, logits, targets, **options):
        return ops.cross_entropy(logits, targets, consume=True, **options)

    # each call has logits of its own to consume; the check brings another gradient than the one that is timed
    check(lambda ops, logits, targets: loss(ops, logits * 1.0, targets), logits[:FEW], targets[:FEW])
    size = bytes_of(logits)
    work = Work("byte", "read each logit once, and write its gradient once", size, size)
    timed = lambda ops, *inputs: loss(ops, *inputs, **known)  # noqa: E731
    measure(timed, logits, targets, work=work, refill=lambda: restore(logits, kept))


def restore(logits, kept):
    logits.copy_(kept)


@pytest.mark.operation("logits", cases=LOGITS, directions=("both",))
def test_logits_and_their_loss(case, contender, contender_name, draw, draw_integers, check, measure):
    x, weight = draw(case.rows, case.N), draw(case.V, case.N) * case.N**-0.5
    targets = draw_integers(case.V, case.rows)
    known = {"expected_gradient": incoming(x.new_empty((), dtype=torch.float32))} if contender_name in OURS else {}

    def loss(ops, x, weight, targets, **options):
        return ops.cross_entropy(ops.logits(x, weight), targets, consume=True, **options)

    check(loss, x[:FEW], weight, targets[:FEW])
    product = 2 * case.rows * case.N * case.V
    work = Work("FLOP", "2 rows N V; backward: twice that; the loss does not count", product, 2 * product)
    measure(lambda ops, *inputs: loss(ops, *inputs, **known), x, weight, targets, work=work)


@pytest.mark.operation("linear_cross_entropy", cases=LINEAR_LOSSES, directions=("both",))
def test_linear_cross_entropy(case, contender, draw, draw_integers, check, measure):
    x, weight = draw(case.rows, case.N), draw(case.V, case.N) * case.N**-0.5
    targets = draw_integers(case.V, case.rows)

    def loss(ops, *inputs):
        return ops.linear_cross_entropy(*inputs)

    check(loss, x[:FEW], weight, targets[:FEW])
    product = 2 * case.rows * case.N * case.V
    formula = "2 rows N V; backward: twice that; logits made a second time do not count"
    work = Work("FLOP", formula, product, 2 * product)
    measure(loss, x, weight, targets, work=work)
