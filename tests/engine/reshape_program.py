"""Run by torchrun, or alone: trains a small model in some layouts and writes its states, then reads states in others.

usage: reshape_program.py JOB RESULTS
A job: {"folder", "write": [LAYOUT, ...], "targets": [LAYOUT, ...], "sources": [NAME, ...]}
A layout: {"stage": 0 to 3, or null for the single engine, which rank 0 runs by itself; "precision"}
Every target reads every source of its precision, each time in a new engine. A state is called as `name_of` has it.
"""

import gc
import itertools
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fastgpt_kernels import load_ops
from states import differing, put, state_in
from torch import Tensor

from fastgpt.config import Config
from fastgpt.data.source import Batch, ShardSource
from fastgpt.engine.base import Engine, evaluation_loss
from fastgpt.engine.precision import DTYPES
from fastgpt.engine.prepare import prepare
from fastgpt.engine.ranks import Ranks, join, leave
from fastgpt.launchers import ALONE, find_launch
from fastgpt.model.gpt import GPT
from fastgpt.model.init import initial_value

VOCABULARY, CONTEXT, SEED = 101, 16, 1337
MICRO_BATCHES = 12  # which 1, 2, 3 and 4 ranks share evenly
KEPT_GATHERED = 200  # elements: ZeRO-3 keeps smaller parameters gathered, and shards the others
WRITTEN_AT = 3
Layout = dict[str, Any]


def name_of(layout: Layout, world_size: int) -> str:
    """What a layout's state is called."""
    kind = "single" if layout["stage"] is None else f"zero{layout['stage']}"
    return f"{kind}-on-{world_size}-{layout['precision']}"


def settings(layout: Layout) -> Config:
    """A model whose parameters no number of ranks from 2 to 4 divides evenly, but for two or three."""
    return Config.model_validate(
        {
            "out": "unused",
            "model": {
                "n_layer": 1,
                "n_head": 2,
                "n_embd": 34,
                "context": CONTEXT,
                "vocab_size": VOCABULARY,
                "dropout": 0.1,
            },
            "data": {"path": "unused"},
            "train": {
                "steps": 20,
                "batch_tokens": CONTEXT * MICRO_BATCHES,
                "micro_batch_size": 1,
                "lr": 1e-3,
                "warmup_steps": 2,
                "seed": SEED,
            },
            "engine": {
                "zero_stage": layout["stage"] or 0,
                "deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": KEPT_GATHERED}},
            },
        }
    )


def engine_of(layout: Layout, ranks: Ranks) -> Engine:
    config = settings(layout)
    return prepare(
        lambda: GPT(config.model, load_ops("torch")),
        config,
        kind="single" if layout["stage"] is None else "deepspeed",
        precision=layout["precision"],
        device=torch.device("cpu"),
        ranks=ranks,
    )


class Text:
    """Random tokens in the place of a folder of shards."""

    folder, split = Path("nowhere"), "train"

    def __init__(self) -> None:
        self._tokens = np.random.default_rng(0).integers(VOCABULARY, size=5000)

    def __len__(self) -> int:
        return len(self._tokens)

    def gather(self, starts: np.ndarray, length: int) -> np.ndarray:
        return self._tokens[starts[:, None] + np.arange(length)]


def source_for(ranks: Ranks) -> ShardSource:
    return ShardSource(Text(), CONTEXT, 1, MICRO_BATCHES, SEED, ranks.rank, ranks.world_size)  # type: ignore[arg-type]


def whole(batch: Batch, ranks: Ranks) -> list[Any]:
    """The global batch: update, and the tokens of its micro-batches in order."""
    shares = ranks.gather(list(zip(batch.micro_batches, batch.tokens.tolist(), strict=True)))
    return [batch.step, [tokens for _, tokens in sorted(itertools.chain(*shares))]]


def go_on(layout: Layout, engine: Engine, ranks: Ranks) -> dict[str, Any]:
    """The batch that is due, and in fp32, where losses are to agree, the updates on it and on the next."""
    batches = source_for(ranks).batches(engine.step)
    batch = next(batches)
    due, updates = whole(batch, ranks), []
    if layout["precision"] == "fp32":
        updates = [engine.update(each).update._asdict() for each in (batch, next(batches))]
    return {"batch": due, "updates": updates}


