"""Token plus position embedding."""

import pytest
import torch.nn.functional as F

from benchmarks import masks
from benchmarks.shapes import EMBEDDINGS, T_MAX
from benchmarks.work import Work, bytes_of


@pytest.mark.operation("embedding", cases=EMBEDDINGS, directions=("forward", "backward"))
def test_embedding(case, contender, draw, draw_integers, check, measure):
    token_table, position_table = draw(case.V, case.N), draw(T_MAX, case.N)
    tokens = draw_integers(case.V, case.B, case.T)

    def embed(ops, tokens, *tables, dropout_p=case.dropout_p):
        return ops.embedding(tokens, *tables, dropout_p=dropout_p, seed=1)

    def dropout():
        def masked(ops, z, tokens, table, positions):
            return (F.embedding(tokens, table) + positions[: tokens.shape[1]]) * z.to(table.dtype)

        # sums of positive rows are 0 where they are dropped and nowhere else
        positive = token_table.abs() + 0.1, position_table.abs() + 0.1
        call = lambda *xs: embed(contender, *xs)  # noqa: E731
        masks.assert_as_close(
            call, masked, lambda found: found[0] != 0, masks.rate_of(contender, case.dropout_p), few, *positive
        )

    few = tokens[: max(1, 2**22 // (case.T * case.N))]  # many times the tokens of which one program adds the gradients
    plain = lambda ops, *xs: embed(ops, *xs, dropout_p=0.0)  # noqa: E731
    check(plain, few, token_table, position_table, also=dropout if case.dropout_p else None)
    out = tokens.numel() * case.N * token_table.element_size()
    used = case.T * case.N * token_table.element_size()
    work = Work(
        "byte",
        "read a row for each token and the used positions, write the sum; backward: read the sum's gradient, write "
        "those of both tables",
        2 * out + used,
        out + bytes_of(token_table, position_table),
    )
    measure(embed, tokens, token_table, position_table, work=work)
