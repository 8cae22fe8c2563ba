"""Run by torchrun, or alone: trains a small model by each scenario of a JSON list and writes down what happened.

usage: ranks_program.py SCENARIOS RESULTS
A scenario: {"name", "kind", "stage", "precision", "steps", "overrides"?, "read"?, "write"?}
"""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from fastgpt_kernels import load_ops

from fastgpt.config import Config
from fastgpt.data.source import RandomSource
from fastgpt.engine.base import Engine
from fastgpt.engine.prepare import prepare
from fastgpt.engine.ranks import Ranks, join, leave
from fastgpt.launch import Launch
from fastgpt.model.gpt import GPT

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


def run(scenario: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
    config = settings(scenario)
    engine = prepare(
        lambda: GPT(config.model, load_ops("torch")),
        config,
        kind=scenario["kind"],
        precision=scenario["precision"],
        device=torch.device("cpu"),
        ranks=ranks,
    )
    probe = torch.arange(2 * CONTEXT).reshape(2, CONTEXT)
    if scenario.get("read"):
        engine.read(Path(scenario["read"]))
    first = engine.evaluation_loss(probe, probe)
    start = fingerprints(engine)
    source = RandomSource(
        VOCABULARY, CONTEXT, MICRO_BATCH, config.micro_batches, 7, ranks.rank, ranks.world_size
    ).batches(engine.step)
    updates = []
    while engine.step < scenario["steps"]:
        updates.append(engine.update(next(source))._asdict())
    if scenario.get("write"):
        folder = Path(scenario["write"])
        folder.mkdir(parents=True, exist_ok=True)
        ranks.barrier()
        engine.write(folder)
        ranks.barrier()
    weights = engine.model_state()
    return {
        "start": start,
        "updates": updates,
        "first_forward": first,
        "last_forward": engine.evaluation_loss(probe, probe),
        "logits": engine.last_logits(probe).sum().item(),
        "end": fingerprints(engine),
        "dtype": str(next(iter(weights.values())).dtype) if weights else None,
    }


def main() -> None:
    torch.set_num_threads(1)
    launch = Launch.from_environment()
    ranks = join(launch, torch.device("cpu"), 5) if launch else Ranks()
    scenarios = json.loads(Path(sys.argv[1]).read_text())
    results = {s["name"]: run(s, ranks) for s in scenarios}
    if ranks.rank == 0:
        Path(sys.argv[2]).write_text(json.dumps(results))
    leave()


if __name__ == "__main__":
    main()
