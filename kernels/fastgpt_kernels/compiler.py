"""PyTorch's compiler stays unloaded until somebody compiles.

PyTorch hides the functions of custom operations, and some of its optimizers', from its compiler. For that it loads the
compiler at their first call, which takes as long as loading PyTorch itself. As long as it is not loaded nothing is
traced, and nothing has to be hidden.
"""

import inspect
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch

T = TypeVar("T")
COMPILER = "torch._dynamo"
Operation: Any = torch.library.CustomOpDef  # type: ignore[attr-defined]


def hidden_once_loaded(hidden: Callable[..., T]) -> Callable[..., T]:
    """What PyTorch hides from its compiler by loading it, not hidden as long as it is not loaded."""
    plain: Callable[..., T] = inspect.unwrap(hidden)

    def call(*arguments: Any, **named: Any) -> T:
        return (hidden if COMPILER in sys.modules else plain)(*arguments, **named)

    return call


def leave_unloaded() -> None:
    """Let the custom operations of this package, as far as their files are loaded, run without the compiler."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == __package__:
            for value in list(vars(module).values()):
                if isinstance(value, Operation):
                    _leave_unloaded(value)


def _leave_unloaded(operation: Any) -> None:
    # no public name leads to these; without them the compiler is loaded, as ever
    functions: dict[Any, Callable[..., Any]] = getattr(operation, "_backend_fns", {})
    for device, function in functions.items():
        if function.__module__ != __name__:
            functions[device] = hidden_once_loaded(function)
