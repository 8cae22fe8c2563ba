"""fastgpt: from raw text to a trained GPT."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastgpt.load import load_model
    from fastgpt.model import build_model
    from fastgpt.settings import load_config

    __version__: str

__all__ = ["__version__", "build_model", "load_config", "load_model"]

# imported at first use, so that `import fastgpt` brings no PyTorch
_HOMES = {"build_model": "fastgpt.model", "load_config": "fastgpt.settings", "load_model": "fastgpt.load"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name == "__version__":
        from importlib.metadata import version

        return version("fastgpt")
    raise AttributeError(f"module 'fastgpt' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
