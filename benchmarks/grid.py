"""Rows of cells, as columns of plain text and as Markdown."""

from collections.abc import Iterator, Sequence


def plain(lines: Sequence[Sequence[str]]) -> Iterator[str]:
    """Columns as wide as they must be, the first one to the left, the others to the right."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    for first, *others in lines:
        cells = (f"  {cell.rjust(width)}" for cell, width in zip(others, widths[1:], strict=True))
        yield first.ljust(widths[0]) + "".join(cells)


def markdown(lines: Sequence[Sequence[str]]) -> Iterator[str]:
    """A table whose first line is its head."""
    head, *rows = lines
    yield "| " + " | ".join(head) + " |"
    yield "|---" * len(head) + "|"
    yield from ("| " + " | ".join(row) + " |" for row in rows)
