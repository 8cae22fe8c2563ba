"""`fastgpt bench step` at toy size: who is measured, what is kept, and what a user is told."""

import contextlib
import importlib.util
import json
import math
import os
import sys
import time

import pytest
import torch
from fastgpt_kernels import load_ops

import fastgpt
from benchmarks import goals, gpu, report, results, start, step, step_contenders, step_table
from benchmarks.contenders import Unavailable
from benchmarks.step_contenders import ABOUT
from benchmarks.step_models import PlainGPT
from benchmarks.step_process import ContenderFailed, Process, TimeIsOver
from fastgpt.arguments import parse
from fastgpt.cli import main
from fastgpt.config import ModelConfig
from fastgpt.data.source import RandomSource
from fastgpt.engine.prepare import prepare
from fastgpt.engine.ranks import Ranks
from fastgpt.model.gpt import GPT
from fastgpt.settings import load_config
from fastgpt.sizes import flops_per_token, parameter_count

SETTINGS = """\
out: runs/toy
model: {n_layer: 2, n_head: 2, n_embd: 32, context: 32, vocab_size: 400}
data: {path: nowhere}
train: {steps: 9, batch_tokens: 128, micro_batch_size: 2, lr: 1e-2, warmup_steps: 5}
# one thread, because several tests run at once
engine: {threads: 1, precision: fp32, device: cpu}
"""
# what the benchmark asks of nanoGPT's model.py, and no more
NANOGPT = """\
from dataclasses import dataclass
import torch
from torch import nn
from torch.nn import functional as F

@dataclass
class GPTConfig:
    block_size: int = 1024
    vocab_size: int = 50304
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True

class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.table = nn.Embedding(config.vocab_size, config.n_embd)
        nn.init.normal_(self.table.weight, std=0.02)
        print(f"number of parameters: {sum(p.numel() for p in self.parameters())}")

    def forward(self, idx, targets=None):
        logits = self.table(idx) @ self.table.weight.T
        return logits, F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1))

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return torch.optim.AdamW(self.parameters(), lr=learning_rate, betas=betas, weight_decay=weight_decay)
"""
VERSIONS = {"torch": "2", "triton": "3"}
OPTIONAL = {"zero1": "deepspeed", "transformers": "transformers"}
MEASURED = [
    name
    for name in ("ours", "zero1", "plain", "plain-fp32", "transformers", "nanogpt")
    if name not in OPTIONAL or importlib.util.find_spec(OPTIONAL[name])
]


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A file of settings."""
    path = tmp_path_factory.mktemp("settings") / "toy.yaml"
    path.write_text(SETTINGS)
    return path


@pytest.fixture(scope="module")
def measured(command, toy, tmp_path_factory):
    """The results of a run of everybody whom a CPU runs without a compiler, and what it printed."""
    folder = tmp_path_factory.mktemp("measured")
    (folder / "model.py").write_text(NANOGPT)
    words = ["--contenders", ",".join(MEASURED), "--peer-path", folder, "--rounds", "2", "--commit", "abc1234"]
    done = command(sys.executable, "-m", "fastgpt", "bench", "step", toy, *words, "--out", folder / "results")
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = (folder / "results").iterdir()
    return path, results.read(path), done.stdout


def test_everybody_is_measured_in_one_run(measured):
    path, record, printed = measured
    part = record["parts"]["step-toy"]
    assert path.name == results.file_name(record["device"] + " toy", record["date"], "abc1234")
    assert part["outcome"] == "passed" and part["counts"] == {"passed": len(MEASURED)} and record["scale"] == "toy"
    assert [row["contender"] for row in part["benchmarks"]] == MEASURED
    assert part["session"]["gemm"] > 0 and part["session"]["copy"] > 0 and part["session"]["dtype"] == "float32"
    *table, outcome, last = printed.strip().splitlines()
    assert outcome == "step-toy: passed" and last == f"results: {path}"
    assert [line.split()[0] for line in table[-len(MEASURED) :]] == MEASURED


def test_a_row_says_how_it_was_measured_and_what_follows_from_it(measured, toy):
    _, record, _ = measured
    part = record["parts"]["step-toy"]
    for row in part["benchmarks"]:
        assert (row["operation"], row["case"], row["direction"]) == ("step", "toy T=32", "update")
        assert row["rounds"] == len(row["times"]) == 2 and row["min"] <= row["median"] and row["threads"] == 1
        assert row["tokens"] == 128 and row["tokens_per_second"] == 128 / row["median"]
        assert row["work"] == 128 * flops_per_token(load_config(toy).model)
        assert row["roof_share"] == row["work"] / row["median"] / part["session"]["gemm"]
        assert set(row["split"]) == set(step_table.PHASES) and all(x > 0 for x in row["split"].values())
        assert row["peak_bytes"] > 2**26 and "12 L C T" in row["formula"] and row["losses"][-1] < row["losses"][0]
        assert abs(row["first_loss"] - math.log(400)) < 1


def test_those_with_our_weights_begin_with_our_loss(measured):
    _, record, _ = measured
    first = {row["contender"]: row["first_loss"] for row in record["parts"]["step-toy"]["benchmarks"]}
    # both in float32, so much closer than the rounding that a run allows
    assert first["plain-fp32"] == pytest.approx(first["ours"], rel=1e-6)
    assert first.get("zero1", first["ours"]) == first["ours"]
    assert abs(first["plain"] - first["ours"]) <= step.allowed_difference(first["ours"])


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_the_plain_model_computes_what_ours_does(norm):
    shape = ModelConfig(n_layer=2, n_head=2, n_embd=32, context=16, vocab_size=50, norm=norm)
    plain, ours = PlainGPT(shape, seed=7), GPT(shape, load_ops("torch"))
    ours.load_state_dict(plain.state_dict())
    tokens = torch.randint(50, (3, 17))
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    torch.testing.assert_close(plain(inputs, targets.contiguous()), ours(inputs, targets=targets))


def test_an_engine_tells_its_phases_in_order(toy):
    config = load_config(toy)
    engine = prepare(
        lambda: GPT(config.model, load_ops("torch")), config, kind="single", precision="fp32",
        device=torch.device("cpu"), ranks=Ranks(),
    )  # fmt: skip
    seen = []

    class Phase:
        def __init__(self, name):
            seen.append(name)

        def __enter__(self): ...
        def __exit__(self, *_): ...

    engine.phases = Phase
    engine.update(next(RandomSource(400, 32, 2, 2, seed=0).batches(0)))
    assert seen == [*("data", "forward", "backward") * 2, "optimizer"]


class Answers:
    """A contender that answers at once, as it is told to."""

    def __init__(self, name, **told):
        self.told = {
            "open": {"threads": 1, "dtype": "fp32"},
            "roofs": {
                "gemm": 1e9,
                "copy": 1e9,
                "dtype": "float32",
                "peak": None,
                "clocks": {},
                "load": [0],
                "threads": 1,
            },
            "check": {"first": math.log(400), "losses": [6.0, 5.0], "seconds": 1.0},
            "time": {"seconds": 1.0, "loss": 5.0, "peak_bytes": 2**30},
            "split": {"forward": 0.4, "backward": 0.6},
        } | told
        self.name, self.asked, self.closed = name, [], False

    def begin(self, do, **arguments):
        self.asked.append(do)

    def answer(self, until):
        found = self.told[self.asked[-1]]
        return found(self) if callable(found) else found

    def ask(self, do, until, **arguments):
        self.begin(do)
        return self.answer(until)

    def printed(self):
        return ""

    def close(self):
        self.closed = True


@pytest.fixture
def faked(toy, tmp_path, monkeypatch):
    """Runs the benchmark with contenders that only answer; returns its exit code, the part's record and them."""

    def run(names, told=None, **options):
        started = []

        def start(self, name):
            started.append(Answers(name, **(told or {}).get(name, {})))
            return started[-1]

        monkeypatch.setattr(step.Session, "start", start)
        monkeypatch.setattr(gpu, "describe", lambda: {"device": "x", "cpu": "x", "kind": "cpu", "versions": VERSIONS})
        code = None
        with contextlib.suppress(KeyboardInterrupt):
            code = step.run(str(toy), contenders=names, out=str(tmp_path), commit="c", **options)
        assert all(process.closed for process in started)
        return code, results.read(next(tmp_path.glob("*.json")))["parts"]["step-toy"], started

    return run


