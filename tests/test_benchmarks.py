"""The benchmarks and the command of the GPU's turn, at toy size: that each part measures, checks, and loses nothing."""

import json
import math
import os
import re
import sys
import time
from contextlib import nullcontext, suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fastgpt_kernels import Ops, load_ops
from fastgpt_kernels.native.library import reasons_against
from fastgpt_kernels.native.peak import peak_flops
from fastgpt_kernels.reference import visible

from benchmarks import (
    conftest,
    contenders,
    goals,
    gpu,
    masks,
    report,
    results,
    roofs,
    sanitizer,
    sanitizer_case,
    shapes,
    table,
    timing,
)
from benchmarks.gpu import Part

ROOT = Path(__file__).parents[1]
OPERATIONS = {*Ops._fields[1:], "adamw", "grad_norm"}
# as the names of README.md's table of models
PARAMETERS = {"gpt2-124m": 124_439_808, "gpt2-355m": 354_823_168, "gpt2-774m": 774_030_080, "gpt2-1558m": 1_557_611_200}
on_a_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU measures instead of showing that it would")


@pytest.fixture(scope="module")
def toys(command, tmp_path_factory):
    """The lines of all suites at toy size."""
    path = tmp_path_factory.mktemp("toys") / "lines.jsonl"
    suites = [
        f"benchmarks/test_{n}.py" for n in ("attention", "norms", "gelu", "dropout", "embedding", "losses", "optimizer")
    ]
    options = ["-n", "0", "-q", "--benchmark-enable", "--benchmark-quiet", "--scale", "toy"]
    done = command(sys.executable, "-m", "pytest", *options, "-p", "benchmarks.lines", "--lines", path, *suites)
    assert done.returncode == 0, done.stdout + done.stderr
    return results.lines_of(path)


@on_a_cpu
def test_every_operation_is_measured_by_both_who_can_run_on_a_cpu(toys):
    measured = {(line["operation"], line["contender"]) for line in toys if "median" in line}
    assert measured == {(operation, name) for operation in OPERATIONS for name in ("torch", "eager")}


@on_a_cpu
def test_a_measurement_says_how_it_was_made_and_what_follows_from_it(toys):
    for line in (line for line in toys if "median" in line):
        assert line["numbers"] == "as close as PyTorch"
        assert line["rate"] == line["work"] / line["median"] and line["roof_share"] == line["rate"] / line["roof"]
        assert line["roof"] == line["session"]["gemm" if line["unit"] == "FLOP" else "copy"]
        assert line["formula"] and line["timed_by"] == "calls" and line["min"] <= line["median"] and line["iqr"] >= 0


@on_a_cpu
def test_who_cannot_run_on_a_cpu_says_why(toys):
    reasons = {(line["contender"], line["reason"]) for line in toys if line["outcome"] == "skipped"}
    needs = {(name, "it needs a GPU") for name in ("sdpa-flash", "sdpa-cudnn", "liger")}
    assert reasons == needs | {("triton", "on a CPU its kernels run in the interpreter")}


