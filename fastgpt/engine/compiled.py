"""The blocks of a model under torch.compile, for training alone.

Each block is one graph. Equal blocks share it, whatever their number: a post-LN stack has one, a pre-LN stack two, as
its first block has no branch to add, and one more where attention alternates. A graph serves every seed of dropout too,
because seeds are tensors. Embeddings, the loss and the optimizer stay as they are: they are a kernel each already.

A block's forward is replaced, not the block: names, parameters and hooks stay where they are, and hooks run outside
the graph. What is no step of training (validation, samples, a cache of keys and values) takes the plain forward, so
that no other shape is ever compiled.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from fastgpt.errors import UserError

BACKEND = "inductor"
REMEDY = "set engine.compile=false"


def compile_blocks(blocks: Iterable[nn.Module]) -> None:
    """Let these blocks run compiled, in place, from their first call in training on.

    A block is compiled whole or not at all: what cannot be is an error and no silent detour. Shapes must stay as they
    are; PyTorch keeps few graphs of one function (`torch._dynamo.config.recompile_limit`), counted over all models of
    a process.
    """
    for block in blocks:
        compiled = torch.compile(block.forward, dynamic=False, fullgraph=True, backend=BACKEND)
        block.forward = _in_training(block, compiled, block.forward)  # type: ignore[method-assign]


def _in_training(block: nn.Module, compiled: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    """The forward of a block: compiled where gradients of training will be asked for."""

    def forward(*arguments: Any, **options: Any) -> Any:
        if not (block.training and torch.is_grad_enabled()):
            return plain(*arguments, **options)
        try:
            return compiled(*arguments, **options)
        except Exception as problem:
            if reason := _compilers_reason(problem):
                raise UserError(f"engine.compile: the C++ compiler failed: {reason}. Mend it, or {REMEDY}") from problem
            if isinstance(problem, torch._dynamo.exc.Unsupported):
                plain(*arguments, **options)  # an operation that refuses its input says so in its own words
            raise

    return forward


def _compilers_reason(problem: BaseException) -> str | None:
    """What the C++ compiler said first, where an error is its."""
    from torch._inductor.exc import CppCompileError

    for cause in _causes(problem):
        if isinstance(cause, CppCompileError):
            said = [line.strip() for line in cause.output.splitlines() if line.strip()]
            return next((line for line in said if "error" in line), said[0] if said else "it gave no reason")
    return None


def _causes(problem: BaseException | None) -> Iterator[BaseException]:
    while problem is not None:
        yield problem
        problem = problem.__cause__ or problem.__context__
