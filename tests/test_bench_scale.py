"""`fastgpt bench scale` at toy size: what is measured and counted, and what a user is told."""

import io
import json
import math
import sys
import time
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from fastgpt_kernels import load_ops

from benchmarks import gpu, planning, report, results, scale, scale_group, scale_table, scale_worker
from benchmarks.live_bytes import LiveBytes
from benchmarks.resident import resident_bytes, resident_set
from benchmarks.step_process import ContenderFailed, TimeIsOver
from benchmarks.traffic import Traffic
from fastgpt.cli import main
from fastgpt.data.source import RandomSource
from fastgpt.engine.prepare import prepare
from fastgpt.engine.ranks import Ranks
from fastgpt.model.gpt import GPT
from fastgpt.settings import load_config
from fastgpt.sizes import parameter_count

SETTINGS = """\
out: runs/toy
model: {n_layer: 2, n_head: 2, n_embd: 32, context: 32, vocab_size: 400}
data: {path: nowhere}
train: {steps: 9, batch_tokens: 256, micro_batch_size: 2, lr: 1e-2, warmup_steps: 5}
# one thread, because several tests run at once
engine: {threads: 1, precision: bf16, device: cpu}
"""
# bytes: each of the parameters keeps a number, how many updates it has had
PARAMETERS_COUNT_UPDATES = 8 * 28
ZERO = [f"zero{stage}" for stage in range(4)]


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A file of settings."""
    path = tmp_path_factory.mktemp("settings") / "toy.yaml"
    path.write_text(SETTINGS)
    return path


def measure(command, toy, folder, *words):
    """The part of the results file of a run, and what it printed."""
    done = command(sys.executable, "-m", "fastgpt", "bench", "scale", toy, *words, "--out", folder)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.iterdir()
    return results.read(path), done.stdout


def test_one_process_is_measured_beside_the_plan(toy, tmp_path):
    path = tmp_path / "lines.jsonl"
    words = ["--ranks", "1", "--engines", "single", "--rounds", "2", "--lines", str(path)]
    assert main(["bench", "scale", str(toy), *words]) == 0
    (row,) = results.lines_of(path)
    assert row["outcome"] == "passed"
    assert (row["contender"], row["direction"], row["case"]) == ("single", "1 rank", "toy N=32 T=32")
    assert row["settings"] == ["toy"]
    assert row["rounds"] == 2 and row["tokens"] == 256 and row["tokens_per_second"] == 256 / row["median"]
    assert row["communication"]["counted_total"] == row["communication"]["planned_total"] == 0
    counted, planned = row["memory"]["counted"], row["memory"]["planned"]
    assert counted["weights"] == planned["weights"]
    assert 0 <= counted["optimizer"] - planned["optimizer"] <= PARAMETERS_COUNT_UPDATES
    assert counted["between"] < counted["peak"]
    assert min(counted["resident_set_growth"]) > 0
    assert row["losses"][-1] < row["losses"][0]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(("precision", "numbers"), [("bf16", (2, 4)), ("fp32", (2,))])
def test_every_stage_sends_what_the_plan_says(command, toy, tmp_path, precision, numbers):
    words = ["--ranks", ",".join(map(str, (1, *numbers))), "--rounds", "1", f"engine.precision={precision}"]
    record, printed = measure(command, toy, tmp_path, *words)
    (part,) = record["parts"].values()
    assert part["outcome"] == "passed" and record["scale"] == "toy"
    rows = {(row["contender"], row["direction"]): row for row in part["benchmarks"]}
    directions = ["1 rank", *(f"{mode}, {ranks} ranks" for ranks in numbers for mode in ("strong", "weak"))]
    assert set(rows) == {("single", "1 rank"), *((name, direction) for name in ZERO for direction in directions)}
    for (name, direction), row in rows.items():
        sent = row["communication"]
        if name == "zero3" and row["ranks"] > 1:
            # so small a model is kept gathered: its weights are sent once, after the update
            assert sent["counted"]["reduce-scatter"] == sent["planned"]["reduce-scatter of gradients"]
        else:
            # and a few numbers beside: whether gradients overflowed, the norm
            assert sent["planned_total"] <= sent["counted_total"] <= sent["planned_total"] + 1000, (name, direction)
        assert (row["efficiency"] is None) == (row["ranks"] == 1)
        counted, planned = row["memory"]["counted"], row["memory"]["planned"]
        assert counted["optimizer"] == pytest.approx(planned["optimizer"], rel=0.01), (name, direction)
    assert "zero3" in printed


@pytest.mark.slow
@pytest.mark.distributed
def test_gpt2s_deepest_stack_is_built_sharded_and_updated_beside_its_plan(command, tmp_path):
    """Narrow, on two ranks; docs/planning.md has the widest that a small machine could hold."""
    narrow = ("model.n_embd=64", "model.n_head=1", "model.context=64", "model.dropout=0", "train.micro_batch_size=1")
    words = [
        *narrow,
        "train.batch_tokens=256",
        "engine.threads=1",
        "--ranks",
        "2",
        "--engines",
        "zero3",
        "--rounds",
        "1",
    ]
    record, _ = measure(command, gpu.ROOT / "configs" / "gpt2-1558m.yaml", tmp_path, *words)
    (part,) = record["parts"].values()
    strong, weak = part["benchmarks"]
    assert (strong["mode"], weak["mode"]) == ("strong", "weak") and strong["case"].endswith("N=64 T=64 recomputed")
    counted, planned = strong["memory"]["counted"], strong["memory"]["planned"]
    assert counted["optimizer"] == pytest.approx(planned["optimizer"], rel=0.01)
    assert min(counted["resident_set_growth"]) > counted["peak"] / 2
    row = planning.layout_row(strong)
    assert row[0] == strong["case"] and len(row) == planning.zero_table().split("\n")[0].count("|") - 1
    print(row)


def test_the_traffic_of_a_collective_is_what_a_ring_of_four_sends():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with Traffic(4) as traffic:
            x, y = torch.zeros(100), torch.zeros(100)
            dist.all_reduce(x)
            dist.all_gather([x], y)
            dist.reduce_scatter(x, [y])
            dist.broadcast(x.bfloat16(), 0)
            _ = x + y
        assert traffic.sent == {"all-reduce": 600, "all-gather": 300, "reduce-scatter": 300, "broadcast": 150}
        assert traffic.calls == dict.fromkeys(traffic.sent, 1)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(("precision", "weights", "optimizer", "sums"), [("bf16", 2, 12, 4), ("fp32", 4, 8, 0)])
def test_what_stays_between_updates_is_counted_by_kind(toy, precision, weights, optimizer, sums):
    config = load_config(toy)
    with LiveBytes() as live:
        engine = prepare(
            lambda: GPT(config.model, load_ops("torch")), config, kind="single", precision=precision,
            device=torch.device("cpu"), ranks=Ranks(),
        )  # fmt: skip
        _ = engine.update(next(RandomSource(400, 32, 2, 4, seed=0).batches(0))).update
    parameters = parameter_count(config.model)
    found = resident_bytes(engine)
    assert found["weights"] == weights * parameters
    assert 0 <= found["optimizer"] - optimizer * parameters <= PARAMETERS_COUNT_UPDATES
    assert live.live == found["weights"] + found["optimizer"] + sums * parameters
    now, most = resident_set()
    assert 0 < now <= most


def test_a_loss_scale_that_is_too_large_is_halved_until_an_update_is_applied(toy):
    config = load_config(toy)
    engine = prepare(
        lambda: GPT(config.model, load_ops("torch")), config, kind="single", precision="fp16",
        device=torch.device("cpu"), ranks=Ranks(),
    )  # fmt: skip
    worker = scale_worker.Worker.__new__(scale_worker.Worker)  # a process of its own would refuse fp16 on a CPU
    worker.engine, worker.config, worker.single, worker.ranks = engine, config, True, Ranks()
    worker.answers = io.StringIO()
    worker.overflow()
    found = json.loads(worker.answers.getvalue())["scaling"]
    assert found["from"] == 2.0**40 and found["skipped"] > 10
    assert found["to"] == found["from"] / 2 ** found["skipped"] == engine._scale.scale


OPENED = {"opened": {"dtype": "bf16", "threads": 1, "seconds": 1.0}}
CHECK = {"check": {"first": math.log(400), "losses": [6.0, 5.0], "applied": [True, True]}}
MEMORY = {
    "memory": {"weights": 1, "optimizer": 2, "between": 3, "peak": 4, "resident_set_growth": [5]},
}
MEASURED = [OPENED, CHECK, MEMORY]


def turns(strong, weak=None):
    """What a layout tells of a round."""
    return [
        {"time": {"mode": mode, "seconds": seconds, "loss": 5.0, "calls": 1}}
        for mode, seconds in (("strong", strong), ("weak", weak))
        if seconds
    ]


@pytest.fixture
def told(monkeypatch):
    """Lets layouts tell what a test says, by engine and ranks; returns what is asked of them."""

    def install(answers):
        class Told:
            def __init__(self, spec, ranks, **_):
                engine = spec["config"]["engine"]
                kind = "single" if engine["kind"] == "single" else f"zero{engine['zero_stage']}"
                self.lines = answers[kind, ranks]

            def answers(self, until) -> Iterator[dict]:
                for line in self.lines:
                    if isinstance(line, Exception):
                        raise line
                    yield line

            def printed(self):
                return "its last words"

            def close(self): ...

        monkeypatch.setattr(scale, "Group", Told)

    return install


def session_of(toy, engines, ranks, end=math.inf, **settings):
    case = scale.case_of(str(toy), [f"{key.replace('__', '.')}={value}" for key, value in settings.items()])
    found = scale.Session(case, engines, ranks, 1, end)
    found.measure()
    return found


def test_efficiency_is_the_work_of_a_rank_beside_that_of_one(toy, told):
    told({("zero1", 1): [*MEASURED, *turns(8.0)], ("zero1", 2): [*MEASURED, *turns(5.0, 10.0)]})
    rows = {row["direction"]: row for row in session_of(toy, ["zero1"], [1, 2]).lines()}
    assert rows["1 rank"]["efficiency"] is None
    assert rows["strong, 2 ranks"]["efficiency"] == 0.8 and rows["weak, 2 ranks"]["efficiency"] == 0.8
    assert rows["strong, 2 ranks"]["tokens"] == 256 and rows["weak, 2 ranks"]["tokens"] == 512
    planned = {direction: row["communication"]["planned_total"] for direction, row in rows.items()}
    assert planned["1 rank"] == 0 < planned["strong, 2 ranks"] == planned["weak, 2 ranks"]


@pytest.mark.parametrize(
    ("check", "reason"),
    [
        ({"losses": [6.0, math.nan]}, "its losses are"),
        ({"first": 2.0}, "random weights give about ln V"),
        ({"losses": [6.0, 6.1]}, "it does not learn"),
        ({"losses": [6.2, 5.0]}, "its first batch has loss 6.200000, and 6.000000 on single on 1 rank"),
    ],
)
def test_a_layout_that_does_not_train_as_the_first_fails_and_the_others_go_on(toy, told, check, reason):
    wrong = {"check": CHECK["check"] | check}
    told(
        {
            ("single", 1): [*MEASURED, *turns(1.0)],
            ("zero1", 1): [OPENED, wrong, MEMORY, *turns(1.0)],
            ("zero2", 1): [*MEASURED, *turns(1.0)],
        }
    )
    found = session_of(toy, ["single", "zero1", "zero2"], [1])
    rows = {row["contender"]: row for row in found.lines()}
    assert {name: row["outcome"] for name, row in rows.items()} == {
        "single": "passed", "zero1": "failed", "zero2": "passed",
    }  # fmt: skip
    assert reason in rows["zero1"]["reason"] and found.failure().startswith("zero1 on 1 rank: ")


def test_time_that_is_over_leaves_what_was_measured(toy, told):
    told(
        {
            ("single", 1): [*MEASURED, *turns(1.0), TimeIsOver()],
            ("zero1", 1): [OPENED, TimeIsOver()],
            ("zero2", 1): [OPENED, ContenderFailed("rank 0 ended with signal 9")],
            ("zero2", 2): [*MEASURED, *turns(1.0), ContenderFailed("rank 1 ended with signal 9")],
        }
    )
    late = session_of(toy, ["zero2"], [2])
    assert [(line["direction"], line["outcome"]) for line in late.lines()] == [
        ("weak, 2 ranks", "failed"), ("strong, 2 ranks", "passed"),
    ]  # fmt: skip
    found = session_of(toy, ["single", "zero1", "zero2"], [1])
    part = results.part_of(found.lines())
    assert part["counts"] == {"passed": 1, results.NO_TIME: 1, "failed": 1}
    assert [row.get("reason") for row in part["benchmarks"]] == [None, results.NO_TIME, "rank 0 ended with signal 9"]
    late = session_of(toy, ["single"], [1], end=time.time() - 1)
    assert [line["reason"] for line in late.lines()] == [results.NO_TIME]


def test_what_a_cpu_cannot_run_says_why(toy, told):
    told({})
    found = session_of(toy, ["single", "zero1"], [1], engine__precision="fp16")
    assert {line["reason"] for line in found.lines()} == {"fp16 needs a GPU"} and found.failure() is None
    found = session_of(toy, ["single-no-graph"], [1])
    assert [line["reason"] for line in found.lines()] == ["the single engine has no CUDA graph on a CPU"]


def test_the_tables_show_speed_traffic_memory_and_met_overflows(toy, told):
    traffic = {"traffic": {"mode": "strong", "sent": {"all-reduce": 2_000_000}, "calls": {"all-reduce": 1}}}
    scaling = {"scaling": {"from": 2.0**40, "to": 2.0**20, "skipped": 20}}
    told({("zero1", 1): [*MEASURED, *turns(8.0)], ("zero1", 2): [OPENED, scaling, CHECK, MEMORY, traffic, *turns(5.0)]})
    lines = [dict(line) for line in session_of(toy, ["zero1"], [1, 2]).lines()]
    record = {"scale": "cpu", "kind": "cpu", "device": "x", "commit": "y", "environment": {"versions": {}}}
    part = {
        "outcome": "passed",
        "started": "now",
        "seconds": 1,
        "limit": None,
        "problems": [],
        **results.part_of(lines),
    }
    record["environment"]["versions"] = {"torch": "2", "triton": "3"}
    page = report.page([record | {"parts": {"scale-toy": part}}])
    assert "### Scaling" in page and "| zero1 | 2 | strong | 51 | 5000 ± 0 | 80% | 2.000 |" in page
    assert (
        "zero1: from a loss scale of 1.09951e+12, 20 updates were skipped; the next was applied at 1.04858e+06" in page
    )
    assert any("39,296 parameters in bf16" in line for line in scale_table.summary_of(part["benchmarks"]))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--engines", "zero4"], "--engines: there is no 'zero4'. Did you mean zero3?"),
        (["--engines", ","], "--engines: nobody is named. There are single, single-no-graph, zero0"),
        (["--ranks", "two"], "--ranks: 'two' is not a list of numbers above 0, as 1,2,4 is"),
        (["--ranks", "0"], "--ranks: '0' is not a list of numbers above 0"),
        (["--ranks", "3"], "--ranks: 4 micro-batches an update cannot be shared by 3 ranks"),
        (["--rounds", "0"], "--rounds must be at least 1, not 0"),
        (["model.kind=lstm", "model.n_head=null"], "model.kind: this benchmark knows transformers alone, not lstm"),
        (["train.stepz=1"], "train.stepz is not a setting"),
        (
            ["engine.offload_optimizer=cpu", "--engines", "zero0"],
            "--engines: zero0 cannot be measured with these settings: needs engine.zero_stage 1, 2 or 3, not 0",
        ),
    ],
)
def test_what_cannot_be_asked_for_is_one_line(toy, capsys, words, message):
    assert main(["bench", "scale", str(toy), *words]) == 2
    assert message in capsys.readouterr().err


def test_a_rank_that_dies_is_told_of_and_the_others_end(monkeypatch, tmp_path):
    """The first rank waits for the second, which is gone."""
    program = tmp_path / "mortal.py"
    program.write_text("import os, sys, time\nsys.exit(3) if os.environ['RANK'] == '1' else time.sleep(60)\n")
    monkeypatch.setattr(scale_group, "WORKER", "mortal")
    environment = gpu.child_environment() | {"PYTHONPATH": str(tmp_path)}
    group = scale_group.Group({}, 2, cwd=str(tmp_path), environment=environment)
    with pytest.raises(ContenderFailed, match="rank 1 ended with exit code 3"):
        list(group.answers(time.time() + 60))
    group.close()
    assert [rank.poll() for rank in group._ranks] == [-9, 3]
    late = scale_group.Group({}, 1, cwd=str(tmp_path), environment=environment)
    with pytest.raises(TimeIsOver):
        list(late.answers(time.time() + 0.1))
    late.close()


def test_what_offloads_is_compared_with_one_process_that_does_not(toy):
    case = scale.case_of(str(toy), ["engine.offload_optimizer=cpu"])
    assert case.name == "toy N=32 T=32 offload"
    assert scale.chosen_engines(None, case) == ["single", "zero1", "zero2", "zero3"]
    found = scale.Session(case, ["single", "zero2"], [1], 1)
    assert [each.config.engine.offload_optimizer for each in found.layouts] == ["none", "cpu"]


def test_the_parts_of_a_gpu_keep_within_their_time_and_name_what_there_is():
    for size in ("gpu", "toy"):
        for part in gpu.scales_for(size):
            words = list(part.command)
            engines = words[words.index("--engines") + 1]
            assert gpu.LINES in words and gpu.UNTIL in words
            start = words.index("scale") + 1
            overrides = [word for word in words[start + 1 :] if "=" in word]
            case = scale.case_of(str(gpu.ROOT / words[start]), overrides)
            assert scale.chosen_engines(engines, case) == engines.split(",")
    assert json.loads(json.dumps(gpu.SCALES)) and math.isclose(sum(part.share for part in gpu.scales_for("gpu")), 1.0)
