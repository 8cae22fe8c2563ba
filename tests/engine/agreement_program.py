"""Run by torchrun, or alone: the losses of the engines, and of plain PyTorch's data parallelism, over many updates.

usage: agreement_program.py RUNS RESULTS
A run: {"name", "kind": "single", "deepspeed", "plain" or "plain-low", "stage"?, "precision"?, "overrides"}
"plain" is PyTorch's DistributedDataParallel under bf16 autocast; "plain-low" the same with weights and gradients
in bf16 and masters in fp32.
"""

import contextlib
import copy
import dataclasses
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

from benchmarks.step_contenders import adamw
from benchmarks.step_models import PlainGPT
from fastgpt.config import Config
from fastgpt.data.source import Batch, RandomSource
from fastgpt.engine.backend import ops_for
from fastgpt.engine.base import told
from fastgpt.engine.precision import DTYPES
from fastgpt.engine.prepare import prepare
from fastgpt.engine.ranks import Ranks, join, leave
from fastgpt.engine.schedule import learning_rate
from fastgpt.launchers import ALONE, find_launch
from fastgpt.model.gpt import GPT

STEPS, CONTEXT, MICRO_BATCHES, VOCABULARY = 50, 16, 4, 101


def settings(run: dict[str, Any]) -> Config:
    tree: dict[str, Any] = {
        "out": "unused",
        "model": {"n_layer": 2, "n_head": 2, "n_embd": 32, "context": CONTEXT, "vocab_size": VOCABULARY},
        "data": {"path": "unused"},
        "train": {
            "steps": STEPS,
            "batch_tokens": CONTEXT * 2 * MICRO_BATCHES,
            "micro_batch_size": 2,
            "lr": 3e-3,
            "warmup_steps": 5,
            "clip": 1.0,
        },
        "engine": {"zero_stage": run.get("stage") or 0},
    }
    for key, value in run["overrides"].items():
        section, name = key.split(".")
        tree[section][name] = value
    return Config.model_validate(tree)


def progressions(config: Config, ranks: Ranks) -> Iterator[Batch]:
    """Something to learn: each sequence counts on from its first token in steps of one to four."""
    size = config.train.micro_batch_size
    source = RandomSource(VOCABULARY, CONTEXT, size, config.micro_batches, 7, ranks.rank, ranks.world_size)
    for batch in source.batches(0):
        first, second = batch.tokens[..., :1], batch.tokens[..., 1:2]
        counted = (first + (1 + second % 4) * np.arange(CONTEXT + 1)) % VOCABULARY
        yield dataclasses.replace(batch, tokens=counted)


def losses_of(run: dict[str, Any], ranks: Ranks) -> list[float]:
    config = settings(run)
    source = progressions(config, ranks)
    if run["kind"].startswith("plain"):
        return plain_losses(config, source, ranks, low=run["kind"] == "plain-low")
    ops = ops_for("auto", torch.device("cpu"), DTYPES[run["precision"]])  # as `fastgpt train` chooses
    engine = prepare(
        lambda: GPT(config.model, ops),
        config,
        kind=run["kind"],
        precision=run["precision"],
        device=torch.device("cpu"),
        ranks=ranks,
    )
    return [engine.update(next(source)).update.loss for _ in range(STEPS)]


def plain_losses(config: Config, source: Iterator[Batch], ranks: Ranks, *, low: bool) -> list[float]:
    """The loop of a careful user: gradients are added up on each rank before they are reduced."""
    masters = PlainGPT(config.model, config.train.seed)
    model = copy.deepcopy(masters).bfloat16() if low else masters
    parallel = DistributedDataParallel(model)
    optimizer = adamw(masters, config)
    losses = []
    for step in range(1, STEPS + 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config.train)
        own = []
        rows = torch.from_numpy(next(source).tokens)
        for number, tokens in enumerate(rows):
            last = number == len(rows) - 1
            with contextlib.nullcontext() if last else parallel.no_sync():
                with torch.autocast("cpu", torch.bfloat16):
                    loss = parallel(tokens[:, :-1], tokens[:, 1:])
                (loss / len(rows)).backward()
            own.append(loss.detach())
        if low:
            for master, working in zip(masters.parameters(), model.parameters(), strict=True):
                master.grad = None if working.grad is None else working.grad.float()
        torch.nn.utils.clip_grad_norm_(masters.parameters(), config.train.clip or math.inf)
        optimizer.step()
        model.zero_grad(set_to_none=True)
        if low:
            with torch.no_grad():
                for master, working in zip(masters.parameters(), model.parameters(), strict=True):
                    working.copy_(master)
        losses.append(told(ranks, step, own, norm=0.0, learning_rate=0.0)().loss)
    return losses


def main() -> None:
    torch.set_num_threads(1)
    ranks = join(find_launch() or ALONE, torch.device("cpu"), 5)
    runs = json.loads(Path(sys.argv[1]).read_text())
    losses = {run["name"]: losses_of(run, ranks) for run in runs}
    if ranks.rank == 0:
        Path(sys.argv[2]).write_text(json.dumps(losses))
    leave()


if __name__ == "__main__":
    main()