def raises(problem, turn=1):
    """An answer to the given turn, and a good one to those before it."""

    def answer(process):
        if process.asked.count("time") >= turn:
            raise problem
        return {"seconds": 1.0, "loss": 5.0, "peak_bytes": 2**30}

    return answer


def test_a_run_that_is_cut_short_keeps_the_rounds_that_it_had(faked):
    code, part, _ = faked("ours,plain", {"plain": {"time": raises(KeyboardInterrupt(), turn=3)}})
    assert code is None and part["outcome"] == "stopped with the command"
    assert {row["contender"]: row["rounds"] for row in part["benchmarks"]} == {"ours": 3, "plain": 2}


@pytest.mark.parametrize("one_at_a_time", [False, True])
def test_contenders_take_turns_or_go_one_after_the_other(faked, one_at_a_time):
    code, part, (_, *both) = faked("plain,ours", rounds=4, one_at_a_time=one_at_a_time)
    assert code == 0 and [row["rounds"] for row in part["benchmarks"]] == [4, 4]
    assert [process.name for process in both] == ["ours", "plain"]
    turns = ["time", "split", "time", "time", "time", "split"]
    assert both[0].asked == both[1].asked == ["open", "check", *turns]


def test_time_that_is_over_is_told_where_nothing_was_measured(faked):
    late = {"check": lambda process: (_ for _ in ()).throw(TimeIsOver())}
    code, part, _ = faked("ours,plain,plain-fp32", {"plain": late, "ours": {"time": raises(TimeIsOver(), turn=2)}})
    assert part["counts"] == {"passed": 2, "no time left": 1}
    assert part["outcome"].startswith("out of time") and part["benchmarks"][0]["rounds"] == 1 and code == 0


