"""Our settings as DeepSpeed's: a pure function, so that it can be read, tested and printed without DeepSpeed."""

from collections.abc import Mapping
from typing import Any

from fastgpt import buckets
from fastgpt.config import Config
from fastgpt.engine.precision import LossScale


def deepspeed_settings(
    config: Config, precision: str, world_size: int, *, nvme_folder: str | None = None
) -> dict[str, Any]:
    """The dictionary for `deepspeed.initialize`: `our_settings`, and what `engine.deepspeed` adds to it or replaces."""
    ours = our_settings(config, precision, world_size, nvme_folder=nvme_folder)
    return with_further_keys(ours, config.engine.deepspeed)


def our_settings(config: Config, precision: str, world_size: int, *, nvme_folder: str | None = None) -> dict[str, Any]:
    """What follows from our own settings.

    Gradients accumulate and reduce in fp32 at stages 1 to 3, as in the single engine. DeepSpeed's stage 0 has no fp32
    accumulation under bf16 and fp16, and refuses the key; the engine says so in the log.

    Args:
        config: the run's settings.
        precision: fp32, bf16 or fp16.
        world_size: the number of ranks.
        nvme_folder: this rank's own, in the place of `engine.nvme_folder`.
    """
    stage, low = config.engine.zero_stage, precision != "fp32"
    initial = LossScale()
    settings: dict[str, Any] = {
        "train_batch_size": config.micro_batches * config.train.micro_batch_size,
        "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
        "gradient_accumulation_steps": config.micro_batches // world_size,
        # at stage 0 in fp32 DeepSpeed clips without telling the norm: there the engine clips
        "gradient_clipping": 0.0 if stage == 0 and not low else config.train.clip or 0.0,
        # stage 1: gradients go into their fp32 sums as they come, and none is left over to be cleared
        "bf16": {"enabled": precision == "bf16", "immediate_grad_update": True},
        "fp16": {
            "enabled": precision == "fp16",
            "loss_scale": 0,
            "initial_scale_power": int(initial.scale).bit_length() - 1,
            "loss_scale_window": initial.window,
            "hysteresis": 1,
            "min_loss_scale": initial.smallest,
        },
        "zero_optimization": _zero(config, world_size, nvme_folder or config.engine.nvme_folder),
        "zero_allow_untested_optimizer": True,
        # where the optimizer's state is offloaded DeepSpeed would have its own Adam, and no other
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
        # it would wait for the device before every forward pass
        "timers": {"throughput": {"enabled": False}},
    }
    if stage > 0 or not low:
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
        settings["communication_data_type"] = "fp32"
    return settings


def with_further_keys(settings: Mapping[str, Any], further: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings with further ones, which replace those of the same name."""
    merged = dict(settings)
    for key, value in further.items():
        section = merged.get(key)
        both = isinstance(section, Mapping) and isinstance(value, Mapping)
        merged[key] = with_further_keys(section, value) if both else value  # type: ignore[arg-type]
    return merged


def _zero(config: Config, world_size: int, nvme_folder: str | None) -> dict[str, Any]:
    """The part about ZeRO."""
    engine, model = config.engine, config.model
    stage = engine.zero_stage
    # one rank has nothing to reduce: no second stream to wait for, no parts of gradients to copy to their owners
    shared = world_size > 1 or stage == 3
    zero: dict[str, Any] = {
        "stage": stage,
        "overlap_comm": engine.overlap_comm and shared,
        "reduce_scatter": shared,
        "reduce_bucket_size": buckets.reduced(config),
    }
    if stage == 3:
        zero |= {
            # a compiled block gathers all of its weights itself: what DeepSpeed 0.19 had gathered ahead of the next one
            # would still be on its way when the weights are read
            "stage3_prefetch_bucket_size": 0 if engine.compile else buckets.prefetched(model),
            "stage3_max_live_parameters": buckets.live(model),
            "stage3_max_reuse_distance": buckets.kept_for_reuse(model),
        }
    if engine.offload_optimizer != "none":
        zero["offload_optimizer"] = {"device": engine.offload_optimizer}
    if engine.offload_parameters != "none":
        zero["offload_param"] = {"device": engine.offload_parameters}
    if engine.offload_optimizer == "nvme":
        zero["offload_optimizer"]["nvme_path"] = nvme_folder
        zero["sub_group_size"] = buckets.swapped(model, world_size)
    if engine.offload_parameters == "nvme":
        zero["offload_param"] |= {
            "nvme_path": nvme_folder,
            "buffer_size": buckets.swapped_weight(model, world_size),
            "buffer_count": buckets.SWAPPED_WEIGHTS,
        }
        # DeepSpeed 0.19 reads a weight ahead twice where it is used twice, as the token table is, and stops there
        zero["stage3_prefetch_bucket_size"] = 0
    return zero
