"""Keys of DeepSpeed's configuration that are not a user's to set by `engine.deepspeed`, and what to use instead.

Some say again what a setting of ours says; others would change what is computed, or where the training state lies,
behind the back of the engine, whose updates and checkpoints are the same at every stage.
"""

from collections.abc import Iterator, Mapping
from typing import Any

_OPTIMIZER = "the optimizer is ours: train.optimizer, lr, weight_decay, beta1, beta2 and eps"
_FP32 = "gradients are added up in fp32 at stages 1 to 3, masters and moments are fp32"
_STATE = "checkpoints would not find the training state where it leaves it"
_PARALLEL = "ranks share the batch and the model's state only, see docs/scale-out.md"
_QUANTISED = "neither weights nor gradients are quantised"
_AVERAGE = "gradients are averaged over all ranks and micro-batches"

# a key and all that is under it -> what the refusal says of it
OWNED = {
    "train_batch_size": "use train.batch_tokens",
    "train_micro_batch_size_per_gpu": "use train.micro_batch_size",
    "gradient_accumulation_steps": "it follows from train.batch_tokens, train.micro_batch_size and the ranks",
    "managed_gradient_accumulation": "it follows from train.batch_tokens, train.micro_batch_size and the ranks",
    "gradient_clipping": "use train.clip",
    "bf16": "use engine.precision",
    "bfloat16": "use engine.precision",
    "fp16": "use engine.precision; the loss scale starts and moves as in the single engine",
    "torch_autocast": "use engine.precision",
    "data_types": _FP32,
    "zero_optimization.stage": "use engine.zero_stage",
    "zero_optimization.overlap_comm": "use engine.overlap_comm",
    "zero_optimization.reduce_bucket_size": "use engine.reduce_bucket_size",
    "zero_optimization.offload_optimizer.device": "use engine.offload_optimizer",
    "zero_optimization.offload_optimizer.nvme_path": "use engine.nvme_folder",
    "zero_optimization.offload_optimizer.ratio": _STATE,
    "zero_optimization.offload_optimizer.super_offload": _STATE,
    "zero_optimization.offload_optimizer.pipeline_read": _STATE,
    "zero_optimization.offload_optimizer.pipeline_write": _STATE,
    "zero_optimization.offload_param.device": "use engine.offload_parameters",
    "zero_optimization.offload_param.nvme_path": "use engine.nvme_folder",
    "zero_optimization.cpu_offload": "use engine.offload_optimizer",
    "zero_optimization.cpu_offload_param": "use engine.offload_parameters",
    "zero_optimization.cpu_offload_use_pin_memory": "use zero_optimization.offload_optimizer.pin_memory",
    "zero_optimization.zenflow": _STATE,
    "zero_optimization.zero_hpz_partition_size": _STATE,
    "zero_optimization.zero_quantized_weights": _QUANTISED,
    "zero_optimization.zero_quantized_nontrainable_weights": _QUANTISED,
    "zero_optimization.zero_quantized_gradients": _QUANTISED,
    "zero_optimization.compute_grad_norm": "every update records the norm of its gradients",
    "zero_optimization.legacy_stage1": "use engine.zero_stage",
    "zero_optimization.parameter_alignment": _STATE,
    "zero_optimization.elastic_checkpoint": "checkpoints are read on any number of ranks as they are",
    "zero_optimization.load_from_fp32_weights": "checkpoints are ours, and fp32",
    "zero_optimization.leaf_module": "use engine.compile, which makes each block one",
    "zero_allow_untested_optimizer": _OPTIMIZER,
    "zero_force_ds_cpu_optimizer": _OPTIMIZER,
    "optimizer": _OPTIMIZER,
    "scheduler": "use train.schedule, warmup_steps, decay_steps and min_lr",
    "prescale_gradients": _AVERAGE,
    "gradient_predivide_factor": _AVERAGE,
    "gradient_allreduce_op": _AVERAGE,
    "activation_checkpointing": "use train.activation_checkpointing",
    "compile": "use engine.compile",
    "checkpoint": "use train.save_every and train.keep",
    "data_efficiency": "use data.path and the settings beside it",
    "dataloader_drop_last": "use data.path and the settings beside it",
    "pipeline": _PARALLEL,
    "tensor_parallel": _PARALLEL,
    "expert_parallel": _PARALLEL,
    "sequence_parallel_size": _PARALLEL,
    "hybrid_engine": "it is for reinforcement learning",
    "weight_quantization": _QUANTISED,
    "autotuning": "use fastgpt plan",
}


def leaves(keys: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """The dotted names of all values of a nested configuration; that of an empty section is its own."""
    for key, value in keys.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def owner(key: str) -> str | None:
    """What to use instead of a dotted key of DeepSpeed's; None for one that a user may set."""
    parts = key.split(".")
    known = (OWNED.get(".".join(parts[:length])) for length in range(1, len(parts) + 1))
    return next((advice for advice in known if advice), None)
