import importlib
from pathlib import Path
from typing import Any

import pytest

from fastgpt.config import Config
from fastgpt.deepspeed_keys import OWNED, leaves, owner
from fastgpt.engine.deepspeed_schema import Asked, check_further_keys
from fastgpt.engine.deepspeed_settings import deepspeed_settings
from fastgpt.settings import load_config

CONFIGS = Path(__file__).parents[2] / "configs"
OFFLOADS = [
    (stage, optimizer, parameters)
    for stage in (0, 1, 2, 3)
    for optimizer in ("none", "cpu", "nvme")
    for parameters in ("none", "cpu", "nvme")
    if (stage > 0 or optimizer == "none") and (stage == 3 or (parameters == "none" and optimizer != "nvme"))
]


def config(stage: int, *words: str, model: str = "gpt2-124m") -> Config:
    return load_config(CONFIGS / f"{model}.yaml", [f"engine.zero_stage={stage}", *words])


def offloading(stage: int, optimizer: str, parameters: str, **wanted: str) -> Config:
    words = [f"engine.offload_optimizer={optimizer}", f"engine.offload_parameters={parameters}"]
    if "nvme" in (optimizer, parameters):
        words.append("engine.nvme_folder=/fast")
    return config(stage, *words, **wanted)


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


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(("stage", "optimizer", "parameters"), OFFLOADS)
def test_deepspeed_knows_every_key_that_we_write(stage: int, optimizer: str, parameters: str, precision: str) -> None:
    """It passes over misspelt keys at the top in silence: each of ours is one that it asks for."""
    parse = pytest.importorskip("deepspeed.runtime.config").DeepSpeedConfig
    settings = deepspeed_settings(offloading(stage, optimizer, parameters), precision, 1)
    check_further_keys({}, settings, parse, lambda key: "ours")


@pytest.mark.parametrize(
    ("stage", "optimizer", "parameters", "written"),
    [
        (0, "none", "none", {}),
        (1, "cpu", "none", {"offload_optimizer": {"device": "cpu"}}),
        (2, "cpu", "none", {"offload_optimizer": {"device": "cpu"}}),
        (3, "none", "cpu", {"offload_param": {"device": "cpu"}}),
        (3, "cpu", "cpu", {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}),
        (
            3,
            "nvme",
            "nvme",
            {
                # an eighth of this rank's share of 124,439,808 parameters, or 1 MiB; the token table over 8 ranks
                "offload_optimizer": {"device": "nvme", "nvme_path": "/fast"},
                "sub_group_size": 1_944_372,
                "offload_param": {"device": "nvme", "nvme_path": "/fast", "buffer_size": 4_824_672},
            },
        ),
    ],
)
def test_what_is_offloaded_where(stage: int, optimizer: str, parameters: str, written: dict[str, Any]) -> None:
    zero = deepspeed_settings(offloading(stage, optimizer, parameters), "bf16", 8)["zero_optimization"]
    keys = ("offload_optimizer", "offload_param", "sub_group_size")
    assert {key: zero[key] for key in keys if key in zero} == written


def test_a_rank_swaps_in_its_own_folder() -> None:
    settings = deepspeed_settings(offloading(3, "nvme", "nvme"), "bf16", 2, nvme_folder="/fast/fastgpt-x")
    zero = settings["zero_optimization"]
    assert {zero[part]["nvme_path"] for part in ("offload_optimizer", "offload_param")} == {"/fast/fastgpt-x"}


def test_our_own_optimizer_updates_offloaded_state_too() -> None:
    settings = deepspeed_settings(offloading(2, "cpu", "none"), "bf16", 8)
    assert "optimizer" not in settings
    assert (settings["zero_allow_untested_optimizer"], settings["zero_force_ds_cpu_optimizer"]) == (True, False)


def test_further_keys_are_added_and_replace_what_is_no_setting_of_ours() -> None:
    words = ["zero_optimization.sub_group_size=5", "communication_data_type=bf16", "aio.block_size=3"]
    settings = deepspeed_settings(config(3, *(f"engine.deepspeed.{word}" for word in words)), "bf16", 8)
    assert settings["zero_optimization"]["sub_group_size"] == 5
    assert settings["zero_optimization"]["stage"] == 3
    assert settings["communication_data_type"] == "bf16"
    assert settings["aio"] == {"block_size": 3}
    plain = deepspeed_settings(config(3), "bf16", 8)
    assert (plain["communication_data_type"], "aio" in plain) == ("fp32", False)


def test_every_key_that_we_write_is_refused_to_the_user_or_is_free_to_tune() -> None:
    tunable = {
        "communication_data_type",
        "steps_per_print",
        "timers.throughput.enabled",
        "zero_optimization.reduce_scatter",
        "zero_optimization.stage3_prefetch_bucket_size",
        "zero_optimization.stage3_max_live_parameters",
        "zero_optimization.stage3_max_reuse_distance",
        "zero_optimization.sub_group_size",
        "zero_optimization.offload_param.buffer_size",
    }
    written = set()
    for case in OFFLOADS:
        written |= set(leaves(deepspeed_settings(offloading(*case), "bf16", 8)))
    assert {key for key in written if owner(key) is None} == tunable


def test_every_refused_key_is_one_that_deepspeed_has() -> None:
    """A name that DeepSpeed drops has no place in the list any more."""
    parse = pytest.importorskip("deepspeed.runtime.config").DeepSpeedConfig
    asked = Asked(deepspeed_settings(config(2), "bf16", 1))
    parse(asked)
    models = importlib.import_module("deepspeed.runtime.zero.config")
    zero = models.DeepSpeedZeroConfig
    names = {
        "zero_optimization": set(zero.model_fields),
        "zero_optimization.offload_optimizer": set(models.DeepSpeedZeroOffloadOptimizerConfig.model_fields),
        "zero_optimization.offload_param": set(models.DeepSpeedZeroOffloadParamConfig.model_fields),
        # asked for without a process group, or by the old name of another key
        "": asked.asked | {"sequence_parallel_size", "bfloat16"},
    }
    for key in OWNED:
        section, _, name = key.rpartition(".")
        assert name in names[section], key


def test_deepspeed_times_nothing_and_moves_gradients_as_they_come() -> None:
    """A timer would wait for the device before each forward pass."""
    timers = pytest.importorskip("deepspeed.utils.config")
    precision = pytest.importorskip("deepspeed.runtime.precision_config")
    settings = deepspeed_settings(config(1), "bf16", 1)
    assert timers.get_timers_config({}).enabled and not timers.get_timers_config(settings).enabled
    bf16 = precision.get_bfloat16_config(settings)
    assert bf16.enabled and bf16.immediate_grad_update


@pytest.mark.parametrize(("stage", "world_size", "shared"), [(1, 1, False), (2, 1, False), (2, 2, True), (3, 1, True)])
def test_one_rank_reduces_nothing(stage: int, world_size: int, shared: bool) -> None:
    zero = deepspeed_settings(config(stage), "bf16", world_size)["zero_optimization"]
    assert (zero["overlap_comm"], zero["reduce_scatter"]) == (shared, shared)
