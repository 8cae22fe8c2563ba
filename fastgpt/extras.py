"""Packages that only some uses need: they are installed by an extra, and asked for where they are used."""

import importlib
from typing import Any

from fastgpt.errors import UserError


def import_extra(module: str, *, extra: str, purpose: str) -> Any:
    """A module of a package that `pip install 'fastgpt[extra]'` installs.

    Raises UserError, naming the extra, where the package is missing; what the package itself fails with is told too.
    """
    try:
        return importlib.import_module(module)
    except ImportError as problem:
        raise UserError(
            f"{purpose} needs {module.partition('.')[0]}, which cannot be imported ({problem}): "
            f"pip install 'fastgpt[{extra}]'"
        ) from None
