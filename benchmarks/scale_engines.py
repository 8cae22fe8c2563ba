"""The engines that are measured beside each other, as settings."""

from typing import Any

from fastgpt.config import Config

ENGINES: dict[str, dict[str, Any]] = {
    "single": {"kind": "single"},
    "single-no-graph": {"kind": "single", "cuda_graph": False},
    **{f"zero{stage}": {"kind": "deepspeed", "zero_stage": stage} for stage in range(4)},
}


def with_engine(config: Config, engine: str, precision: str | None = None) -> Config:
    """The settings with one of the engines, and perhaps with what `engine.precision: auto` came to."""
    tree = config.model_dump()
    tree["engine"] |= ENGINES[engine] | ({"precision": precision} if precision else {})
    return Config.model_validate(tree)
