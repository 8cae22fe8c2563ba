"""Our settings as DeepSpeed's: a pure function, so that it can be read, tested and printed without DeepSpeed."""

from typing import Any

from fastgpt.config import Config
from fastgpt.engine.precision import LossScale
from fastgpt.sizes import parameter_count


def deepspeed_settings(config: Config, precision: str, world_size: int) -> dict[str, Any]:
    """The dictionary for `deepspeed.initialize`.

    Gradients accumulate and reduce in fp32 at stages 1 to 3, as in the single engine. DeepSpeed's stage 0 has no fp32
    accumulation under bf16 and fp16, and refuses the key; the engine says so in the log.
    """
    stage, low = config.engine.zero_stage, precision != "fp32"
    # one rank has nothing to reduce: no second stream to wait for, no parts of gradients to copy to their owners
    shared = world_size > 1 or stage == 3
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
        "zero_optimization": {
            "stage": stage,
            "overlap_comm": config.engine.overlap_comm and shared,
            "reduce_scatter": shared,
            # DeepSpeed makes the whole bucket, however small the model
            "reduce_bucket_size": min(config.engine.reduce_bucket_size, parameter_count(config.model)),
            "allgather_bucket_size": config.engine.reduce_bucket_size,
        },
        "zero_allow_untested_optimizer": True,
        "steps_per_print": None,
        # it would wait for the device before every forward pass
        "timers": {"throughput": {"enabled": False}},
    }
    if stage > 0 or not low:
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
        settings["communication_data_type"] = "fp32"
    return settings
