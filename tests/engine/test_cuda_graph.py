"""A micro-step that is recorded and repeated computes what the plain one computes, bit for bit."""

import logging
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from fastgpt_kernels import load_ops
from torch import Tensor

from fastgpt.config import Config, ModelConfig
from fastgpt.data.source import Batch
from fastgpt.engine.base import evaluation_loss
from fastgpt.engine.cuda_graph import WARM_UP, Recorder
from fastgpt.engine.phases import unobserved
from fastgpt.engine.single import SingleProcess
from fastgpt.model.build import new_model
from fastgpt.model.gpt import GPT

T = TypeVar("T")
UPDATES = 6
CASES = pytest.mark.parametrize(
    ("precision", "micro_batches"), [("fp32", 1), ("fp32", 3), ("bf16", 1), ("bf16", 3), ("fp16", 1), ("fp16", 3)]
)


def config_for(micro_batches: int) -> Config:
    return Config.model_validate(
        {
            "out": "unused",
            "model": {
                "n_layer": 2,
                "n_head": 2,
                "n_embd": 32,
                "context": 16,
                "vocab_size": 61,
                "dropout": 0.1,
            },
            "data": {"path": "unused"},
            "train": {
                "steps": UPDATES,
                "batch_tokens": micro_batches * 2 * 16,
                "micro_batch_size": 2,
                "lr": 1e-3,
                "sample_tokens": 0,
            },
        }
    )


def batches(micro_batches: int) -> Iterator[Batch]:
    chance = np.random.default_rng(7)
    while True:
        tokens = chance.integers(61, size=(micro_batches, 2, 17))
        yield Batch(0, tokens, tuple(range(micro_batches)))


def trained(engine: SingleProcess, micro_batches: int) -> tuple[list[Any], dict[str, Tensor]]:
    rows = [engine.update(batch).update for batch, _ in zip(batches(micro_batches), range(UPDATES), strict=False)]
    return rows, engine.model_state()


def engine_for(
    precision: str, micro_batches: int, device: torch.device, recorder: Recorder | None = None, **changes: Any
) -> SingleProcess:
    config = config_for(micro_batches)
    config = config.model_copy(update={"engine": config.engine.model_copy(update=changes)})
    ops = load_ops("torch" if device.type == "cpu" else "auto")
    return SingleProcess(lambda: GPT(config.model, ops), config, precision, device, recorder)


