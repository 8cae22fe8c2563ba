import logging

import pytest
import torch

from fastgpt.engine import precision
from fastgpt.engine.precision import LossScale, resolve_device, resolve_precision, told_of_divergence
from fastgpt.errors import SharedError, UserError

CPU = torch.device("cpu")


def test_the_scale_halves_at_an_overflow_and_doubles_after_a_clean_window() -> None:
    scale = LossScale(scale=8.0, window=3)
    scale.update(overflow=True)
    assert scale.scale == 4.0
    for _ in range(3):
        scale.update(overflow=False)
    assert scale.scale == 4.0
    scale.update(overflow=False)
    assert scale.scale == 8.0
    for _ in range(3):
        scale.update(overflow=False)
    assert scale.scale == 16.0


def test_an_overflow_starts_the_window_anew() -> None:
    scale = LossScale(scale=8.0, window=2)
    for overflow in (False, False, True, False, False):
        scale.update(overflow=overflow)
    assert scale.scale == 4.0


def test_an_overflow_at_the_smallest_scale_is_a_diverged_run() -> None:
    with pytest.raises(UserError, match="diverged"):
        LossScale(scale=1.0).update(overflow=True)


def test_the_scale_follows_deepspeeds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both engines must scale alike: the same history through DeepSpeed's scaler with the settings it is given."""
    scaler_module = pytest.importorskip("deepspeed.runtime.fp16.loss_scaler")
    monkeypatch.setattr(scaler_module.dist, "get_rank", lambda: 0)  # it logs on rank 0
    theirs = scaler_module.DynamicLossScaler(
        init_scale=2.0**6,
        scale_window=4,
        min_scale=1.0,
        delayed_shift=1,
        consecutive_hysteresis=False,
        raise_error_at_min_scale=True,
        dtype=torch.float16,
    )
    ours = LossScale(scale=2.0**6, window=4)
    history = [False] * 9 + [True, True] + [False] * 3 + [True] + [False] * 13
    for overflow in history:
        theirs.update_scale(overflow)
        ours.update(overflow)
        assert ours.scale == theirs.cur_scale
        assert ours.clean == theirs.cur_iter - theirs.last_overflow_iter - 1
    with pytest.raises(SharedError, match="diverged"):
        for _ in range(20):
            ours.update(overflow=True)
    with pytest.raises(SharedError, match=r"the run has diverged\. Lower train\.lr"), told_of_divergence():
        for _ in range(20):
            theirs.update_scale(True)


def test_only_a_loss_scale_at_its_end_is_a_diverged_run() -> None:
    with pytest.raises(RuntimeError, match="a bug"), told_of_divergence():
        raise RuntimeError("a bug")


def test_fp16_on_a_cpu_is_refused() -> None:
    with pytest.raises(UserError, match="fp16 needs a GPU"):
        resolve_precision("fp16", CPU)


@pytest.mark.parametrize(("bf16_seconds", "chosen"), [(1.0, "bf16"), (1.9, "fp32"), (3.0, "fp32")])
def test_auto_is_what_multiplies_faster_and_says_why(
    bf16_seconds: float, chosen: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    seconds = {torch.float32: 2.0, torch.bfloat16: bf16_seconds}
    monkeypatch.setattr(precision, "product_seconds", seconds.__getitem__)
    with caplog.at_level(logging.INFO):
        assert resolve_precision("auto", CPU) == chosen
    assert f"auto: {chosen}, because bf16 products are {2.0 / bf16_seconds:.1f} times as fast" in caplog.text


def test_products_are_timed() -> None:
    assert 0.0 < precision.product_seconds(torch.float32) < 10.0


def test_a_gpu_that_is_not_there_is_refused() -> None:
    with pytest.raises(UserError, match=r"engine\.device: cuda:99 asks for GPU 99"):
        resolve_device("cuda:99")
