"""Training with compiled blocks: what plain ones compute, few graphs, nothing compiled beside the training."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch

# before any kernel is defined: a process either interprets or compiles
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from fastgpt_kernels import Backend, UnsupportedInput, load_ops
from torch._dynamo.utils import counters
from torch._inductor.exc import CppCompileError
from torch.autograd.graph import Node

from fastgpt.config import Config
from fastgpt.data.source import RandomSource
from fastgpt.engine import compiled
from fastgpt.engine.base import Update, evaluation_loss
from fastgpt.engine.single import SingleProcess
from fastgpt.errors import UserError
from fastgpt.model.gpt import GPT

# the first block of a pre-LN stack is another: there is no branch that waits to be added
GRAPHS = {"pre": 2, "post": 1}
CONTEXT, MICRO_BATCH, MICRO_BATCHES, STEPS = 12, 2, 2, 20


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Nothing is compiled yet, and nothing stays compiled."""
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs are run by PyTorch's own operations: no code is generated, which takes its time."""
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")


def settings(*, compile: bool, **overrides: Any) -> Config:
    tree: dict[str, dict[str, Any]] = {
        "model": {"n_layer": 3, "n_head": 2, "n_embd": 32, "context": CONTEXT, "vocab_size": 101, "dropout": 0.1},
        "data": {"path": "unused"},
        "train": {
            "steps": STEPS,
            "batch_tokens": CONTEXT * MICRO_BATCH * MICRO_BATCHES,
            "micro_batch_size": MICRO_BATCH,
            "lr": 1e-3,
        },
        "engine": {"compile": compile},
    }
    for key, value in overrides.items():
        section, name = key.split("__")
        tree[section][name] = value
    return Config.model_validate({"out": "unused", **tree})


def engine_of(
    config: Config, precision: str = "fp32", backend: Backend = "torch", device: str = "cpu"
) -> SingleProcess:
    return SingleProcess(lambda: GPT(config.model, load_ops(backend)), config, precision, torch.device(device))


def train(engine: SingleProcess, steps: int = STEPS) -> list[Update]:
    """Go on to update `steps`, with a validation and samples of several lengths between the updates."""
    source = RandomSource(101, CONTEXT, MICRO_BATCH, MICRO_BATCHES, 7).batches(engine.step)
    probe = torch.arange(3 * CONTEXT).reshape(3, CONTEXT)
    updates = []
    while engine.step < steps:
        updates.append(engine.update(next(source)).update)
        if engine.step < 4:
            evaluation_loss(engine, probe, probe)
            for length in (4, 5, CONTEXT):
                engine.last_logits(probe[:1, :length])
    return updates


def digest(engine: SingleProcess) -> str:
    state = engine.model_state()
    return hashlib.sha256(b"".join(w.view(torch.uint8).numpy().tobytes() for w in state.values())).hexdigest()