def forward(model_or_engine: Any) -> float:
    probe = torch.arange(2 * CONTEXT).reshape(2, CONTEXT)
    if isinstance(model_or_engine, GPT):
        with torch.no_grad():
            return float(model_or_engine.eval()(probe, targets=probe, reduction="sum"))
    return evaluation_loss(model_or_engine, probe, probe)


def plain_model(layout: Layout, masters: dict[str, Tensor]) -> GPT:
    """A model that has never met an engine, with the masters as they are rounded."""
    model = GPT(settings(layout).model, load_ops("torch")).to(DTYPES[layout["precision"]])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(masters[f"master of {name}"])
    return model


def shapes_of(layout: Layout) -> dict[str, tuple[int, ...]]:
    model = GPT(settings(layout).model, load_ops("torch"))
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def write(layout: Layout, folder: Path, ranks: Ranks) -> dict[str, Any]:
    """Train, write the state, and go on undisturbed."""
    engine = engine_of(layout, ranks)
    born = folder / f"{folder.name}-born"
    put(engine, born, ranks)
    batches = source_for(ranks).batches(0)
    while engine.step < WRITTEN_AT:
        _ = engine.update(next(batches)).update
    put(engine, folder, ranks)
    found: dict[str, Any] = {"forward": forward(engine)}
    if ranks.rank == 0:
        shapes, dtype = shapes_of(layout), DTYPES[layout["precision"]]
        drawn = {
            f"master of {name}": initial_value(name, shape, settings(layout).model, SEED).to(dtype).float()
            for name, shape in shapes.items()
        }
        found["not_born_as_drawn"] = differing(drawn, state_in(born, shapes, ("master",)))
        shutil.rmtree(born)
    return found | go_on(layout, engine, ranks)


def read(layout: Layout, source: Path, copy: Path, ranks: Ranks) -> dict[str, Any]:
    """Take up a state in a new engine, write it again, and go on."""
    engine = engine_of(layout, ranks)
    engine.read(source)
    put(engine, copy, ranks)
    found: dict[str, Any] = {"forward": forward(engine)}
    weights = engine.model_state()
    if ranks.rank == 0:
        assert weights
        shapes = shapes_of(layout)
        state = state_in(source, shapes)
        model = plain_model(layout, state)
        found |= {
            "tensors": len(state),
            "differing": differing(state, state_in(copy, shapes)),
            "differing_weights": differing({name: p.detach() for name, p in model.named_parameters()}, weights),
            "plain_forward": forward(model),
            "progress": [json.loads((folder / "engine.json").read_text()) for folder in (source, copy)],
        }
        shutil.rmtree(copy)
    return found | go_on(layout, engine, ranks)


def main() -> None:
    torch.set_num_threads(1)
    ranks = join(find_launch() or ALONE, torch.device("cpu"), 5)
    job = json.loads(Path(sys.argv[1]).read_text())
    folder = Path(job["folder"])
    written: dict[str, Any] = {}
    found: dict[str, Any] = {}
    for layout in job["write"]:
        alone = layout["stage"] is None
        if not alone or ranks.rank == 0:
            own = Ranks() if alone else ranks
            name = name_of(layout, own.world_size)
            written[name] = write(layout, folder / name, own)
        ranks.barrier()
    for layout, source in itertools.product(job["targets"], job["sources"]):
        alone = layout["stage"] is None
        if source.endswith(layout["precision"]) and (not alone or ranks.rank == 0):
            own = Ranks() if alone else ranks
            name = name_of(layout, own.world_size)
            found[f"{source} to {name}"] = read(layout, folder / source, folder / f"{name}-copy", own)
            gc.collect()  # DeepSpeed's engines are rings of references
        ranks.barrier()
    if ranks.rank == 0:
        Path(sys.argv[2]).write_text(json.dumps({"written": written, "read": found}))
    leave()


if __name__ == "__main__":
    main()
