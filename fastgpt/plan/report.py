"""A plan for people, and as JSON."""

from typing import Any

from fastgpt.plan.planner import Plan
from fastgpt.plan.speed import collectives


def as_json(plan: Plan) -> dict[str, Any]:
    """Everything of a plan: bytes, seconds, US dollars."""
    expected = plan.speeds["expected"]
    return {
        "gpu": plan.request.gpu.lower(),
        "gpus": plan.layout.gpus,
        "parameters": plan.parameters,
        "precision": plan.layout.precision,
        "per_gpu_bytes": plan.memory._asdict() | {"total": plan.memory.total},
        "gpu_memory_bytes": plan.gpu.memory,
        "host_bytes_per_gpu": plan.host_bytes,
        "activations_bytes": {
            "with_checkpointing": plan.with_checkpointing.activations,
            "without_checkpointing": plan.without_checkpointing.activations,
        },
        "fits": plan.fits,
        "micro_batch_size": plan.layout.micro_batch_size,
        "gradient_accumulation_steps": plan.layout.accumulation,
        "batch_tokens": plan.batch_tokens,
        "activation_checkpointing": plan.layout.checkpointing,
        "zero_stage": plan.layout.zero_stage,
        "offload": plan.layout.offload.kinds,
        "tokens_per_second": {name: speed.tokens_per_second for name, speed in plan.speeds.items()},
        "mfu": expected.mfu,
        "step_seconds": expected.step_seconds,
        "seconds_of_parts": expected.parts,
        "communication_bytes_per_step": plan.communication_bytes,
        "communication_seconds_per_step": expected.parts["communication"],
        "interconnect": {
            "gpus_per_node": plan.interconnect.per_node,
            "link_bytes_per_second": plan.interconnect.link,
            "network_bytes_per_second": plan.interconnect.network,
        },
        "checkpoint_bytes": plan.checkpoint_bytes,
        "checkpoint_seconds": plan.checkpoint_seconds,
        "tokens": plan.tokens,
        "tokens_per_parameter": plan.tokens / plan.parameters,
        "hours": plan.hours(),
        "cost": plan.cost(),
        "notes": plan.notes,
    }


def as_text(plan: Plan) -> str:
    """The same as a page of text."""
    config, layout, gpu, expected = plan.config, plan.layout, plan.gpu, plan.speeds["expected"]
    every = f"every {config.train.save_every:,} updates" if config.train.save_every else "at the end only"
    engine = f"ZeRO stage {layout.zero_stage}, offload {layout.offload.kinds}" if layout.deepspeed else "one process"
    price = gpu.hourly if plan.request.price is None else plan.request.price
    lines = [
        f"{plan.parameters:,} parameters in {layout.precision} on {layout.gpus:,} x {plan.request.gpu.lower()}"
        f" ({gpu.memory / 1e9:.0f} GB, {gpu.peak / 1e12:.0f} TFLOP/s)",
        *(f"note: {note}" for note in plan.notes),
        "",
        f"layout     {engine}, activation checkpointing {'on' if layout.checkpointing else 'off'}",
        f"batch      {plan.batch_tokens:,} tokens = {layout.gpus:,} GPUs x {layout.accumulation:,} micro-batches x "
        f"{layout.micro_batch_size:,} sequences x {config.model.context:,} tokens",
        f"settings   train.micro_batch_size={layout.micro_batch_size} train.batch_tokens={plan.batch_tokens} "
        f"train.activation_checkpointing={str(layout.checkpointing).lower()} engine.zero_stage={layout.zero_stage}"
        f"{_offload(plan)}",
        "",
        "memory of a GPU, in GB:",
        *(f"  {name:<12}{size / 1e9:10.2f}" for name, size in plan.memory._asdict().items()),
        f"  {'total':<12}{plan.memory.total / 1e9:10.2f}  {'fits' if plan.fits else 'does not fit'}",
        f"  activations{plan.without_checkpointing.activations / 1e9:11.2f}  without checkpointing",
        f"  activations{plan.with_checkpointing.activations / 1e9:11.2f}  with checkpointing",
        *(
            [f"  host{plan.host_bytes / 1e9:18.2f}  in the host's memory for each GPU, for what is offloaded"]
            if plan.host_bytes
            else []
        ),
        "",
        "speed, over all GPUs:        low    expected        high",
        "  tokens/s         " + "".join(f"{s.tokens_per_second:12,.0f}" for s in plan.speeds.values()),
        "  ms an update     " + "".join(f"{s.step_seconds * 1e3:12,.1f}" for s in plan.speeds.values()),
        "  MFU              " + "".join(f"{s.mfu:12.1%}" for s in plan.speeds.values()),
        f"  hours            {_range(plan, plan.hours)}  for {plan.tokens / 1e9:,.1f}B tokens"
        f" ({plan.tokens / plan.parameters:,.1f} a parameter)",
        f"  cost             {_range(plan, plan.cost)}  US dollars at {price:g} a GPU-hour",
        "",
        "an update, expected, in ms: "
        + ", ".join(f"{name} {seconds * 1e3:,.1f}" for name, seconds in expected.parts.items() if seconds),
        f"interconnect: {plan.interconnect.link / 1e9:g} GB/s within a node of {plan.interconnect.per_node}, "
        f"{plan.interconnect.network / 1e9:g} GB/s from each GPU to other nodes",
        *(
            f"  {c.name}: {c.volume(layout.gpus) / 1e9:,.2f} GB from each GPU an update"
            for c in collectives(config, layout)
        ),
        f"checkpoint: {plan.checkpoint_bytes / 1e9:,.1f} GB, {plan.checkpoint_seconds:,.0f} s at "
        f"{plan.request.disk / 1e9:g} GB/s a node, {every}",
    ]
    return "\n".join(lines)


def _offload(plan: Plan) -> str:
    """The settings of what is offloaded, where anything is or was asked for."""
    offload, engine = plan.layout.offload, plan.config.engine
    if offload.kinds == "none" and not engine.offloads:
        return ""
    folder = ""
    if ("nvme" in offload) != (engine.nvme_folder is not None):
        folder = f" engine.nvme_folder={'FOLDER' if 'nvme' in offload else 'null'}"
    return f" engine.offload_optimizer={offload.optimizer} engine.offload_parameters={offload.parameters}{folder}"


def _range(plan: Plan, of: Any) -> str:
    return "".join(f"{of(case):12,.1f}" for case in plan.speeds)
