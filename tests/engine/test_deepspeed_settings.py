from pathlib import Path

import pytest

from fastgpt.config import Config
from fastgpt.engine.deepspeed_settings import deepspeed_settings
from fastgpt.settings import load_config


def config(stage: int) -> Config:
    path = Path(__file__).parents[2] / "configs" / "gpt2-124m.yaml"
    return load_config(path, [f"engine.zero_stage={stage}"])


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_gradients_accumulate_and_reduce_in_fp32(stage: int, precision: str) -> None:
    settings = deepspeed_settings(config(stage), precision, world_size=8)
    assert settings["data_types"] == {"grad_accum_dtype": "fp32"}
    assert settings["communication_data_type"] == "fp32"


def test_the_batch_is_shared_among_the_ranks() -> None:
    settings = deepspeed_settings(config(1), "bf16", world_size=8)
    # 524,288 tokens are 512 sequences of 1024, 64 a rank, in micro-batches of 32
    assert settings["train_batch_size"] == 512
    assert settings["train_micro_batch_size_per_gpu"] == 32
    assert settings["gradient_accumulation_steps"] == 2


def test_the_engine_clips_where_deepspeed_would_not_tell_the_norm() -> None:
    assert deepspeed_settings(config(0), "fp32", 1)["gradient_clipping"] == 0.0
    assert deepspeed_settings(config(0), "bf16", 1)["gradient_clipping"] == 1.0
    assert deepspeed_settings(config(1), "fp32", 1)["gradient_clipping"] == 1.0


def test_deepspeed_takes_every_key() -> None:
    """DeepSpeed passes over misspelt keys at the top in silence, so each of ours is looked up in its own list."""
    constants = pytest.importorskip("deepspeed.runtime.constants")
    known = {v for v in vars(constants).values() if isinstance(v, str)}
    known |= {"zero_optimization", "data_types", "bf16", "timers"}
    assert set(deepspeed_settings(config(2), "bf16", 8)) <= known


def test_deepspeed_times_nothing_and_moves_gradients_as_they_come() -> None:
    """A timer would wait for the device before each forward pass."""
    timers = pytest.importorskip("deepspeed.utils.config")
    precision = pytest.importorskip("deepspeed.runtime.precision_config")
    settings = deepspeed_settings(config(1), "bf16", 1)
    assert timers.get_timers_config({}).enabled and not timers.get_timers_config(settings).enabled
    bf16 = precision.get_bfloat16_config(settings)
    assert bf16.enabled and bf16.immediate_grad_update


def test_a_bucket_is_no_larger_than_the_model() -> None:
    small = deepspeed_settings(config(2), "bf16", 8)["zero_optimization"]["reduce_bucket_size"]
    path = Path(__file__).parents[2] / "configs" / "gpt2-1558m.yaml"
    large = deepspeed_settings(load_config(path), "bf16", 8)["zero_optimization"]["reduce_bucket_size"]
    assert (small, large) == (124_439_808, 500_000_000)


@pytest.mark.parametrize(("stage", "world_size", "shared"), [(1, 1, False), (2, 1, False), (2, 2, True), (3, 1, True)])
def test_one_rank_reduces_nothing(stage: int, world_size: int, shared: bool) -> None:
    zero = deepspeed_settings(config(stage), "bf16", world_size)["zero_optimization"]
    assert (zero["overlap_comm"], zero["reduce_scatter"]) == (shared, shared)
