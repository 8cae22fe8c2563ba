"""Predicted speed: that its parts are the model's work, and that published runs lie where they should."""

import pytest

from benchmarks.planning import PUBLISHED, Run, settings
from fastgpt.plan.hardware import GPUS
from fastgpt.plan.layout import Layout, Offload
from fastgpt.plan.planner import Request, make_plan
from fastgpt.plan.speed import (
    CASES,
    Interconnect,
    attention_rate,
    collectives,
    efficiency,
    products,
    speed,
    visible_pairs,
)
from fastgpt.sizes import flops_per_token, parameter_count

NODE = Interconnect(8, 450e9, 50e9)


@pytest.mark.parametrize("name", ["gpt1-117m", "gpt2-124m", "gpt2-1558m", "gpt3-175b"])
def test_products_and_attention_are_the_work_that_mfu_counts(name: str) -> None:
    model = settings(name, "").model
    rows = 3 * model.context
    multiplied = sum(2 * m * n * k * times for m, n, k, times in products(model, rows))
    # MFU counts attention in full: as many keys for each query as the last one sees
    in_full = sum(model.window_of(layer) or model.context for layer in range(model.n_layer))
    assert multiplied + 12 * model.n_embd * in_full * rows == flops_per_token(model) * rows


def test_checkpointing_repeats_the_forward_of_the_blocks() -> None:
    model = settings("gpt2-124m", "").model

    def work(again: int) -> int:
        return sum(2 * m * n * k * times for m, n, k, times in products(model, 1, again))

    assert work(1) - work(0) == 2 * 12 * 12 * 768 * 768


@pytest.mark.parametrize(("window", "pairs"), [(None, 10), (1, 4), (2, 7), (4, 10)])
def test_visible_pairs_are_those_of_the_mask(window: int | None, pairs: int) -> None:
    words = f"model.attention=alternating model.window={window}" if window else ""
    model = settings("quickstart", f"{words} model.context=4").model
    assert visible_pairs(model, layer=1) == pairs
    assert visible_pairs(model, layer=0) == 10


def test_attention_at_the_shapes_it_was_published_for_has_the_published_rate() -> None:
    gpu = GPUS["h100"]
    layout = Layout(1, "bf16", 1, 1)
    for context, width, rate in ((1024, 768, 229e12), (16384, 768, 299e12), (1024, 1536, 260e12)):
        model = settings("gpt2-124m", f"model.context={context} model.n_embd={width} train.batch_tokens=524288").model
        assert attention_rate(model, visible_pairs(model, 0), gpu, layout) == pytest.approx(rate, rel=0.01)


def test_a_product_of_odd_sides_or_a_short_inner_side_is_slower() -> None:
    assert efficiency(4096, 1664, 4096) > efficiency(4096, 1600, 4096) > efficiency(4096, 1600, 768)
    assert efficiency(128, 128, 256) == 0.5


def test_what_is_sent_is_zeros_arithmetic() -> None:
    config = settings("gpt2-355m", "")
    parameters = parameter_count(config.model)

    def volume(stage: int, accumulation: int, precision: str = "bf16", gpus: int = 8) -> float:
        layout = Layout(gpus, precision, 1, accumulation, stage, Offload(), False, True)  # type: ignore[arg-type]
        return sum(c.volume(gpus) for c in collectives(config, layout)) / parameters / (gpus - 1) * gpus

    # in one width throughout: 2 P elements, and 3 P at stage 3 (ZeRO, section 7)
    assert volume(0, 1, "fp32") == pytest.approx(2 * 4)
    assert volume(3, 1, "fp32") == pytest.approx(3 * 4)
    # and at stage 2, which DeepSpeed reduces to all ranks although each keeps its part only
    assert volume(2, 1, "fp32") == pytest.approx(3 * 4)
    # with 16-bit weights and fp32 gradients
    assert volume(1, 5) == pytest.approx(8 + 2)
    assert volume(2, 5) == pytest.approx(5 * 8 + 2)
    assert volume(3, 5) == pytest.approx(5 * (4 + 2 * 2))


def test_one_gpu_sends_nothing() -> None:
    assert make_plan(settings("gpt2-124m", ""), Request(1, "h100")).communication_bytes == 0


def test_a_second_node_costs_its_network() -> None:
    config = settings("gpt2-1558m", "")
    layout = Layout(16, "bf16", 8, 4, 1, Offload(), False, True)
    slow, fast = (
        speed(config, layout, GPUS["h100"], Interconnect(8, 450e9, network), CASES["expected"])
        for network in (1e9, 50e9)
    )
    assert slow.parts["communication"] > 5 * fast.parts["communication"]
    assert slow.tokens_per_second < fast.tokens_per_second


@pytest.mark.parametrize("name", ["gpt1-117m", "gpt2-124m", "gpt2-1558m", "gpt3-13b"])
@pytest.mark.parametrize("gpu", GPUS)
def test_low_is_below_expected_is_below_high_is_below_the_peak(name: str, gpu: str) -> None:
    plan = make_plan(settings(name, ""), Request(64, gpu))
    low, expected, high = (plan.speeds[case] for case in ("low", "expected", "high"))
    assert 0 < low.tokens_per_second < expected.tokens_per_second < high.tokens_per_second
    assert high.mfu < 1
    assert expected.step_seconds * expected.tokens_per_second == pytest.approx(plan.batch_tokens)


@pytest.mark.parametrize("run", PUBLISHED, ids=lambda run: f"{run.who} {run.config} {run.gpu}")
def test_published_runs_are_met_within_a_third(run: Run) -> None:
    config = settings(run.config, run.words)
    plan = make_plan(config, Request(run.gpus, run.gpu, as_configured=True))
    work = flops_per_token(config.model)
    rate = run.tokens or (run.tflops or (run.mfu or 0) * GPUS[run.gpu].peak / 1e12) * 1e12 / work
    assert plan.speeds["expected"].tokens_per_second / run.gpus == pytest.approx(rate, rel=1 / 3)