@pytest.mark.parametrize(
    ("told", "reason"),
    [
        ({"first": math.log(400), "losses": [6.0, math.nan], "seconds": 1.0}, "its losses are"),
        ({"first": 8.0, "losses": [6.0, 5.0], "seconds": 1.0}, "random weights give about ln V = 5.9915"),
        ({"first": math.log(400), "losses": [6.0, 6.0], "seconds": 1.0}, "it does not learn"),
        ({"first": 6.2, "losses": [6.0, 5.0], "seconds": 1.0}, "and ours with the same weights"),
    ],
)
def test_numbers_that_no_gpt_has_are_a_failure(faked, told, reason):
    code, part, _ = faked("ours,plain", {"plain": {"check": told}})
    assert code == 0 and reason in part["problems"][0]["reason"] and "median" not in part["benchmarks"][1]


def test_a_failure_of_ours_fails_the_command(faked):
    code, part, _ = faked("ours,plain", {"ours": {"time": raises(ContenderFailed("out of memory"))}})
    assert code == 1 and part["outcome"] == "failed: ours: out of memory" and "median" in part["benchmarks"][1]


def test_a_process_that_dies_says_so_and_one_that_is_late_is_not_waited_for():
    spec = {"contender": "plain", "config": {}, "device": "cpu", "peer_path": None}
    process = Process(spec, cwd=str(gpu.ROOT), environment=gpu.child_environment())
    try:
        with pytest.raises(TimeIsOver):
            process.answer(time.time())
        with pytest.raises(ContenderFailed, match="exit code 1"):
            process.answer(time.time() + 200)
        assert "Field required" in process.printed()
    finally:
        process.close()
    with pytest.raises(ProcessLookupError):
        os.kill(process.pid, 0)


