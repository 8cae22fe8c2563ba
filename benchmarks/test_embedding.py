"""Token plus position embedding."""

import pytest

from benchmarks.shapes import EMBEDDINGS, T_MAX
from benchmarks.work import Work, bytes_of


@pytest.mark.operation("embedding", cases=EMBEDDINGS, directions=("forward", "backward"))
def test_embedding(case, contender, draw, draw_integers, check, measure):
    token_table, position_table = draw(case.V, case.N), draw(T_MAX, case.N)
    tokens = draw_integers(case.V, case.B, case.T)

    def embed(ops, tokens, *tables, dropout_p=case.dropout_p):
        return ops.embedding(tokens, *tables, dropout_p=dropout_p, seed=1)

    check(lambda ops, *xs: embed(ops, *xs, dropout_p=0.0), tokens[:2, :128], token_table, position_table)
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