def test_the_work_of_attention_is_that_of_the_positions_that_see_each_other(toys):
    lines = [line for line in toys if line["operation"] == "causal_attention" and "work" in line]
    work = {(line["case"], line["direction"]): line["work"] for line in lines}
    B, T, H, D = shapes.ATTENTION["toy"]["toy"][:4]
    windowed = sum(min(i + 1, 7) for i in range(T))
    for case, pairs in (("toy", T * (T + 1) // 2), ("toy window 7", windowed), ("toy 3 documents", 3 * 16 * 17 // 2)):
        assert work[case, "forward"] == 4 * B * H * D * pairs
        assert work[case, "backward"] == 2.5 * work[case, "forward"]
        assert work[case, "both"] == 3.5 * work[case, "forward"]


@pytest.mark.slow
@on_a_cpu
def test_what_torch_compiles_is_measured_as_well(command, tmp_path):
    path = tmp_path / "lines.jsonl"
    options = ["-n", "0", "--benchmark-enable", "--scale", "toy", "--contenders", "compile"]
    options += ["-p", "benchmarks.lines", "--lines", path]
    done = command(sys.executable, "-m", "pytest", *options, "benchmarks/test_gelu.py", "-k", "test_gelu")
    assert done.returncode == 0, done.stdout + done.stderr
    assert {line["direction"] for line in results.lines_of(path) if "median" in line} == {"forward", "backward"}


@on_a_cpu
def test_the_command_writes_what_each_part_found(command, tmp_path):
    parts = ["--parts", "sanitizer", "losses", "--seconds", "240"]
    done = command(sys.executable, "-m", "benchmarks.gpu", *parts, "--out", tmp_path, "--commit", "abc1234")
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.iterdir()
    record = results.read(path)
    assert path.name == results.file_name(record["device"] + " toy", record["date"], "abc1234")
    assert record["environment"]["versions"]["torch"] == torch.__version__ and record["environment"]["load"]
    losses = record["parts"]["losses"]
    assert losses["outcome"] == "passed" and losses["session"]["copy"] > 0
    assert {row["operation"] for row in losses["benchmarks"]} == {"logits", "cross_entropy", "linear_cross_entropy"}
    assert record["parts"]["sanitizer"]["outcome"] == "not measured: compute-sanitizer not found"
    *_, row, _, losses_line, last = done.stdout.strip().splitlines()
    assert "linear_cross_entropy toy both" in row and "passed" in losses_line and last == f"results: {path}"


@pytest.mark.slow
@on_a_cpu
def test_the_whole_command_passes(command, tmp_path):
    done = command(sys.executable, "-m", "benchmarks.gpu", "--out", tmp_path, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    record = results.read(next(tmp_path.iterdir()))
    assert list(record["parts"]) == [part.name for part in gpu.parts_for("toy", None)]
    assert {row["operation"] for row in results.measured(record)} == OPERATIONS | {"step", "start"}


def part(name, program, share=1.0):
    """A part that runs a program, which knows its file and its end as sys.argv[1:]."""
    return Part(name, share, (sys.executable, "-c", f"import json, os, sys, time\n{program}", gpu.LINES, gpu.UNTIL))


WRITE = "open(sys.argv[1], 'a').write(json.dumps({'test': 'a', 'outcome': 'passed'}) + '\\n'); "
BLANK = {"format": results.FORMAT, "scale": "toy", "environment": {"versions": {}}}


def record_of(**parts):
    return BLANK | {"parts": parts}


def test_a_part_that_fails_or_hangs_fails_the_command_and_leaves_what_others_found(tmp_path):
    path = tmp_path / "results.json"
    parts = [
        part("good", WRITE),
        part("broken", WRITE + "sys.exit(3)", share=2.0),
        part("hanging", WRITE + "time.sleep(100)", share=0.4),
        part("silent", ""),
        part("last", WRITE),
    ]
    assert not gpu.run(parts, 30.0, path, record_of())
    found = results.read(path)["parts"]
    assert [found[p.name]["outcome"].partition(" after")[0] for p in parts] == [
        "passed",
        "failed with exit code 3",
        "stopped",
        "failed: nothing ran",
        "passed",
    ]
    assert all(found[name]["counts"] == {"passed": 1} for name in ("good", "broken", "hanging", "last"))
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]
    assert gpu.run([part("broken", WRITE)], 20.0, path, results.read(path))
    skipped = WRITE.replace("'passed'", "'skipped', 'reason': 'nobody is here'")
    assert not gpu.run([part("broken", skipped)], 20.0, path, results.read(path))
    assert results.read(path)["parts"]["broken"]["outcome"] == "not measured: nobody is here"
    assert gpu.run([part("broken", skipped), part("good", WRITE)], 20.0, path, results.read(path))
    assert list(results.read(path)["parts"]) == ["hanging", "silent", "last", "broken", "good"]


def test_a_command_that_is_cut_short_has_written_what_was_found_and_leaves_no_process(tmp_path):
    path, number = tmp_path / "results.json", tmp_path / "pid"
    program = f"open({str(number)!r}, 'w').write(str(os.getpid())); {WRITE}time.sleep(100)"
    written = []

    def cut_short(found):
        results.write(path, record_of(hanging=found))
        written.append(found["counts"])
        if found["counts"]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gpu.run_part(part("hanging", program), 60.0, cut_short)
    (found,) = results.read(path)["parts"].values()
    assert found["counts"] == {"passed": 1} and found["outcome"] == "stopped with the command"
    with pytest.raises(ProcessLookupError):
        os.kill(int(number.read_text()), 0)


def ends(number):
    """Whether a process, whose number a file holds, is no more, a second after it was killed at the latest."""
    status = Path(f"/proc/{number.read_text().strip()}/stat")
    for _ in range(100):
        with suppress(OSError):
            if status.read_text().rpartition(")")[2].split()[0] != "Z":
                time.sleep(0.01)
                continue
        return True
    return False


@pytest.mark.parametrize("group", ["", ", process_group=0"], ids=["in its group", "in a group of its own"])
@pytest.mark.parametrize("ending", ["", "; time.sleep(100)"], ids=["that ends", "that is stopped"])
def test_what_a_part_leaves_behind_is_ended(ending, group, tmp_path):
    number = tmp_path / "pid"
    program = "import subprocess; left = subprocess.Popen(['sleep', '100']" + group + "); "
    program += f"open({str(number)!r}, 'w').write(str(left.pid)); " + WRITE + ending.removeprefix("; ")
    gpu.run_part(part("one", program), 5.0, lambda found: None)
    assert ends(number)


@pytest.mark.parametrize(
    ("program", "arguments", "message"),
    [
        ("gpu", ["--seconds", "-5"], "argument --seconds: '-5' is not a positive number of seconds"),
        ("gpu", ["--seconds", "nan"], "argument --seconds: 'nan' is not a positive number of seconds"),
        ("gpu", ["--contenders", "triton,eagre"], "'eagre' is not a contender; did you mean 'eager'?"),
        ("gpu", ["--contenders", "nobody"], "'nobody' is not a contender; allowed: triton, native, torch, eager, "),
        (
            "gpu",
            ["--out", "/dev/null/folder"],
            "--out is /dev/null/folder, which cannot be written to: Not a directory",
        ),
        ("gpu", ["--scale", "gpu"], "--scale is gpu, and PyTorch sees none"),
        ("report", ["--results", "nowhere"], "--results is nowhere, which is not a folder"),
        ("report", ["--results", ".", "--out", "/dev/null/page"], "--out is /dev/null/page, which cannot be written: "),
    ],
)
def test_a_mistake_is_told_in_one_line_before_anything_starts(
    program, arguments, message, monkeypatch, tmp_path, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gpu, "describe", lambda: {"kind": "cpu", "device": "a CPU"})
    monkeypatch.setattr(gpu, "run", None)  # a call would fail
    monkeypatch.setenv("OUT", str(tmp_path))
    with pytest.raises(SystemExit) as stop:
        {"gpu": gpu, "report": report}[program].main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_the_runner_and_the_suites_know_the_same_contenders():
    assert set(table.CONTENDERS) == set(contenders.NAMES)


@on_a_cpu
def test_the_suites_refuse_the_shapes_of_a_gpu_without_one():
    config = SimpleNamespace(addinivalue_line=lambda *_: None, stash={}, getoption=lambda *_: "gpu")
    with pytest.raises(pytest.UsageError, match="--scale is gpu, and PyTorch sees none"):
        conftest.pytest_configure(config)


def test_an_unknown_case_of_the_sanitizer_is_told_in_one_line(command):
    done = command(sys.executable, "-m", "benchmarks.sanitizer_case", "gellu")
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and line.startswith("name one case of causal_attention, ")


def test_tests_that_would_begin_too_late_are_told_of(command, tmp_path):
    path = tmp_path / "lines.jsonl"
    options = ["-n", "0", "-p", "benchmarks.lines", "--lines", path, "--until", time.time()]
    done = command(sys.executable, "-m", "pytest", *options, "benchmarks/test_norms.py", "--scale", "toy")
    found = results.part_of(results.lines_of(path))
    assert done.returncode == 0 and list(found["counts"]) == ["no time left"]
    outcome = gpu.outcome_of(0, 7.0, found)
    assert outcome.startswith("out of time") and not gpu.ended_well(outcome)


def test_a_results_file_survives_its_own_text(tmp_path):
    path = tmp_path / "results.json"
    record = record_of(a={"benchmarks": [{"x": '"row 1"'}, {"x": math.inf}]}, b={"benchmarks": [{"y": "row 0"}]})
    results.write(path, record)
    assert results.read(path) == record
    path.write_text('{"format": "of another"}')
    assert results.read(path) is None


@on_a_cpu
@pytest.mark.skipif(bool(reasons_against()), reason="; ".join(reasons_against()))
def test_native_kernels_are_measured_where_they_run_and_a_gpu_is_no_place_for_them():
    assert contenders.load("native", "cpu").name == "native"
    with pytest.raises(contenders.Unavailable, match="it needs a CPU"):
        contenders.load("native", "cuda")
    assert not contenders.offers("native", "adamw") and contenders.offers("native", "linear")


@pytest.mark.skipif(bool(reasons_against()), reason="; ".join(reasons_against()))
def test_the_roof_of_a_cpu_is_the_faster_of_two_products(monkeypatch):
    def seconds_of(call, device, repeats):
        return found if isinstance(found := call(), float) else 1.0

    with monkeypatch.context() as patch:
        patch.setattr(roofs, "median_seconds", seconds_of)
        for products in ((0.5, 0.25), (0.25, 0.5), (0.25,)):
            patch.setattr(roofs, "_products", lambda a, b, products=products: (lambda x=x: x for x in products))
            assert roofs.measure("cpu", "toy", torch.bfloat16).gemm == 2 * 128**3 / 0.25
    assert len(list(roofs._products(*torch.ones(2, 128, 128, dtype=torch.bfloat16)))) == 2
    assert len(list(roofs._products(*torch.ones(2, 128, 128)))) == 1
    assert peak_flops() > 0


@on_a_cpu
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter, for lanes that do not count
@pytest.mark.parametrize("name", sanitizer_case.CASES)
def test_what_the_sanitizer_looks_at_runs(name):
    sanitizer_case.run(name)


def test_every_operation_with_kernels_is_looked_at_by_the_sanitizer():
    assert sorted(sanitizer_case.CASES) == sorted(sanitizer.CASES)
    checks = sanitizer.checks()
    memory, races = ([name for tool, name in checks if tool == each] for each in ("memcheck", "racecheck"))
    assert memory == list(sanitizer.CASES) and set(races) == {*sanitizer.CASES} - {*sanitizer.ELEMENT_BY_ELEMENT}
    assert [tool for tool, _ in checks] == sorted(tool for tool, _ in checks)
    ours = {"linear_gelu_fused", "adamw", "gradient_norm", *Ops._fields[1:]}
    # cuBLAS computes these
    assert ours == {*sanitizer_case.CASES, "linear", "linear_gelu", "logits"}
    assert {"forward_kernel", "_dropout_kernel", "_update_kernel"} <= set(sanitizer.kernel_names())


@pytest.mark.parametrize(("code", "outcome"), [(0, "passed"), (99, "failed"), (1, "failed")])
def test_the_sanitizer_is_asked_of_our_kernels_only_and_its_answer_kept(code, outcome, tmp_path):
    program = tmp_path / "compute-sanitizer"
    asked = tmp_path / "asked"
    echo = f'echo "$PYTORCH_NO_CUDA_MEMORY_CACHING $*" | tee {asked}'
    program.write_text(f"#!/bin/sh\n{echo}\nexit {code}\n")
    program.chmod(0o755)
    line = sanitizer.sanitize(str(program), "racecheck", "gelu", time.time() + 60)
    assert line["test"] == "racecheck gelu" and line["outcome"] == outcome
    assert asked.read_text().startswith("1 --tool racecheck")
    assert "--kernel-name kns=_gelu_forward_kernel" in asked.read_text()
    if code:
        assert ("found errors" in line["reason"]) == (code == 99) and "1 --tool" in line["reason"]
    assert sanitizer.sanitize(str(program), "memcheck", "gelu", time.time() - 1)["reason"] == "no time left"


def test_a_check_that_takes_too_long_is_ended_with_all_that_it_started(tmp_path):
    number = tmp_path / "pid"
    program = tmp_path / "compute-sanitizer"
    program.write_text(f"#!/bin/sh\nsleep 100 &\necho $! > {number}.part\nmv {number}.part {number}\nwait\n")
    program.chmod(0o755)
    line = sanitizer.sanitize(str(program), "memcheck", "gelu", time.time() + 2)
    assert line["outcome"] == "skipped" and line["reason"] == "no time left" and line["seconds"] < 10
    assert ends(number)


def test_a_check_waits_for_the_one_that_compiles_its_case(tmp_path, monkeypatch):
    """With a sanitizer that writes down when it begins and ends."""
    log = tmp_path / "log"
    program = tmp_path / "compute-sanitizer"
    text = 'eval name=\\${$#}\necho "$2 $name begins" >> LOG\nsleep 0.2\necho "$2 $name ends" >> LOG\n'
    program.write_text("#!/bin/sh\n" + text.replace("LOG", str(log)))
    program.chmod(0o755)
    monkeypatch.setattr(sanitizer.shutil, "which", lambda name: str(program))
    monkeypatch.setattr(sanitizer.os, "cpu_count", lambda: 64)
    lines = tmp_path / "lines.jsonl"
    monkeypatch.setattr(sys, "argv", ["sanitizer", "--lines", str(lines), "--until", str(time.time() + 60)])
    assert sanitizer.main() == 0
    assert {line["outcome"] for line in results.lines_of(lines)} == {"passed"}
    events = log.read_text().splitlines()
    for tool, name in sanitizer.checks():
        if tool == "racecheck":
            assert events.index(f"memcheck {name} ends") < events.index(f"racecheck {name} begins")


def row(operation, case, direction, contender, median, rate=1.0, share=1.0, unit="byte"):
    return {
        "operation": operation, "case": case, "direction": direction, "contender": contender, "median": median,
        "iqr": 0.0, "rate": rate, "roof_share": share, "unit": unit, "formula": "as counted", "timed_by": "CUDA graph",
    }  # fmt: skip


def test_goals_are_reached_missed_or_not_measured():
    case = "gpt2-124m T=1024"
    rows = [
        row("causal_attention", case, "forward", "triton", 1.0, rate=321e12, unit="FLOP"),
        row("causal_attention", case, "forward", "sdpa-flash", 1.05),
        row("layer_norm", "gpt2-124m", "forward", "triton", 1.0, share=0.84),
    ]
    verdicts = {verdict["goal"]: verdict["reached"] for verdict in goals.judge(rows)}
    assert verdicts[f"causal_attention {case} forward: TFLOP/s"] is True
    assert verdicts[f"causal_attention {case} forward: times as fast as SDPA flash"] is False
    assert verdicts[f"causal_attention {case} forward: times as fast as SDPA cuDNN"] is None
    assert verdicts["layer_norm gpt2-124m forward: of copy bandwidth"] is False


def test_every_goal_is_of_a_case_that_is_measured():
    cases = {
        "causal_attention": shapes.ATTENTION, "layer_norm": shapes.NORMS, "add_layer_norm": shapes.ADDED_NORMS,
        "bias_gelu": shapes.MLPS, "cross_entropy": shapes.LOSSES, "adamw": shapes.MODELS,
    }  # fmt: skip
    for goal in goals.goals("gpu"):
        if goal.operation == "step":
            measured = gpu.STEPS[goal.case.removesuffix(" T=1024")].gpu.split(",")
            assert {goal.ours, *([goal.other[0]] if goal.other else [])} <= set(measured)
            continue
        if goal.operation == "curves":
            continue  # no part of `make gpu`; tests/test_bench_curves.py asks its own command
        if goal.operation == "start":
            assert goal.case == "help" or f"configs/{goal.case}.yaml" in gpu.start_for("gpu").command
            continue
        assert goal.case in cases[goal.operation]["gpu"]
        if goal.other:
            name, case = goal.other
            assert contenders.offers(name, goal.operation) and case in cases[goal.operation]["gpu"]


def test_the_page_of_results_is_what_the_files_say():
    page = (ROOT / "docs" / "performance.md").read_text()
    assert page == report.page(results.read_all(ROOT / "benchmarks" / "results")), "run python -m benchmarks.report"


def test_the_page_shows_the_newest_of_each_part_and_no_toys():
    session = {"gemm": 7e14, "copy": 4e12, "dtype": "bfloat16", "clocks": {}, "load": [0.5]}
    versions = {"torch": "2", "triton": "3"}

    def of(commit, scale="gpu", **parts):
        about = {"scale": scale, "kind": "gpu", "device": "A GPU", "commit": commit}
        common = {"outcome": "passed", "started": "then", "session": session}
        filled = {name: common | {"benchmarks": rows} for name, rows in parts.items()}
        return record_of(**filled) | about | {"environment": {"versions": versions}}

    norm = ("layer_norm", "gpt2-124m", "forward", "triton")
    page = report.page(
        [
            of("old", norms=[row(*norm, 1e-3)], losses=[row("cross_entropy", "gpt2", "both", "triton", 5e-3)]),
            of("new", norms=[row(*norm, 2e-3, rate=3e12, share=0.9)]),
            of("toy", scale="toy", norms=[row(*norm, 9e-3)]),
        ]
    )
    assert "| gpt2-124m | forward | 2 ± 0 | 3 TB/s | 90% |" in page and "| 5 ± 0 |" in page and "| 9 " not in page
    assert "| norms | passed | new |" in page and "| losses | passed | old |" in page and "| toy |" not in page
    assert "not measured" in report.page([of("toy", scale="toy")])


@pytest.mark.parametrize("name", shapes.GPT2)
def test_the_optimizer_is_measured_on_the_parameters_of_a_gpt2(name):
    assert sum(math.prod(shape) for shape in shapes.parameter_shapes(shapes.GPT2[name], "gpu")) == PARAMETERS[name]


def test_a_backend_of_sdpa_attends_as_eager_does():
    qkv = torch.randn(2, 33, 3, 2, 16)
    flash = contenders.sdpa(contenders.SDPA["sdpa-flash"])
    torch.testing.assert_close(flash.attend(*qkv.unbind(2)), contenders.EAGER.causal_attention(qkv))
    with pytest.raises(contenders.Unavailable):
        flash.attend(*qkv.unbind(2), window=3)


@on_a_cpu
@pytest.mark.parametrize("direction", ["forward", "backward", "both", "call"])
@pytest.mark.parametrize("waits", [False, True])
def test_a_round_on_a_gpu_is_one_graph_over_inputs_that_sweep_the_cache(direction, waits, monkeypatch):
    """With a GPU of which every call does nothing but what is asked of it on the host."""
    x = torch.randn(64, 16)
    modes, captured, used = [], [], []

    def call(x):
        used.append(x.data_ptr())
        if waits and modes[-1:] == ["error"]:
            raise RuntimeError("called a synchronizing operation\nand more")
        return x * 2.0

    class Graph:
        replay = captured.clear

    class Capture(nullcontext):
        def __exit__(self, *_):
            captured.extend(used)

        def __enter__(self):
            used.clear()

    fake = {
        "Stream": lambda: SimpleNamespace(wait_stream=lambda other: None),
        "current_stream": lambda: None,
        "stream": nullcontext,
        "CUDAGraph": Graph,
        "graph": lambda graph, stream: Capture(),
        # three sets of inputs sweep a cache of that size
        "get_device_properties": lambda device: SimpleNamespace(L2_cache_size=x.untyped_storage().nbytes() * 5 // 8),
        "synchronize": lambda: None,
        "reset_peak_memory_stats": lambda: None,
        "memory_allocated": lambda: 100,
        "max_memory_allocated": lambda: 356,
        "set_sync_debug_mode": modes.append,
    }
    for name, value in fake.items():
        monkeypatch.setattr(torch.cuda, name, value)
    prepared = timing.prepare(call, [x], direction, "cuda", "gpu", None)
    assert prepared.peak_bytes == 256 and prepared.calls % 3 == 0 and len(prepared.held) == 3
    assert modes == ["error", "default"]
    if waits and direction != "backward":
        assert prepared.timed_by.endswith("RuntimeError: called a synchronizing operation")
        used.clear()
        prepared.run()
        assert len(used) == prepared.calls and len(set(used)) == 3
    else:
        assert prepared.timed_by == "CUDA graph" and prepared.run == captured.clear
        # a backward alone runs no forward
        assert len(captured) == (0 if direction == "backward" else prepared.calls)


def test_copies_of_inputs_lie_in_memory_as_the_inputs_do(monkeypatch):
    qkv, table = torch.randn(2, 5, 3, 4), torch.randn(6, 7).t()
    inputs = [*qkv.unbind(2), table]
    size = qkv.untyped_storage().nbytes() + table.untyped_storage().nbytes()
    # three sets sweep a cache of that size
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=size * 5 // 8)
    )
    sets = timing.input_sets(inputs, "cuda")
    assert len(sets) == 3
    for copies in sets[1:]:
        assert all(torch.equal(a, b) and a.stride() == b.stride() for a, b in zip(copies, inputs, strict=True))
        assert len(timing.storages(copies)) == 2 and not {*timing.storages(copies)} & {*timing.storages(inputs)}


@pytest.mark.parametrize("options", [{"window": 3}, {"document_ids": torch.arange(9).expand(2, 9) // 4}])
def test_a_mask_made_before_is_the_one_that_eager_makes(options):
    eager, qkv = contenders.load("eager", "cpu"), torch.randn(2, 9, 3, 2, 16)
    mask = visible(qkv, options.get("window"), options.get("document_ids"))
    assert torch.equal(eager.masked_attention(qkv, mask), eager.causal_attention(qkv, **options))
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    lengths = torch.tensor([4, 9])
    used = (torch.arange(9) < lengths[:, None])[:, None, None]
    assert torch.equal(
        eager.masked_decode_attention(q[:, :, 0], k, v, used), eager.decode_attention(q[:, :, 0], k, v, lengths)
    )


@on_a_cpu
def test_dropout_that_is_wrong_is_found():
    torch.manual_seed(0)
    ops, x, nothing, ones = load_ops("triton"), torch.rand(40, 30) + 0.5, torch.zeros(40, 30), torch.ones(30)

    def masked(ops, z, x, *others):
        return ops.add_layer_norm(x * z, *others)

    def norm(*xs, p=0.25):
        return ops.add_layer_norm(*xs, dropout_p=p, seed=1)

    def loose(x, *others):
        # the results of the right mask, and the gradient of none
        normed, total = norm(x, *others)
        return normed, total.detach() + x - x.detach()

    def check(call):
        masks.assert_as_close(call, masked, lambda found: found[1] != 0, 0.25, x, nothing, ones, ones)

    check(norm)
    wrong = [
        (lambda *xs: norm(*xs, p=0.5), "rate"),
        (lambda x, *others: norm(x * 0.99, *others), "result [01] "),
        (loose, "result 2 "),
    ]
    for call, message in wrong:
        with pytest.raises(AssertionError, match=message):
            check(call)

    qkv = torch.randn(1, 33, 3, 1, 16)
    attend = lambda x, p=0.25, seed=1: ops.causal_attention(x, dropout_p=p, seed=seed)  # noqa: E731
    masks.assert_attention_as_close(attend, qkv, 0.25)
    for call, message in ((lambda x: attend(x, p=0.5), "rate"), (lambda x: attend(x) * 1.01, "result 0 ")):
        with pytest.raises(AssertionError, match=message):
            masks.assert_attention_as_close(call, qkv, 0.25)


def test_what_a_call_destroys_is_restored_before_every_call():
    kept = torch.randn(4, 5)
    x, seen = kept.clone(), []

    def destroy(x):
        seen.append(x.detach().clone())
        y = x * 2.0
        with torch.no_grad():
            x.detach().zero_()
        return y

    timing.prepare(destroy, [x], "both", "cpu", "toy", lambda: x.copy_(kept)).run()
    assert all(torch.equal(each, kept) for each in seen[:-1])


def test_json_lines_in_the_writing_are_left_for_later(tmp_path):
    path = tmp_path / "lines.jsonl"
    assert results.lines_of(path) == []
    path.write_text(json.dumps({"a": 1}) + '\n{"b": ')
    assert results.lines_of(path) == [{"a": 1}]


def test_every_test_that_needs_a_gpu_is_in_the_gpus_turn():
    (parity,) = (part for part in gpu.parts_for("gpu", None) if part.name == "parity")
    folders = {gpu.ROOT / word for word in parity.command if word.startswith("tests/")}
    marked = [
        path for path in (gpu.ROOT / "tests").rglob("test_*.py") if re.search(r"pytest\.mark\.gpu", path.read_text())
    ]
    assert len(marked) > 5 and [path for path in marked if not folders & set(path.parents)] == []