def test_a_label_keeps_measurements_of_a_file_apart(toy):
    plain, labelled = (step.case_of(str(toy), (), None, label) for label in ("", "zero"))
    assert (plain.name, plain.part) == ("toy T=32", "step-toy")
    assert (labelled.name, labelled.part) == ("toy T=32, zero", "step-toy-zero")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--contenders", "our"], "there is no 'our'. Did you mean ours?"),
        (["--contenders", "nanogpt"], "nanogpt needs --peer-path"),
        (["--contenders", ","], "nobody is named"),
        (["--label", "a b"], "must be of letters, digits and hyphens"),
        (["--peer-path", "."], "--peer-path: . is not a folder with nanoGPT's model.py"),
        (["model.kind=lstm", "model.n_head=null"], "model.kind: this benchmark knows transformers alone, not lstm"),
        (["train.stepz=3"], "train.stepz is not a setting. Did you mean train.steps?"),
        (["--rounds", "0"], "--rounds must be at least 1, not 0"),
        (["--seconds", "0"], "--seconds must be above 0, not 0"),
        (["--round", "2", "--peers", "x"], "--peers is not an argument"),
    ],
)
def test_a_mistake_is_one_line_with_exit_code_2(words, told, toy, tmp_path, capsys):
    assert main(["bench", "step", str(toy), "--out", str(tmp_path), *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("fastgpt: error: ") and told in line
    assert list(tmp_path.iterdir()) == []


def test_a_misspelt_benchmark_is_one_line(capsys):
    assert main(["bench", "stp", "x.yaml"]) == 2
    assert capsys.readouterr().err.strip().endswith("Did you mean step?")


def test_an_installed_package_without_the_repository_says_so(toy, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fastgpt, "__file__", str(tmp_path / "fastgpt" / "__init__.py"))
    assert main(["bench", "step", str(toy)]) == 2
    assert "part of the repository, not of an installed package" in capsys.readouterr().err


def test_peers_are_started_as_their_users_start_them(toy, monkeypatch):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    assert main(["bench", "step", str(toy), "--rounds", "0"]) == 2
    assert "OMP_WAIT_POLICY" not in gpu.child_environment()


def test_the_page_has_a_table_of_steps(measured):
    _, record, _ = measured
    page = report.page([record | {"scale": "cpu"}])
    assert "### Training steps" in page and "**toy T=32**: an update is 2 micro-batches of 2 x 32 tokens" in page
    rows = [line for line in page.splitlines() if line.startswith(tuple(f"| {name} |" for name in MEASURED))]
    assert len(rows) == len(MEASURED) and "| 1.00 |" in rows[0] and "### step" not in page


def test_the_goals_of_steps_are_judged_beside_the_compiled_model():
    def row(contender, seconds):
        about = {"operation": "step", "case": "gpt2-124m T=1024", "direction": "update", "contender": contender}
        return about | {"median": seconds, "tokens_per_second": 65_536 / seconds}

    verdicts = goals.judge([row("ours", 0.1), row("plain-compile", 0.13), row("plain-compile-cudnn", 0.12)])
    found = {verdict["goal"].partition(": ")[2]: verdict["reached"] for verdict in verdicts if verdict["measured"]}
    assert found == {
        "thousand tokens/s": True,
        "times as fast as plain PyTorch compiled": True,
        "times as fast as the same by cuDNN": False,
    }


@pytest.mark.parametrize(("seconds", "reached"), [(1.04, True), (1.06, False)])
def test_zero_on_one_rank_is_to_take_at_most_a_twentieth_more_than_the_single_engine(seconds, reached):
    about = {"operation": "step", "case": "gpt2-1558m T=1024", "direction": "update", "tokens_per_second": 1.0}
    medians = {"ours": 0.9, "ours-no-graph": 1.0, "zero1": seconds}
    rows = [about | {"contender": name, "median": median} for name, median in medians.items()]
    (verdict,) = (v for v in goals.judge(rows) if "ZeRO-1" in v["goal"])
    assert verdict["measured"] == 1.0 / seconds and verdict["reached"] is reached


@pytest.mark.parametrize("scale", ["gpu", "cpu", "toy"])
def test_every_part_of_the_gpus_turn_is_a_command_that_can_be_parsed(scale):
    def options_of(part):
        return parse([{gpu.LINES: "lines", gpu.UNTIL: "1.0"}.get(word, word) for word in part.command[3:]])

    (run,) = start.runs_of(options_of(gpu.start_for(scale)).config, options_of(gpu.start_for(scale)).overrides)
    assert run.name == "quickstart" and (parameter_count(run.config.model) < 1e6) is (scale == "toy")
    for part in gpu.steps_for(scale, None):
        options = options_of(part)
        case = step.case_of(str(gpu.ROOT / options.config), options.overrides, None)
        assert part.name == case.part
        assert options.contenders.startswith("ours,") and set(options.contenders.split(",")) <= set(ABOUT)
        assert step.chosen(options.contenders, case.job) == options.contenders.split(",")  # the order of their turns
    assert [part.name for part in gpu.steps_for("gpu", None)] == [f"step-{name}" for name in gpu.STEPS]


def test_who_cannot_take_part_says_why(faked):
    code, part, started = faked("liger,reference,ours-no-graph,plain")
    reasons = {row["contender"]: row.get("reason") for row in part["benchmarks"]}
    assert code == 0 and len(started) == 2  # the roofs, and who can
    assert reasons == {
        "reference": "ours runs PyTorch's operations already",
        "ours-no-graph": "ours has no CUDA graph already",
        "plain": None,
        "liger": "it needs a GPU",
    }


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("model.attention=alternating", "model.window=4"), "it has no windows in its attention"),
        (("model.embedding=table",), "it has no table of tokens and positions together"),
    ],
)
def test_only_ours_takes_part_with_a_model_that_the_others_have_not(toy, words, reason):
    job = step.case_of(str(toy), words, None).job
    step_contenders.check_available("ours", job)
    with pytest.raises(Unavailable, match=reason):
        step_contenders.check_available("plain", job)


