import math

import pytest

from fastgpt.config import TrainConfig
from fastgpt.engine.schedule import learning_rate


def train(**settings: object) -> TrainConfig:
    return TrainConfig.model_validate(
        {"steps": 100, "batch_tokens": 1, "micro_batch_size": 1, "lr": 0.5, "warmup_steps": 10} | settings
    )


def test_the_warm_up_is_a_straight_line_to_the_peak() -> None:
    rates = [learning_rate(step, train()) for step in range(1, 11)]
    assert rates == pytest.approx([0.05 * n for n in range(1, 11)])


def test_the_cosine_falls_to_its_floor_at_the_last_update() -> None:
    settings = train(min_lr=0.1)
    assert learning_rate(55, settings) == pytest.approx(0.1 + 0.4 * 0.5)
    assert learning_rate(100, settings) == pytest.approx(0.1)
    assert all(learning_rate(s, settings) > learning_rate(s + 1, settings) for s in range(10, 100))


def test_the_cosine_can_reach_its_floor_before_the_end_and_stays_there() -> None:
    settings = train(min_lr=0.1, decay_steps=50)
    assert learning_rate(30, settings) == pytest.approx(0.1 + 0.4 * 0.5)
    assert [learning_rate(step, settings) for step in range(50, 101)] == pytest.approx([0.1] * 51)


def test_gpt1_starts_at_zero_and_reads_its_cosine_over_all_updates() -> None:
    settings = train(schedule="gpt1")
    assert learning_rate(1, settings) == 0
    assert learning_rate(6, settings) == pytest.approx(0.25)
    # the published code's cosine is not stretched to begin after the warm-up
    assert learning_rate(51, settings) == pytest.approx(0.5 * 0.5 * (1 + math.cos(math.pi * 0.5)))
    assert learning_rate(11, settings) == pytest.approx(0.5 * 0.5 * (1 + math.cos(math.pi * 0.1)))


def test_constant_stays_at_the_peak() -> None:
    assert {learning_rate(s, train(schedule="constant")) for s in range(11, 101)} == {0.5}


@pytest.mark.parametrize("schedule", ["cosine", "gpt1", "constant"])
def test_no_warm_up_divides_by_nothing(schedule: str) -> None:
    settings = train(schedule=schedule, warmup_steps=0, steps=1)
    assert math.isfinite(learning_rate(1, settings))
