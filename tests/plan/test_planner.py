"""The choice of a layout, and the command."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.planning import GPT_2, PAGE, rendered, settings
from fastgpt.cli import main
from fastgpt.plan.hardware import GPUS
from fastgpt.plan.layout import as_configured
from fastgpt.plan.memory import FRAGMENTATION, RESERVE, fits, needed
from fastgpt.plan.planner import INDIFFERENT, Request, has_room, make_plan
from fastgpt.plan.speed import CASES, speed

CONFIGS = Path(__file__).parents[2] / "configs"
KEYS = {
    "per_gpu_bytes",
    "fits",
    "micro_batch_size",
    "zero_stage",
    "offload",
    "tokens_per_second",
    "mfu",
    "step_seconds",
    "communication_bytes_per_step",
    "checkpoint_bytes",
    "hours",
    "cost",
}


def planned(capsys: pytest.CaptureFixture[str], config: str, *words: str) -> dict[str, Any]:
    """The JSON of a command."""
    assert main(["plan", str(CONFIGS / f"{config}.yaml"), *words, "--json"]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


@pytest.mark.parametrize("config", sorted(path.stem for path in CONFIGS.glob("*.yaml") if "lstm" not in path.stem))
@pytest.mark.parametrize("gpus", ["1", "8", "1024"])
def test_every_shipped_model_has_a_plan_on_one_gpu_and_on_many(
    config: str, gpus: str, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = planned(capsys, config, "--gpus", gpus, "--gpu", "h100")
    assert set(plan) >= KEYS
    sizes = plan["per_gpu_bytes"]
    assert sizes["total"] == sum(size for kind, size in sizes.items() if kind != "total")
    assert set(plan["tokens_per_second"]) == {"low", "expected", "high"}
    assert plan["batch_tokens"] % int(gpus) == 0
    assert plan["fits"] == (config != "gpt3-175b" or gpus != "1")
    assert plan["hours"] * 3600 * plan["tokens_per_second"]["expected"] == pytest.approx(plan["tokens"])
    assert plan["cost"] == pytest.approx(plan["hours"] * int(gpus) * GPUS["h100"].hourly)


def test_the_chosen_micro_batch_is_the_largest_that_fits(capsys: pytest.CaptureFixture[str]) -> None:
    for name in GPT_2:
        config = settings(name, "")
        plan = make_plan(config, Request(8, "a100-40"))
        share = plan.layout.accumulation * plan.layout.micro_batch_size
        larger = [n for n in range(plan.layout.micro_batch_size + 1, share + 1) if share % n == 0]
        assert fits(plan.memory, plan.gpu.memory)
        for size in larger:
            layout = plan.layout._replace(micro_batch_size=size, accumulation=share // size)
            assert not fits(needed(config, layout), plan.gpu.memory)


@pytest.mark.parametrize(("graph", "gpus", "room"), [("true", 1, False), ("false", 1, True), ("true", 2, True)])
def test_a_process_alone_has_room_for_a_validation_beside_its_cuda_graph(graph: str, gpus: int, room: bool) -> None:
    config = settings("gpt2-124m", f"engine.cuda_graph={graph} engine.precision=bf16")
    layout = as_configured(config, gpus)
    memory = needed(config, layout)
    exact = GPUS["h100"]._replace(memory=int(memory.total * (1 + FRAGMENTATION) + RESERVE) + 1)
    assert has_room(config, layout, exact) is room
    logits = config.train.micro_batch_size * config.model.context * config.model.vocab_size * 2
    assert has_room(config, layout, exact._replace(memory=exact.memory + 2 * logits))


def test_a_higher_stage_must_be_faster_by_more_than_its_latency_might_cost() -> None:
    config = settings("gpt2-124m", "")
    plan = make_plan(config, Request(8, "h100"))
    sharded = plan.layout._replace(zero_stage=3)
    assert plan.layout.zero_stage == 1 and fits(needed(config, sharded), plan.gpu.memory)
    rate = speed(config, sharded, plan.gpu, plan.interconnect, CASES["expected"]).tokens_per_second
    assert 1 < rate / plan.speeds["expected"].tokens_per_second < 1 + INDIFFERENT


@pytest.mark.parametrize(
    ("asked", "offload"),
    [
        (["--gpus", "8"], "none"),
        (["--gpus", "1", "--gpu", "rtx4090"], "optimizer"),
        (["--gpus", "1", "--gpu", "rtx4090", "model.n_layer=400", "--host-memory", "400"], "optimizer+parameters"),
        (["--gpus", "1", "--gpu", "rtx4090", "model.n_layer=400", "--host-memory", "90"], "optimizer+parameters"),
    ],
)
def test_the_settings_that_a_plan_names_are_planned_the_same(
    asked: list[str], offload: str, capsys: pytest.CaptureFixture[str]
) -> None:
    best = planned(capsys, "gpt2-1558m", *asked)
    assert (best["offload"], best["fits"]) == (offload, True)
    assert main(["plan", str(CONFIGS / "gpt2-1558m.yaml"), *asked]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("settings ")]
    words = line.split()[1:]
    assert f"engine.zero_stage={best['zero_stage']}" in words
    assert ("engine.nvme_folder=FOLDER" in words) == ("90" in asked)
    again = planned(capsys, "gpt2-1558m", *asked, *words, "--as-configured")
    assert again == best


def test_what_is_offloaded_as_configured_is_planned(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--gpus", "2", "--gpu", "rtx4090", "--as-configured", "engine.zero_stage=3"]
    disk = ["engine.offload_optimizer=nvme", "engine.offload_parameters=nvme", "engine.nvme_folder=/fast"]
    host = ["engine.offload_optimizer=cpu", "engine.offload_parameters=cpu"]
    none, host_plan, disk_plan = (planned(capsys, "gpt2-1558m", *words, *more) for more in ([], host, disk))
    assert [plan["offload"] for plan in (none, host_plan, disk_plan)] == ["none", *["optimizer+parameters"] * 2]
    assert host_plan["per_gpu_bytes"] == disk_plan["per_gpu_bytes"] != none["per_gpu_bytes"]
    assert host_plan["host_bytes_per_gpu"] > disk_plan["host_bytes_per_gpu"] > none["host_bytes_per_gpu"] == 0
    assert disk_plan["step_seconds"] > host_plan["step_seconds"] > none["step_seconds"]


def test_offload_is_the_last_resort_and_needs_the_hosts_memory(capsys: pytest.CaptureFixture[str]) -> None:
    roomy = planned(capsys, "gpt2-1558m", "--gpus", "1", "--gpu", "h100")
    tight = planned(capsys, "gpt2-1558m", "--gpus", "1", "--gpu", "rtx4090")
    assert (roomy["offload"], roomy["host_bytes_per_gpu"]) == ("none", 0)
    assert (tight["offload"], tight["fits"]) == ("optimizer", True)
    assert tight["host_bytes_per_gpu"] == {1: 18, 2: 18, 3: 20}[tight["zero_stage"]] * tight["parameters"]
    assert tight["per_gpu_bytes"]["optimizer"] == 0
    poor = planned(capsys, "gpt2-1558m", "--gpus", "1", "--gpu", "rtx4090", "--host-memory", "20")
    assert (poor["offload"], poor["fits"]) == ("optimizer+parameters", True)  # to a disk
    assert poor["step_seconds"] > tight["step_seconds"]
    bare = planned(capsys, "gpt2-1558m", "--gpus", "1", "--gpu", "rtx4090", "--host-memory", "5")
    assert bare["fits"] is False
    assert "of 5 GB of host memory for each GPU" in bare["notes"][0]


def test_what_fits_nowhere_is_told_with_what_would_suffice(capsys: pytest.CaptureFixture[str]) -> None:
    plan = planned(capsys, "gpt3-175b", "--gpus", "1", "--gpu", "rtx4090")
    assert plan["fits"] is False
    (note,) = [note for note in plan["notes"] if "does not fit" in note]
    enough = int(note.split("; ")[1].split(" ")[0].replace(",", ""))
    assert planned(capsys, "gpt3-175b", "--gpus", str(enough), "--gpu", "rtx4090")["offload"] == "none"
    assert planned(capsys, "gpt3-175b", "--gpus", str(enough // 2), "--gpu", "rtx4090")["offload"] != "none"


def test_a_batch_that_gpus_cannot_share_is_planned_with_the_nearest_and_told(
    capsys: pytest.CaptureFixture[str],
) -> None:
    plan = planned(capsys, "gpt3-175b", "--gpus", "1024")
    assert plan["batch_tokens"] == 2048 * 2048
    assert "3,145,728 are 1,536 sequences, which 1,024 GPUs cannot share evenly" in plan["notes"][0]
    assert planned(capsys, "gpt3-175b", "--gpus", "512", "--as-configured")["notes"] == []


def test_a_ramp_that_gpus_cannot_share_is_told_and_counts_in_the_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    plan = planned(capsys, "gpt3-1.3b", "--gpus", "16", "--as-configured")
    assert plan["notes"] == [
        "train.batch_ramp_start: 65,536 tokens cannot be shared by 16 GPUs in micro-batches of 4; it must be a "
        "multiple of 131,072 that divides train.batch_tokens"
    ]
    assert plan["tokens"] == pytest.approx(300e9, rel=1e-5)


def test_tokens_price_network_and_disk_are_the_users(capsys: pytest.CaptureFixture[str]) -> None:
    usual = planned(capsys, "gpt2-1558m", "--gpus", "16")
    asked = planned(
        capsys, "gpt2-1558m", "--gpus", "16", "--tokens", "1e9", "--price", "2", "--network", "1", "--disk", "1"
    )
    assert asked["tokens"] == 1e9
    assert asked["cost"] == pytest.approx(asked["hours"] * 16 * 2)
    assert asked["interconnect"]["network_bytes_per_second"] == 1e9
    assert asked["tokens_per_second"]["expected"] < usual["tokens_per_second"]["expected"]
    assert asked["checkpoint_seconds"] == pytest.approx(2 * usual["checkpoint_seconds"])
    assert usual["checkpoint_bytes"] == 14 * usual["parameters"]
    assert usual["tokens_per_parameter"] == pytest.approx(100_000 * 524_288 / 1_557_611_200)


BAD = {
    "an unknown GPU": (["--gpu", "h1000"], "--gpu: 'h1000' is not known; allowed: h100, h200, "),
    "a GPU's slip": (["--gpu", "a100-800"], "Did you mean a100-80?"),
    "no GPUs": (["--gpus", "0"], "--gpus is 0; it must be an integer of 1 to 1,000,000"),
    "GPUs below none": (["--gpus=-3"], "--gpus is -3; it must be"),
    "a word for a number": (["--gpus", "many"], "invalid int value: 'many'"),
    "a price below nothing": (["--price=-1"], "--price is -1; it must be a number of at least 0"),
    "no tokens": (["--tokens", "0"], "--tokens is 0; it must be a number above 0"),
    "tokens that are no number": (["--tokens", "nan"], "--tokens is nan; it must be a number above 0"),
    "no node": (["--gpus-per-node", "0"], "--gpus-per-node is 0; it must be at least 1"),
    "many GPUs for one process": (["engine.kind=single"], "engine.kind: single runs on one GPU, not 8"),
    "a slip in a setting": (["model.n_layers=3"], "model.n_layers is not a setting. Did you mean model.n_layer?"),
    "an LSTM": (
        ["model.kind=lstm", "model.n_head=null"],
        "model.kind: fastgpt plan knows transformers alone, not lstm",
    ),
    "an option that does not exist": (["--gpuz", "3"], "--gpuz is not an argument"),
}


@pytest.mark.parametrize(("words", "said"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_line(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(CONFIGS / "gpt2-124m.yaml"), *words]) == 2
    output = capsys.readouterr()
    (line,) = output.err.splitlines()
    assert line.startswith("fastgpt: error: ")
    assert said in line
    assert output.out == ""


def test_a_missing_config_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "configs/gpt2-1558.yaml"]) == 2
    assert "no such file" in capsys.readouterr().err


def test_the_text_says_what_the_json_says(capsys: pytest.CaptureFixture[str]) -> None:
    plan = planned(capsys, "gpt3-175b", "--gpus", "1024")
    assert main(["plan", str(CONFIGS / "gpt3-175b.yaml"), "--gpus", "1024"]) == 0
    text = capsys.readouterr().out
    assert f"{plan['tokens_per_second']['expected']:,.0f}" in text
    assert f"{plan['per_gpu_bytes']['total'] / 1e9:.2f}  fits" in text
    assert f"ZeRO stage {plan['zero_stage']}, offload {plan['offload']}" in text
    assert f"train.micro_batch_size={plan['micro_batch_size']}" in text
    assert plan["notes"][0] in text


def test_a_plan_imports_nothing_heavy() -> None:
    program = (
        "import sys; from fastgpt.cli import main; code = main(sys.argv[1:]); "
        "print(code, [m for m in ('torch', 'triton', 'deepspeed', 'numpy', 'rich') if m in sys.modules])"
    )
    words = ["plan", str(CONFIGS / "gpt3-175b.yaml"), "--gpus", "1024"]
    outcome = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, check=True)
    assert outcome.stdout.splitlines()[-1] == "0 []"


def test_the_page_has_the_tables_that_the_code_makes() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert rendered(page) == page, "docs/planning.md is old: run python -m benchmarks.planning"