def test_two_contenders_are_ours_but_for_one_setting(toy, monkeypatch):
    job = step.case_of(str(toy), (), None).job
    prepared = []

    def prepare(build, config, **_):
        prepared.append(config)

    monkeypatch.setattr(step_contenders, "set_up", lambda config, *_, **__: config.model_copy())
    monkeypatch.setattr(step_contenders, "prepare", prepare)
    for name in ("ours", "ours-compile", "ours-no-graph"):
        step_contenders.load(name, job)
    plain, compiled, without_graph = (config.model_dump() for config in prepared)
    assert (plain["engine"].pop("compile"), compiled["engine"].pop("compile")) == (False, True)
    assert plain == compiled
    assert (plain["engine"].pop("cuda_graph"), without_graph["engine"].pop("cuda_graph")) == (True, False)
    assert plain["engine"] | {"compile": False} == without_graph["engine"]
    assert "ours-compile" in step_contenders.defaults("cuda", None)
    with pytest.raises(Unavailable, match="ours is compiled already"):
        step_contenders.check_available("ours-compile", job._replace(config=prepared[1]))


def test_lines_of_a_part_are_what_the_results_read(faked, toy, tmp_path, monkeypatch):
    monkeypatch.setattr(step.Session, "start", lambda self, name: Answers(name))
    path = tmp_path / "lines.jsonl"
    assert step.run(str(toy), contenders="ours,liger", lines=path, until=time.time() + 60) == 0
    part = results.part_of(results.lines_of(path))
    assert part["counts"] == {"passed": 1, "skipped": 1} and part["benchmarks"][0]["rounds"] == step.ROUNDS
    assert json.dumps(part)
