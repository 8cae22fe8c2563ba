"""Where the kernels of these tests run: Triton's interpreter without a GPU, the GPU itself with one."""

import contextlib
import dataclasses
import functools
import inspect
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

# before any kernel is defined: a process either interprets or compiles
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import triton.language as tl
from fastgpt_kernels import Ops, load_ops
from triton.runtime import interpreter


@pytest.fixture
def triton_ops(device: str) -> Ops:
    """The Triton backend, interpreted or on the GPU."""
    return load_ops("triton")


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan() -> Iterator[None]:
    """An output that a kernel forgets to write shows as NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session", autouse=True)
def the_interpreter_wastes_no_time() -> Iterator[None]:
    """These tests take a third of the time that they would; what they find is the same.

    At every call of one kernel function by another, Triton's interpreter replaces the functions of `tl`, by the same
    ones. And it computes whether integers overflow and never looks at the answer, where the compilers do so on demand.
    In a version of Triton that has other names for these, its own way is left alone.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    replaced: set[int] = set()  # the modules whose functions are those of this launch
    with pytest.MonkeyPatch.context() as patch:
        with contextlib.suppress(AttributeError, TypeError):
            builder = interpreter.interpreter_builder
            options = dataclasses.replace(builder.options, sanitize_overflow=False)
            patch.setattr(builder, "options", options)
        with contextlib.suppress(AttributeError):
            replace, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__

            def launch_anew(executor: Any, *args: Any, **kwargs: Any) -> Any:
                replaced.clear()
                return launch(executor, *args, **kwargs)

            def replace_once(function: Any) -> Any:
                modules = _language_modules(function)
                if replaced and modules <= replaced:
                    return None
                replaced.update(modules)
                return replace(function)

            patch.setattr(interpreter, "_patch_lang", replace_once)
            patch.setattr(interpreter.GridExecutor, "__call__", launch_anew)
        yield


@functools.cache
def _language_modules(function: Any) -> frozenset[int]:
    values = function.__globals__.values()
    return frozenset(id(x) for x in values if inspect.ismodule(x) and x in (tl, tl.core))
