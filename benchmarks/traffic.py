"""What ranks send each other, counted where PyTorch hands tensors to the process group."""

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# by the operation's name: what it is, which of its arguments is the whole tensor, and how often a ring passes it on
COLLECTIVES = {
    "allreduce_": ("all-reduce", 0, 2),
    "allreduce_coalesced_": ("all-reduce", 0, 2),
    "allgather_": ("all-gather", 0, 1),
    "_allgather_base_": ("all-gather", 0, 1),
    "allgather_coalesced_": ("all-gather", 0, 1),
    "allgather_into_tensor_coalesced_": ("all-gather", 0, 1),
    "reduce_scatter_": ("reduce-scatter", 1, 1),
    "_reduce_scatter_base_": ("reduce-scatter", 1, 1),
    "reduce_scatter_tensor_coalesced_": ("reduce-scatter", 1, 1),
    "reduce_": ("reduce", 0, 1),
    "broadcast_": ("broadcast", 0, 1),
    "alltoall_": ("all-to-all", 1, 1),
    "alltoall_base_": ("all-to-all", 1, 1),
    "gather_": ("gather", 1, 1),
    "scatter_": ("scatter", 1, 1),
}


class Traffic(TorchDispatchMode):
    """Bytes that each of `ranks` sends, by collective: as the best algorithm does, a ring for one.

    Of a tensor of s bytes, passed on p times, each rank sends p s (ranks - 1) / ranks.
    """

    def __init__(self, ranks: int) -> None:
        super().__init__()
        self.calls: dict[str, int] = defaultdict(int)
        self.sizes: dict[str, int] = defaultdict(int)  # bytes passed on, over all calls
        self._ranks = ranks

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        namespace, name = function._schema.name.split("::")
        if namespace == "c10d" and name in COLLECTIVES:
            what, place, passes = COLLECTIVES[name]
            tensors = [leaf for leaf in tree_leaves(args[place]) if isinstance(leaf, Tensor)]
            self.calls[what] += 1
            self.sizes[what] += passes * sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        call: Callable[..., Any] = function
        return call(*args, **(kwargs or {}))

    @property
    def sent(self) -> dict[str, int]:
        """Bytes that each rank sends, by collective."""
        return {name: math.ceil(size * (self._ranks - 1) / self._ranks) for name, size in self.sizes.items()}
