"""Predicted memory, held to what the real step allocates, and to the arithmetic of ZeRO."""

import importlib
import json

import pytest

from benchmarks.memory_trace import trace_step
from benchmarks.planning import TRACED, key_of, predicted_bytes, settings, traced_cases
from fastgpt.config import Config
from fastgpt.plan import memory
from fastgpt.plan.layout import Layout, Offload, as_configured
from fastgpt.plan.memory import Memory, host_memory, kept_by_block, moments, needed
from fastgpt.plan.planner import Request, make_plan
from fastgpt.sizes import parameter_count

# of the real models' widths, with few layers: what is wrong in a block or outside them shows as well
SHALLOW = "model.n_layer=2 train.micro_batch_size=4"
# of this name the package holds the function
logits_file = importlib.import_module("fastgpt_kernels.torch_ops.logits")


def error(config: Config) -> float:
    counted = trace_step(config).peak
    return needed(config, as_configured(config, 1)).total / counted - 1


@pytest.mark.parametrize("checkpointing", ["false", "true"])
@pytest.mark.parametrize("name", ["gpt1-117m", "gpt2-124m", "gpt2-1558m", "gpt3-125m"])
def test_the_plan_is_within_a_tenth_of_what_a_shallow_models_step_allocates(name: str, checkpointing: str) -> None:
    config = settings(name, f"{SHALLOW} train.activation_checkpointing={checkpointing} engine.precision=bf16")
    assert abs(error(config)) < 0.1


@pytest.mark.parametrize("words", ["train.batch_tokens=4096", "engine.precision=fp32", "model.dropout=0"])
def test_so_it_is_without_accumulation_in_fp32_and_without_dropout(words: str) -> None:
    assert abs(error(settings("gpt2-124m", f"{SHALLOW} engine.precision=bf16 {words}"))) < 0.1


@pytest.mark.parametrize("words", ["engine.precision=bf16", "engine.precision=fp32"])
def test_so_it_is_with_one_table_of_tokens_and_positions(words: str) -> None:
    assert abs(error(settings("gpt1-117m", f"{SHALLOW} model.embedding=table {words}"))) < 0.1


def test_what_stays_between_updates_is_counted_exactly() -> None:
    config = settings("gpt2-124m", f"{SHALLOW} engine.precision=bf16")
    plan = needed(config, as_configured(config, 1))
    resident = plan.weights + plan.optimizer + 4 * parameter_count(config.model)
    # beside it the optimizer counts the updates of each parameter, in a float
    assert 0 <= trace_step(config).between - resident < 10_000


@pytest.mark.parametrize(("name", "words"), traced_cases(), ids=[key_of(*case) for case in traced_cases()])
def test_the_plan_is_within_a_tenth_of_every_recorded_count(name: str, words: str) -> None:
    counted = json.loads(TRACED.read_text())[key_of(name, words)]
    assert abs(predicted_bytes(name, words) / counted - 1) < 0.1


@pytest.mark.slow
@pytest.mark.parametrize(("name", "words"), traced_cases(), ids=[key_of(*case) for case in traced_cases()])
def test_every_recorded_count_is_that_of_the_step_as_it_is(name: str, words: str) -> None:
    assert trace_step(settings(name, words)).peak == json.loads(TRACED.read_text())[key_of(name, words)]


def test_a_block_keeps_sixteen_rows_of_its_width_and_its_statistics() -> None:
    for name in ("gpt1-117m", "gpt2-124m"):
        model = settings(name, "").model
        assert sum(kept_by_block(model, rows=10, e=2).values()) == 10 * (16 * 768 * 2 + 4 * 12 + 16)


def test_zero_divides_what_its_stages_shard() -> None:
    config = settings("gpt2-355m", "engine.reduce_bucket_size=1000")
    parameters = parameter_count(config.model)

    def of(stage: int, gpus: int = 8, *, precision: str = "bf16", offload: Offload = Offload()) -> Memory:  # noqa: B008
        layout = Layout(gpus, precision, 4, 2, stage, offload, False, True)  # type: ignore[arg-type]
        return moments(config, layout)["output matrix"]

    table = 2 * config.model.vocab_size * config.model.n_embd  # its gradient, as output matrix
    assert of(0).optimizer == 12 * parameters
    assert {of(stage).optimizer for stage in (1, 2, 3)} == {12 * parameters // 8}
    assert [of(stage).gradients - table for stage in (0, 1, 2, 3)] == [
        2 * parameters,
        4 * parameters,
        4 * parameters // 8,
        4 * parameters // 8,
    ]
    assert {of(stage).weights for stage in (0, 1, 2)} == {2 * parameters}
    assert of(3, 64).weights < of(3, 8).weights < 2 * parameters
    assert {of(stage).activations for stage in range(4)} == {of(0).activations}
    host, both = Offload("cpu"), Offload("cpu", "cpu")
    assert {of(stage, offload=host).optimizer for stage in (1, 2, 3)} == {0}
    # DeepSpeed adds gradients up on the GPU but for stage 3, and in fp32 for stage 2
    assert [of(stage, offload=host).gradients - table for stage in (1, 2, 3)] == [4 * parameters, parameters // 2, 0]
    assert of(2, precision="fp32", offload=host).gradients == 2 * table
    assert of(3, offload=host).weights - of(3, offload=both).weights == 2 * parameters // 8
    assert of(3, offload=Offload(parameters="cpu")).optimizer == of(3).optimizer


def test_what_is_offloaded_takes_the_hosts_memory_or_little_of_it() -> None:
    config = settings("gpt2-1558m", "")
    parameters = parameter_count(config.model)

    def of(stage: int, *where: str) -> float:
        layout = Layout(1, "bf16", 1, 1, stage, Offload(*where), False, True)  # type: ignore[arg-type]
        return host_memory(config, layout) / parameters

    assert of(3) == 0
    assert (of(1, "cpu"), of(2, "cpu"), of(3, "cpu")) == (18, 18, 20)
    assert (of(3, "none", "cpu"), of(3, "cpu", "cpu")) == (2, 22)
    assert 4 < of(3, "nvme") < 6
    # DeepSpeed keeps the first 10^9 weights in memory; twelve buffers of the largest weight are read through
    buffers = 12 * 50257 * 1600 * 2
    assert of(3, "none", "nvme") == pytest.approx((2e9 + buffers) / parameters, rel=1e-3)


def test_the_columns_of_logits_are_the_kernels() -> None:
    assert memory.LOGITS_MULTIPLE == logits_file.MULTIPLE
    gpt2 = settings("gpt2-124m", "").model
    assert memory.logits_and_matrix(gpt2, 10, 2) == {"logits": 10 * 50304 * 2, "output matrix": 50304 * 768 * 2}
    assert memory.logits_and_matrix(gpt2, 10, 4) == {"logits": 10 * 50257 * 4}


def test_more_sequences_layers_or_words_never_take_less_memory() -> None:
    def total(words: str, micro: int = 4) -> int:
        return needed(settings("gpt2-124m", words), Layout(8, "bf16", micro, 2, 2, Offload(), False, True)).total

    plain = total("")
    assert plain < total("", 8) < total("", 9)
    assert plain < total("model.n_layer=13")
    assert plain < total("model.vocab_size=60000")
    assert total("train.activation_checkpointing=true") == plain  # the layout decides, not the settings


def test_the_kinds_add_up_to_the_total() -> None:
    plan = make_plan(settings("gpt2-774m", ""), Request(8, "h100"))
    assert sum(plan.memory) == plan.memory.total == max(m.total for m in moments(plan.config, plan.layout).values())