class RecordsOnACpu:
    """Behaves as CUDA graphs do: a recording computes nothing, and a replay writes to the memory of the recording."""

    def __init__(self) -> None:
        self.engine: SingleProcess
        self.warm_ups = self.recordings = self.replays = 0

    def warm_up(self, work: Callable[[], T]) -> T:
        self.warm_ups += 1
        return work()

    def record(self, work: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        self.recordings += 1
        weights = dict(self.engine._weights)
        tensors = {id(t): t for t in (*weights.values(), *self.engine._masters.values())}.values()
        sums = [(t.grad, t.grad.clone()) for t in tensors if t.grad is not None]
        result = work()
        for gradient, value in sums:
            gradient.copy_(value)
        places = {id(gradient) for gradient, _ in sums}
        made = {n: w.grad for n, w in weights.items() if w.grad is not None and id(w.grad) not in places}
        assert isinstance(result, Tensor)
        for tensor in (result, *made.values()):
            tensor.fill_(torch.nan)

        def replay() -> None:
            self.replays += 1
            for name in made:
                weights[name].grad = None
            result.copy_(work())
            for name, gradient in made.items():
                again = weights[name].grad
                assert again is not None
                gradient.copy_(again)
                weights[name].grad = None  # the device knows nothing of Python's attributes

        return result, replay


@CASES
def test_a_recorded_micro_step_is_the_plain_one(precision: str, micro_batches: int) -> None:
    cpu, recorder = torch.device("cpu"), RecordsOnACpu()
    graphed = engine_for(precision, micro_batches, cpu, recorder)
    recorder.engine = graphed
    rows, weights = trained(graphed, micro_batches)
    plain_rows, plain_weights = trained(engine_for(precision, micro_batches, cpu), micro_batches)
    assert (recorder.warm_ups, recorder.recordings) == (WARM_UP, 1)
    assert recorder.replays == UPDATES * micro_batches - WARM_UP > 0
    assert rows == plain_rows
    assert len({row.loss for row in rows}) == UPDATES
    assert all(torch.equal(weights[name], plain_weights[name]) for name in plain_weights)


class CannotRecord(RecordsOnACpu):
    def record(self, work: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        super().record(work)
        raise RuntimeError("operation not permitted when stream is capturing\nmore of it")


@CASES
def test_what_cannot_be_recorded_goes_on_without_and_says_so(
    precision: str, micro_batches: int, caplog: pytest.LogCaptureFixture
) -> None:
    cpu, recorder = torch.device("cpu"), CannotRecord()
    graphed = engine_for(precision, micro_batches, cpu, recorder)
    recorder.engine = graphed
    with caplog.at_level(logging.WARNING):
        rows, weights = trained(graphed, micro_batches)
    plain_rows, plain_weights = trained(engine_for(precision, micro_batches, cpu), micro_batches)
    assert recorder.recordings == 1
    assert [record.getMessage() for record in caplog.records] == [
        "no CUDA graph over the micro-step, which goes on without: operation not permitted when stream is capturing"
    ]
    assert rows == plain_rows
    assert all(torch.equal(weights[name], plain_weights[name]) for name in plain_weights)


def test_an_error_of_ours_is_not_taken_for_one_of_the_recording() -> None:
    class Broken(RecordsOnACpu):
        def record(self, work: Callable[[], T]) -> tuple[T, Callable[[], None]]:
            raise TypeError("a mistake")

    graphed = engine_for("fp32", 1, torch.device("cpu"), Broken())
    with pytest.raises(TypeError, match="a mistake"):
        trained(graphed, 1)


def test_who_observes_phases_sees_them_without_a_graph() -> None:
    seen: list[str] = []

    def observer(name: str) -> Any:
        seen.append(name)
        return unobserved(name)

    recorder = RecordsOnACpu()
    graphed = engine_for("bf16", 1, torch.device("cpu"), recorder)
    recorder.engine = graphed
    source = batches(1)
    for _ in range(WARM_UP + 1):
        graphed.update(next(source))
    assert recorder.replays == 1
    graphed.phases = observer
    graphed.update(next(source))
    assert seen == ["data", "forward", "backward", "optimizer"]
    graphed.phases = unobserved
    graphed.update(next(source))
    assert recorder.replays == 2


def test_without_the_setting_and_for_an_lstm_nothing_is_recorded_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made: list[str] = []
    monkeypatch.setattr("fastgpt.engine.single.CudaGraphs", lambda: made.append("graphs") or RecordsOnACpu())

    class Cuda:
        type = "cuda"

    def build(*, cuda_graph: bool, **shape: Any) -> None:
        config = config_for(1)
        model = ModelConfig.model_validate(config.model.model_dump() | shape)
        engine = config.engine.model_copy(update={"cuda_graph": cuda_graph})
        config = config.model_copy(update={"engine": engine, "model": model})
        monkeypatch.setattr(torch.nn.Module, "to", lambda self, *_: self)
        SingleProcess(lambda: new_model(config.model, load_ops("torch")), config, "fp32", Cuda())  # type: ignore[arg-type]

    build(cuda_graph=False)
    with caplog.at_level("INFO", logger="fastgpt"):
        build(cuda_graph=True, kind="lstm", n_head=None, n_units=8)
    assert not made and "no CUDA graph over the micro-step: cuDNN's LSTM" in caplog.text
    build(cuda_graph=True)
    assert made == ["graphs"]


@pytest.mark.gpu
@CASES
def test_a_cuda_graph_is_the_plain_micro_step(
    precision: str, micro_batches: int, caplog: pytest.LogCaptureFixture
) -> None:
    gpu = torch.device("cuda", 0)
    with caplog.at_level(logging.INFO):
        rows, weights = trained(engine_for(precision, micro_batches, gpu), micro_batches)
    assert "the micro-step is one CUDA graph from now on" in caplog.text
    plain_rows, plain_weights = trained(engine_for(precision, micro_batches, gpu, cuda_graph=False), micro_batches)
    assert rows == plain_rows
    assert all(torch.equal(weights[name], plain_weights[name]) for name in plain_weights)


@pytest.mark.gpu
def test_an_evaluation_between_replays_leaves_the_graph_alone() -> None:
    gpu = torch.device("cuda", 0)
    found = []
    for changes in ({}, {"cuda_graph": False}):
        engine, source, losses = engine_for("bf16", 2, gpu, **changes), batches(2), []
        for _ in range(UPDATES):
            batch = next(source)
            losses.append(engine.update(batch).update.loss)
            tokens = torch.from_numpy(batch.tokens[0])
            losses.append(evaluation_loss(engine, tokens[:, :-1], tokens[:, 1:]))
        found.append(losses)
    assert found[0] == found[1]
