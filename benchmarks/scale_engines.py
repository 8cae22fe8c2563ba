"""The engines that are measured beside each other, as settings."""

from typing import Any

from fastgpt.config import Config

# one process offloads nothing: it is what those that do are compared with
SINGLE = {"kind": "single", "offload_optimizer": "none", "offload_parameters": "none", "nvme_folder": None}
ENGINES: dict[str, dict[str, Any]] = {
    "single": SINGLE,
    "single-no-graph": {**SINGLE, "cuda_graph": False},
    **{f"zero{stage}": {"kind": "deepspeed", "zero_stage": stage} for stage in range(4)},
}


def with_engine(config: Config, engine: str, precision: str | None = None) -> Config:
    """The settings with one of the engines, and perhaps with what `engine.precision: auto` came to.

    Raises:
        pydantic.ValidationError: the engine cannot do what the settings ask for, as offload at ZeRO's stage 0.
    """
    tree = config.model_dump()
    tree["engine"] |= ENGINES[engine] | ({"precision": precision} if precision else {})
    return Config.model_validate(tree)