def furthest(one: list[Update], other: list[Update]) -> float:
    assert len(one) == len(other)
    return max(abs(a.loss - b.loss) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(
    ("norm", "checkpointing", "precision"),
    [
        ("pre", True, "bf16"),
        ("post", False, "fp32"),
        pytest.param("pre", False, "fp32", marks=pytest.mark.slow),
        pytest.param("post", True, "bf16", marks=pytest.mark.slow),
    ],
)
def test_one_graph_trains_all_blocks_that_are_alike_to_the_same_bits(
    norm: str, checkpointing: bool, precision: str, traced: None
) -> None:
    """The graph holds the operations of the plain block: with dropout, other masks would be other losses."""
    choice = {"model__norm": norm, "train__activation_checkpointing": checkpointing}
    plain, ours = (engine_of(settings(compile=c, **choice), precision) for c in (False, True))
    assert train(ours, 6) == train(plain, 6)
    assert digest(ours) == digest(plain)
    assert counters["stats"]["unique_graphs"] == GRAPHS[norm]


def test_dropout_takes_part_in_what_is_compared(traced: None) -> None:
    dropped, kept = (engine_of(settings(compile=True, model__dropout=p)) for p in (0.1, 0.0))
    assert furthest(train(dropped, 3), train(kept, 3)) > 1e-3


def test_validation_and_samples_compile_nothing(traced: None) -> None:
    engine = engine_of(settings(compile=True))
    probe = torch.arange(2 * CONTEXT).reshape(2, CONTEXT)
    evaluation_loss(engine, probe, probe)
    engine.last_logits(probe[:, :5])
    engine.last_logits(probe[:, :6])
    assert counters["stats"]["unique_graphs"] == 0


def test_names_and_hooks_stay_where_they_are(traced: None) -> None:
    plain, ours = (engine_of(settings(compile=c)) for c in (False, True))
    assert ours.model_state().keys() == plain.model_state().keys()
    seen: list[bool] = []
    ours._model.blocks[1].register_forward_hook(lambda *_: seen.append(torch.compiler.is_compiling()))
    train(ours, 1)
    assert seen[:MICRO_BATCHES] == [False] * MICRO_BATCHES
    assert counters["stats"]["unique_graphs"] == GRAPHS["pre"]


def test_a_compiler_that_fails_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    output = (
        "In file included from header.hpp:1:\nx.h:10:10: fatal error: Python.h: No such file\ncompilation terminated."
    )

    def fail(*_: Any) -> Any:
        raise CppCompileError(["g++", "x.cpp"], output)

    monkeypatch.setattr(compiled, "BACKEND", fail)
    engine = engine_of(settings(compile=True))
    with pytest.raises(UserError) as caught:
        train(engine, 1)
    assert str(caught.value) == (
        "engine.compile: the C++ compiler failed: x.h:10:10: fatal error: Python.h: No such file. "
        "Mend it, or set engine.compile=false"
    )


def test_an_operation_that_refuses_its_input_says_so_itself(device: str, traced: None) -> None:
    engine = engine_of(settings(compile=True, model__n_embd=16), "fp32", "triton", device)
    batch = next(RandomSource(101, CONTEXT, MICRO_BATCH, MICRO_BATCHES, 7).batches(0))
    with pytest.raises(UnsupportedInput, match="the head size is 8; it must be between 16 and 256"):
        engine.update(batch)


def test_another_failure_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise ZeroDivisionError("a mistake of ours")

    monkeypatch.setattr(compiled, "BACKEND", fail)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="a mistake of ours"):
        train(engine_of(settings(compile=True)), 1)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_generated_code_stays_within_the_rounding_of_plain_training(norm: str, checkpointing: bool) -> None:
    choice = {"model__norm": norm, "train__activation_checkpointing": checkpointing}

    def losses(precision: str, *, compile: bool) -> list[Update]:
        return train(engine_of(settings(compile=compile, **choice), precision))

    plain, ours = (losses("fp32", compile=c) for c in (False, True))
    assert furthest(plain, ours) <= 1e-5  # the bound of the other engine
    low, our_low = (losses("bf16", compile=c) for c in (False, True))
    # as far as two orders of rounding may be from each other, each as far from fp32 as the plain one
    assert furthest(low, our_low) <= 2 * furthest(low, plain)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_resumed_run_repeats_every_bit_where_both_are_compiled(precision: str, tmp_path: Path) -> None:
    config = settings(compile=True)
    whole, half = (engine_of(config, precision) for _ in range(2))
    updates = train(whole, 6)
    train(half, 3)
    half.write(tmp_path)
    # as a process that starts again: what is compiled is compiled anew, or found
    torch.compiler.reset()
    resumed = engine_of(config, precision)
    resumed.read(tmp_path)
    assert train(resumed, 6) == updates[3:]
    assert digest(resumed) == digest(whole)


@pytest.mark.slow
def test_the_backward_keeps_parameters_and_no_views_of_them() -> None:
    """ZeRO-3 lets go of what a parameter gathered by giving the parameter other memory; a view would hold it."""
    engine = engine_of(settings(compile=True))
    tokens = torch.arange(CONTEXT)[None]
    loss = engine._model(tokens, targets=tokens, dropout_seed=1)
    memory = {p.untyped_storage().data_ptr() for p in engine._model.blocks.parameters()}
    kept = [
        saved
        for node in nodes_behind(loss)
        if node.name() == "CompiledFunctionBackward"
        for saved in cast(Any, node).saved_tensors
        if saved is not None and saved.untyped_storage().data_ptr() in memory
    ]
    assert len(kept) >= 4 * len(engine._model.blocks), "the matrices, at the least"
    assert [tuple(saved.shape) for saved in kept if not isinstance(saved, torch.nn.Parameter)] == []


def nodes_behind(loss: torch.Tensor) -> set[Node]:
    found: set[Node] = set()
    waiting = [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            found.add(node)
            waiting += [behind for behind, _ in node.next_functions]
    return found


@pytest.mark.slow
def test_blocks_of_triton_kernels_train_to_the_same_bits(device: str, traced: None) -> None:
    choice = {"model__n_layer": 2, "model__n_embd": 32, "train__batch_tokens": CONTEXT * MICRO_BATCH}
    batch = next(RandomSource(101, CONTEXT, MICRO_BATCH, 1, 7).batches(0))
    results = []
    for compile in (False, True):
        engine = engine_of(settings(compile=compile, **choice), "fp32", "triton", device)
        results.append(([engine.update(batch).update for _ in range(2)], digest(engine)))
    assert results[0] == results[1]
    assert counters["stats"]["unique_graphs"] == 1
