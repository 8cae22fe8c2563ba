"""How high a parameter stands in the model: what is transferred, and how fast it learns, goes by it."""

import re
from collections.abc import Iterable

HEAD = "task_head"
_BLOCK = re.compile(r"blocks\.(\d+)\.")


def levels(names: Iterable[str]) -> dict[str, int]:
    """The level of each parameter of a model, by name.

    The embeddings stand at 0, block i (counting from 0) at i + 1, and the last normalisation, or the projection of an
    LSTM, with the last block, whose output it takes. The output layer of a task stands one above.
    """
    names = list(names)
    blocks = {name: int(found[1]) + 1 for name in names if (found := _BLOCK.match(name))}
    last = max(blocks.values(), default=0)
    above = {"final_norm": last, "projection": last, HEAD: last + 1}
    return {name: blocks.get(name, above.get(name.partition(".")[0], 0)) for name in names}


def number_of_levels(names: Iterable[str]) -> int:
    """How many levels a model has, its output layer's included."""
    return max(levels(names).values()) + 1
