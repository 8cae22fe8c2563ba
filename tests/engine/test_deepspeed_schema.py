"""A user's own keys of DeepSpeed's configuration: what is known, and what is said of the rest."""

from pathlib import Path
from typing import Any

import pytest

from fastgpt.cli import main
from fastgpt.config import Config
from fastgpt.engine.deepspeed_schema import Asked, check_further_keys
from fastgpt.engine.deepspeed_settings import our_settings
from fastgpt.errors import UserError
from fastgpt.settings import read_settings
from fastgpt.wording import Places

SMALL = """\
out: runs/x
model: {n_layer: 2, n_head: 2, n_embd: 32, context: 16, vocab_size: 300}
data: {path: stdlib}
train: {steps: 3, batch_tokens: 64, micro_batch_size: 2, lr: 3e-4}
engine:
  deepspeed:
"""


def load(folder: Path, *lines: str) -> tuple[Config, Places]:
    path = folder / "mine.yaml"
    path.write_text(SMALL + "".join(f"    {line}\n" for line in lines))
    return read_settings(Config, path)


def check(config: Config, places: Places) -> None:
    parse: Any = pytest.importorskip("deepspeed.runtime.config").DeepSpeedConfig
    check_further_keys(our_settings(config, "bf16", 1), config.engine.deepspeed, parse, places.of)


@pytest.mark.parametrize(
    "lines",
    [
        ["wall_clock_breakdown: true"],
        ["communication_data_type: bf16"],
        ["aio: {block_size: 262144, queue_depth: 16}"],
        ["comms_logger: {enabled: true, verbose: true}"],
        ["flops_profiler: {enabled: true, profile_step: 2}"],
        ["tensorboard: {enabled: false}"],
        ["timers: {throughput: {enabled: true}}"],
        ["zero_optimization: {stage3_param_persistence_threshold: 0, sub_group_size: 1000}"],
        ["zero_optimization: {param_persistence_threshold: 0, round_robin_gradients: true}"],
        ["zero_optimization: {offload_optimizer: {pin_memory: false}, offload_param: {max_in_cpu: 0}}"],
    ],
)
def test_deepspeeds_own_keys_are_taken(lines: list[str], tmp_path: Path) -> None:
    check(*load(tmp_path, *lines))


# each mistake, and what its one line must say; the first line of the section is the 7th of the file
MISTAKES = {
    "a slip at the top, which DeepSpeed would not notice": (
        ["wall_clock_breakdwn: true"],
        "7: engine.deepspeed.wall_clock_breakdwn is not a key of DeepSpeed's. "
        "Did you mean engine.deepspeed.wall_clock_breakdown?",
    ),
    "a slip in a section": (
        ["comms_logger: {enabled: true}", "zero_optimisation: {sub_group_size: 3}"],
        "8: engine.deepspeed.zero_optimisation is not a key of DeepSpeed's. "
        "Did you mean engine.deepspeed.zero_optimization?",
    ),
    "a slip near a key that is ours": (
        ["gradient_cliping: 1"],
        "7: engine.deepspeed.gradient_cliping is not a key of DeepSpeed's. "
        "Did you mean engine.deepspeed.gradient_clipping? That is not set there: use train.clip",
    ),
    "a slip in a section that DeepSpeed looks up key by key": (
        ["aio:", "  block_siz: 3"],
        "8: engine.deepspeed.aio.block_siz is not a key of DeepSpeed's. Did you mean engine.deepspeed.aio.block_size?",
    ),
    "a slip in a section that is a model": (
        ["zero_optimization:", "  sub_group_size: 3", "  stage3_max_live_parameter: 3"],
        "9: engine.deepspeed.zero_optimization.stage3_max_live_parameter is not a key of DeepSpeed's. "
        "Did you mean engine.deepspeed.zero_optimization.stage3_max_live_parameters?",
    ),
    "a slip in a model within a model": (
        ["zero_optimization:", "  offload_param:", "    max_in_cp: 3"],
        "9: engine.deepspeed.zero_optimization.offload_param.max_in_cp is not a key of DeepSpeed's. "
        "Did you mean engine.deepspeed.zero_optimization.offload_param.max_in_cpu?",
    ),
    "a slip in a model that DeepSpeed makes of several sections": (
        ["tensorboard: {enabledd: true}"],
        "7: engine.deepspeed.tensorboard.enabledd is not a key of DeepSpeed's. "
        "Did you mean engine.deepspeed.tensorboard.enabled?",
    ),
    "text for a number": (
        ["zero_optimization: {sub_group_size: abc}"],
        "7: engine.deepspeed.zero_optimization.sub_group_size is 'abc', which DeepSpeed refuses: Input should be a",
    ),
    "an unknown word": (
        ["aio: {block_size: 3}", "communication_data_type: bf17"],
        "8: engine.deepspeed.communication_data_type is refused by DeepSpeed: Invalid communication_data_type.",
    ),
    "a number for a section": (["aio: 3"], "7: engine.deepspeed.aio is refused by DeepSpeed: "),
    "a number for a section of ours": (
        ["zero_optimization: 3"],
        "7: engine.deepspeed.zero_optimization is refused by DeepSpeed: ",
    ),
    "a section that DeepSpeed has no longer": (
        ["amp: {enabled: true}"],
        "7: engine.deepspeed.amp is refused by DeepSpeed: NVIDIA Apex AMP integration has been removed.",
    ),
    "a key that nobody would come upon": (["xyzzy: 1"], "7: engine.deepspeed.xyzzy is not a key of DeepSpeed's."),
}


@pytest.mark.parametrize(("lines", "said"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_is_told_with_its_line_and_the_right_spelling(lines: list[str], said: str, tmp_path: Path) -> None:
    config, places = load(tmp_path, *lines)
    with pytest.raises(UserError) as caught:
        check(config, places)
    assert str(caught.value).startswith(f"{tmp_path / 'mine.yaml'}:{said}")
    assert "\n" not in str(caught.value)


def test_the_command_says_so_before_anything_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("deepspeed")
    path = tmp_path / "mine.yaml"
    path.write_text(SMALL + "    wall_clock_breakdwn: true\n")
    assert main(["train", str(path), "engine.kind=deepspeed", f"out={tmp_path / 'run'}", "engine.device=cpu"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"fastgpt: error: {path}:7: engine.deepspeed.wall_clock_breakdwn is not a key")
    assert not (tmp_path / "run").exists()


def test_a_configuration_remembers_what_it_was_asked_for() -> None:
    asked = Asked({"a": 1, "b": {"c": 2, "d": 3}})
    assert "x" not in asked and asked.get("y", 5) == 5 and asked.get("a") == 1 and "z" not in asked.keys()  # noqa: SIM118
    assert asked.asked == {"x", "y", "a", "z"} and not asked.whole
    inner = asked["b"]
    assert dict(**inner) == {"c": 2, "d": 3}
    assert inner.whole and asked.last_whole == ("b",)
