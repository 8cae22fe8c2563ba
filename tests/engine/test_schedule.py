import math

import pytest

from fastgpt.config import TrainConfig
from fastgpt.engine.schedule import frozen_levels, learning_rate


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


def test_linear_is_the_schedule_of_gpt1s_fine_tuning() -> None:
    # min(x / 0.002, 1) (1 - x) with x the share of updates behind us, of 1,000 updates
    settings = train(schedule="linear", warmup_steps=0, warmup_share=0.002, steps=1000)
    found = [learning_rate(step, settings) for step in (1, 2, 3, 4, 501, 1000)]
    assert found == pytest.approx([0, 0.5 * 0.5 * 0.999, 0.5 * 0.998, 0.5 * 0.997, 0.25, 0.5 * 0.001])
    # of 90 updates the warm-up is a part of one
    short = train(schedule="linear", warmup_steps=0, warmup_share=0.002, steps=90)
    assert [learning_rate(step, short) for step in (1, 2)] == pytest.approx([0, 0.5 * 89 / 90])
    assert learning_rate(1, train(schedule="linear", warmup_steps=0)) == 0.5


def test_slanted_is_the_triangle_of_ulmfit() -> None:
    lr, ratio, steps, cut = 0.64, 32, 50, 5
    settings = train(schedule="slanted", warmup_steps=0, warmup_share=0.1, lr=lr, min_lr=lr / ratio, steps=steps)
    for t in range(steps):  # equation 3 of the paper, whose t is the number of updates behind us
        p = t / cut if t < cut else 1 - (t - cut) / (cut * (1 / 0.1 - 1))
        assert learning_rate(t + 1, settings) == pytest.approx(lr * (1 + p * (ratio - 1)) / ratio)


@pytest.mark.parametrize("schedule", ["cosine", "gpt1", "constant", "linear", "slanted"])
def test_no_warm_up_divides_by_nothing(schedule: str) -> None:
    settings = train(schedule=schedule, warmup_steps=0, steps=1)
    assert math.isfinite(learning_rate(1, settings))


def test_levels_are_unfrozen_one_by_one_from_the_top() -> None:
    settings = train(unfreeze_every=3)
    assert [frozen_levels(step, settings, 4) for step in range(1, 14)] == [3] * 3 + [2] * 3 + [1] * 3 + [0] * 4
    assert frozen_levels(1, train(), 4) == 0
