"""Run by torchrun, or alone: trains a small model by each scenario of a JSON list and writes down what happened.

usage: ranks_program.py SCENARIOS RESULTS
A scenario: {"name", "kind", "stage", "precision", "steps", "overrides"?, "sharded"?, "compiler"?, "read"?, "copy"?,
"write"?}; "copy" is where the state that was read is written at once.
"sharded" makes ZeRO-3 keep no parameter gathered; it would keep every one of so small a model. "compiler" names another
backend of torch.compile than the usual.
"""

import hashlib
import importlib
import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from fastgpt_kernels import load_ops
from states import differing, put, state_in
from torch._dynamo.utils import counters as COUNTERS

from fastgpt.config import Config
from fastgpt.data.source import RandomSource
from fastgpt.engine.base import Engine, evaluation_loss
from fastgpt.engine.deepspeed_settings import deepspeed_settings
from fastgpt.engine.prepare import prepare
from fastgpt.engine.ranks import Ranks, join, leave
from fastgpt.launchers import ALONE, find_launch
from fastgpt.model.build import new_model
from fastgpt.ramp import micro_batches

LOSS = importlib.import_module("fastgpt_kernels.torch_ops.cross_entropy")
VOCABULARY, CONTEXT, MICRO_BATCH, MICRO_BATCHES = 101, 16, 2, 4


def settings(scenario: dict[str, Any]) -> Config:
    overrides = scenario.get("overrides", {})
    tree: dict[str, Any] = {
        "out": "unused",
        "model": {
            "n_layer": 2,
            "n_head": 2,
            "n_embd": 32,
            "context": CONTEXT,
            "vocab_size": VOCABULARY,
            "dropout": 0.1,
        },
        "data": {"path": "unused"},
        "train": {
            "steps": 20,
            "batch_tokens": CONTEXT * MICRO_BATCH * MICRO_BATCHES,
            "micro_batch_size": MICRO_BATCH,
            "lr": 1e-2,
            "warmup_steps": 2,
            "clip": 0.5,  # below the norms seen, so that clipping takes part
        },
        "engine": {"zero_stage": scenario["stage"]},
    }
    for key, value in overrides.items():
        section, name = key.split(".")
        tree[section][name] = value
    return Config.model_validate(tree)


def fingerprints(engine: Engine) -> dict[str, str] | None:
    """A digest of every working weight, on rank 0."""
    weights = engine.model_state()
    if weights is None:
        return None
    return {
        name: hashlib.sha256(w.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, w in weights.items()
    }


def sharded_settings(config: Config, precision: str, world_size: int, **more: Any) -> dict[str, Any]:
    ours = deepspeed_settings(config, precision, world_size, **more)
    return ours | {"zero_optimization": ours["zero_optimization"] | {"stage3_param_persistence_threshold": 0}}


def run(scenario: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
    config = settings(scenario)
    chosen = sharded_settings if scenario.get("sharded") else deepspeed_settings
    torch.compiler.reset()
    COUNTERS.clear()
    compiler = mock.patch("fastgpt.engine.compiled.BACKEND", scenario.get("compiler", "inductor"))
    with mock.patch("fastgpt.engine.zero.deepspeed_settings", chosen), compiler:
        engine = prepare(
            lambda: new_model(config.model, load_ops("torch")),
            config,
            kind=scenario["kind"],
            precision=scenario["precision"],
            device=torch.device("cpu"),
            ranks=ranks,
        )
    probe = torch.arange(2 * CONTEXT).reshape(2, CONTEXT)
    if scenario.get("read"):
        engine.read(Path(scenario["read"]))
    changed = None
    if scenario.get("copy"):
        put(engine, Path(scenario["copy"]), ranks)
        shapes = {name: tuple(p.shape) for name, p in new_model(config.model, load_ops("torch")).named_parameters()}
        changed = differing(*(state_in(Path(scenario[key]), shapes) for key in ("read", "copy")))
    first = evaluation_loss(engine, probe, probe)
    start = fingerprints(engine)
    before = engine.last_logits(probe[:, :7])
    source = RandomSource(
        VOCABULARY, CONTEXT, MICRO_BATCH, micro_batches(config), 7, ranks.rank, ranks.world_size
    ).batches(engine.step)
    updates = []
    with mock.patch.object(LOSS, "rescale_gradient", wraps=LOSS.rescale_gradient) as backward:
        while engine.step < scenario["steps"]:
            updates.append(engine.update(next(source)).update._asdict())
    arguments = [call.args for call in backward.mock_calls]
    gradients = [(dresult.item(), expected.item()) for _, _, dresult, expected, _ in arguments]
    if scenario.get("write"):
        put(engine, Path(scenario["write"]), ranks)
    weights = engine.model_state()
    after, continued = (engine.last_logits(probe[:, :length]) for length in (7, 8))
    # another text, whose longer part comes first: nothing of the calls before can be continued
    longer, shorter = (engine.last_logits(probe[:, :length].flip(0)).flip(0) for length in (8, 7))
    return {
        "changed": changed,
        "start": start,
        "updates": updates,
        "micro_batches": [micro_batches(config).of(update["step"]) for update in updates],
        "loss_gradients": gradients,
        "first_forward": first,
        "last_forward": evaluation_loss(engine, probe, probe),
        "sampling_moved": (after - before).abs().max().item(),
        "sampling_errors": [(a - b).abs().max().item() for a, b in ((after, shorter), (continued, longer))],
        "end": fingerprints(engine),
        "graphs": COUNTERS["stats"]["unique_graphs"],
        "kept_gathered": sum(getattr(p, "ds_persist", False) for p in engine._weights.values()),
        "dtype": str(next(iter(weights.values())).dtype) if weights else None,
    }


def main() -> None:
    torch.set_num_threads(1)
    ranks = join(find_launch() or ALONE, torch.device("cpu"), 5)
    scenarios = json.loads(Path(sys.argv[1]).read_text())
    results = {s["name"]: run(s, ranks) for s in scenarios}
    if ranks.rank == 0:
        Path(sys.argv[2]).write_text(json.dumps(results))
    leave()


if __name__ == "__main__":
    main()
