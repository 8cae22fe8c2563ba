import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fastgpt_kernels import compile_cases, compile_report, launch, tile_search, tiles, tune
from fastgpt_kernels.compile_report import Compiled
from fastgpt_kernels.tiles import ARCHITECTURES
from triton.runtime.interpreter import GridExecutor

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "kernels-compiled.md"
FINE = Compiled(
    operation="attention",
    size="D=64 plain",
    dtype="bfloat16",
    arch="sm_90",
    kernel="attention_kernels.forward_kernel",
    tiles="128x64 w8 s3",
    registers=200,
    spilled_bytes=0,
    spill_budget=0,
    shared_bytes=65536,
    tensor_columns=0,
    instruction="wgmma",
    needed="wgmma",
    seconds=1.0,
)

# what is wrong with these two is known: one holds 512 numbers a thread or more, the other adds what has no sum
AWKWARD_KERNELS = """
import json, sys
import torch, triton, triton.language as tl
from fastgpt_kernels import compile_report
from fastgpt_kernels.compile_cases import Case

@triton.jit
def spilling_kernel(x_ptr, y_ptr, N: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, N))
    tl.store(y_ptr + tl.arange(0, N), x - tl.sum(x, 0))

@triton.jit
def broken_kernel(x_ptr, y_ptr, N: tl.constexpr):
    tl.store(y_ptr, tl.arange(0, 2) + tl.arange(0, 4))

def launches():
    x = torch.empty(32768, device="meta")
    spilling_kernel[(1,)](x, x, 32768, num_warps=1)
    broken_kernel[(1,)](x, x, 32768)

case = Case("awkward", "", torch.float32, launches)
rows = [row for arch in sys.argv[1:] for row in compile_report.compile_case(case, arch)]
print(json.dumps([(row.arch, row.kernel, row.spilled_bytes, row.faults()) for row in rows]))
"""


def run_compiler(*command: str | Path) -> subprocess.CompletedProcess[str]:
    """Run Python in a process of its own: this one interprets."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    return subprocess.run([sys.executable, *map(str, command)], env=environment, capture_output=True, text=True)


def compile_kernels(report: Path, *options: str) -> list[Compiled]:
    result = run_compiler("-m", "fastgpt_kernels.compile_report", "--json", report, *options)
    print(result.stdout)  # pytest shows the table of a failed test
    assert result.returncode == 0, result.stderr
    return compile_report.read(report)[1]


def test_gpt2s_attention_compiles_for_hopper_without_a_spill(tmp_path):
    options = ("--gate", "--operations", "attention", "--arch", "sm_90", "--only", "D=64", "plain", "bfloat16")
    rows = compile_kernels(tmp_path / "report.json", *options)
    assert [row.kernel for row in rows] == [f"attention_kernels.{kernel}_kernel" for kernel in tiles.KERNELS]
    assert all(row.spilled_bytes == 0 and row.instruction == "wgmma" for row in rows)


def test_kernels_without_a_table_compile_for_every_architecture(tmp_path):
    rows = compile_kernels(tmp_path / "report.json", "--gate", "--operations", "dropout", "bias_gelu")
    assert {row.arch for row in rows} == set(ARCHITECTURES)
    assert {row.kernel.partition(".")[0] for row in rows} == {"gelu", "dropout"}
    assert all(0 < row.registers <= 255 for row in rows)


@pytest.mark.slow
def test_no_kernel_without_a_table_spills_at_any_size_and_dtype(tmp_path):
    operations = {case.operation for case in compile_cases.cases()} - {"attention"}
    rows = compile_kernels(tmp_path / "report.json", "--arch", "sm_90", "--operations", *sorted(operations))
    assert {row.dtype for row in rows} == {"float32", "float16", "bfloat16"}


@pytest.mark.slow
def test_every_tile_that_may_be_chosen_compiles_and_fits(tmp_path):
    rows = compile_kernels(tmp_path / "report.json", "--candidates", "--jobs", "2")
    expected = sum(len(entry.candidates) - 1 for entry in tiles.entries())
    assert len(rows) == expected >= 2 * len(tiles.entries())
    assert not any(row.tiles in chosen_of(row) for row in rows)


def chosen_of(row: Compiled) -> set[str]:
    """The tiles in use for a row's kernel, architecture, size and dtype."""
    bits, variant = (32 if row.dtype == "float32" else 16), row.size.partition(" ")[2]
    head_size = int(row.size.partition(" ")[0].removeprefix("D="))
    kernel = row.kernel.partition(".")[2].removesuffix("_kernel")
    entry = tiles.entry_for(kernel, row.arch, bits, head_size, variant != "plain")
    M, N, warps, stages = entry.tiles
    return {f"{M}x{N} w{warps} s{stages}"}


def test_a_kernel_that_spills_or_does_not_compile_is_a_fault(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(AWKWARD_KERNELS)
    result = run_compiler(program, "sm_90", "gfx942")
    assert result.returncode == 0, result.stderr
    (_, kernel, spilled, faults), broken, (_, _, amd_spilled, _), amd_broken = json.loads(result.stdout)
    assert kernel == "__main__.spilling_kernel"
    assert spilled > 0 and amd_spilled > 0 and faults == [f"spills {spilled} bytes"]
    for row in (broken, amd_broken):
        assert row[1].endswith("broken_kernel") and "CompilationError: " in row[3][0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the kernels are compiled, not interpreted")
def test_every_kernel_is_in_the_gate_for_every_architecture(monkeypatch):
    launched = set()
    monkeypatch.setattr(GridExecutor, "__call__", lambda self, *_, **__: names.append(self.fn.__name__.strip("_")))
    for case in compile_cases.cases():
        for arch in ARCHITECTURES if case.gate else ():
            if case.arch in (None, arch):
                names: list[str] = []
                token = launch.compiling_for.set(arch)
                try:
                    case.launches()
                finally:
                    launch.compiling_for.reset(token)
                only = f"{case.kernel}_kernel"
                launched |= {(arch, name) for name in names if case.kernel is None or name == only}
    rows = [
        FINE._replace(arch=arch, kernel=kernel)
        for kernel in compile_report.kernels_of_package()
        for arch in ARCHITECTURES
        if (arch, kernel.rpartition(".")[2]) in launched
    ]
    assert len(rows) > 100 and not compile_report.uncovered(rows, ARCHITECTURES)


def test_the_gate_has_each_line_of_the_table_once():
    gate = [case for case in compile_cases.cases() if case.gate and case.kernel in tiles.KERNELS]
    for entry in tiles.entries():
        dtype = torch.float32 if entry.bits == 32 else torch.bfloat16
        variant = "dropout window documents" if entry.extras else "plain"
        key = (entry.arch, entry.kernel, f"D={entry.head_size} {variant}", dtype)
        (case,) = (case for case in gate if (case.arch, case.kernel, case.size, case.dtype) == key)
        assert case.tiles is None and case.spill_budget == entry.spill_budget
        assert (case.instruction == "wgmma") == (entry.arch == "sm_90" and entry.bits == 16 and entry.head_size <= 128)
    doubled = {(case.kernel, case.size) for case in gate if case.dtype == torch.float16}
    assert doubled == {(kernel, f"D={D} plain") for kernel in tiles.KERNELS for D in (64, 80, 96, 128)}
    assert all(case.instruction == "wgmma" for case in gate if case.dtype == torch.float16)
    assert len(gate) == len(tiles.entries()) + len(doubled)


@pytest.mark.parametrize(
    ("change", "faults"),
    [
        ({}, []),
        ({"spilled_bytes": 8}, ["spills 8 bytes"]),
        ({"spilled_bytes": 8, "spill_budget": 4}, ["spills 8 bytes, 4 are allowed"]),
        ({"spilled_bytes": 8, "spill_budget": 8}, []),
        ({"spilled_bytes": 8, "spill_budget": None}, []),
        ({"shared_bytes": 233_472}, ["exceeds the 232448 bytes of shared memory"]),
        ({"arch": "sm_89", "shared_bytes": 102_400}, ["exceeds the 101376 bytes of shared memory"]),
        ({"instruction": "mma.sync"}, ["has no wgmma"]),
        ({"instruction": "", "needed": ""}, []),
        ({"arch": "sm_100", "tensor_columns": 513}, ["exceeds the 512 columns of tensor memory"]),
        ({"error": "CompilationError: at 3:4", "registers": 0}, ["CompilationError: at 3:4"]),
    ],
)
def test_faults_are_found(change, faults):
    assert FINE._replace(**change).faults() == faults


def test_a_kernel_that_was_left_out_is_named():
    rows = [FINE._replace(kernel=kernel) for kernel in compile_report.kernels_of_package() - {FINE.kernel}]
    assert compile_report.uncovered([*rows, FINE], ["sm_90"]) == []
    assert compile_report.uncovered(rows, ["sm_90"]) == [f"{FINE.kernel} was not compiled for sm_90"]
    assert len(compile_report.uncovered(rows, ["sm_90", "sm_80"])) == len(rows) + 2


@pytest.mark.parametrize(
    ("options", "row", "code"),
    [
        ([], FINE, 0),
        ([], FINE._replace(spilled_bytes=4), 1),
        (["--gate"], FINE, 1),  # for all the kernels that are missing
        (["--gate", "--only", "D=64", "plain"], FINE, 0),
    ],
)
def test_the_exit_code_says_whether_all_is_well(options, row, code, monkeypatch, capsys):
    monkeypatch.setattr(compile_report, "compile_all", lambda work, jobs: iter([[row]]))
    monkeypatch.setattr(launch, "INTERPRETED", False)
    assert compile_report.main(options) == code
    printed = capsys.readouterr().out
    assert ("gelu.gelu_forward_kernel was not compiled for sm_80" in printed) == (options == ["--gate"])
    assert f"1 kernels, {len(row.faults())} with a fault" in printed


def test_what_the_gate_leaves_out_is_attention_in_float32_and_no_kernel(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(compile_report, "compile_all", lambda work, jobs: asked.append(set(work)) or iter([[FINE]]))
    monkeypatch.setattr(launch, "INTERPRETED", False)
    compile_report.main(["--gate"])
    assert compile_report.main(["--gate", "--no-float32-attention"]) == 1  # for the kernels that are missing
    assert "gelu.gelu_forward_kernel was not compiled for sm_80" in capsys.readouterr().out
    everything, most = asked
    cases = list(compile_cases.cases())
    assert {(cases[number].operation, cases[number].dtype) for number, _ in everything - most} == {
        ("attention", torch.float32)
    }
    assert most < everything and {cases[number].kernel for number, _ in most} == {c.kernel for c in cases}


def test_nothing_to_compile_is_no_success(monkeypatch):
    monkeypatch.setattr(compile_report, "compile_all", lambda work, jobs: iter([]))
    monkeypatch.setattr(launch, "INTERPRETED", False)
    assert compile_report.main(["--only", "D=65"]) == 1


def test_the_page_has_both_versions_where_they_differ(tmp_path):
    larger = FINE._replace(registers=210, shared_bytes=70_000)
    older = FINE._replace(registers=255, spilled_bytes=24, spill_budget=32)
    page = compile_report.markdown([("3.9.0", [FINE, larger]), ("3.6.0", [older])])
    assert "under Triton 3.9.0 and 3.6.0." in page
    (row,) = (line for line in page.splitlines() if line.startswith("| attention"))
    cells = "210 / 255 | 0 / 24 | 70,000 / 65,536 | wgmma |"
    assert row == f"| attention: forward | D=64 plain | bfloat16 | 128x64 w8 s3 | {cells}"


def test_a_page_of_part_of_the_gate_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(launch, "INTERPRETED", False)
    with pytest.raises(SystemExit):
        compile_report.main(["--gate", "--arch", "sm_90", "--markdown", str(tmp_path / "page.md")])
    with pytest.raises(SystemExit):
        compile_report.main(["--gate", "--no-float32-attention", "--markdown", str(tmp_path / "page.md")])
    assert "--markdown needs --gate, and all of it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("module", "words", "reason"),
    [
        (compile_report, ["--jobs", "0"], "--jobs: must be an integer of at least 1, not '0'"),
        (compile_report, ["--json", "nowhere/rows.json"], "--json: nowhere/rows.json cannot be written"),
        (compile_report, ["--markdown", "."], "--markdown: . is a folder"),
        (compile_report, ["--beside", "missing.json"], "--beside: missing.json is no file"),
        (compile_report, ["--beside", __file__], "--beside is for the page of --markdown"),
        (tile_search, ["--findings", "nowhere/findings"], "--findings: nowhere/findings cannot be written"),
        (tile_search, ["--findings", "x", "--jobs", "two"], "--jobs: must be an integer of at least 1, not 'two'"),
        (tune, ["--seconds", "nan"], "--seconds is nan; it must be positive"),
        (tune, ["--jobs", "-1"], "--jobs is -1; it must be positive"),
    ],
)
def test_a_mistake_in_a_command_is_told_in_a_line_before_any_work(module, words, reason, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launch, "INTERPRETED", False)
    with pytest.raises(SystemExit) as stop:
        module.main(words)
    assert stop.value.code == 2 and reason in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_report_in_the_interpreter_is_refused_in_a_line(capsys):
    with pytest.raises(SystemExit) as stop:
        compile_report.main([])
    assert stop.value.code == 2 and "TRITON_INTERPRET" in capsys.readouterr().err


def rows_of_page() -> set[tuple[str, ...]]:
    """Architecture, kernel, size, dtype and tiles of each row of the page in docs."""
    rows, arch = set(), ""
    for line in PAGE.read_text().splitlines():
        if heading := re.fullmatch(r"## (\w+)", line):
            arch = heading[1]
        elif arch and line.startswith("| ") and not line.startswith("| Kernel"):
            rows.add((arch, *(cell.strip() for cell in line.strip("|").split("|")[:4])))
    return rows


def test_the_page_in_docs_is_about_the_tiles_of_the_table():
    expected = set()
    for entry in tiles.entries():
        variant = "dropout window documents" if entry.extras else "plain"
        dtype = "float32" if entry.bits == 32 else "bfloat16"
        M, N, warps, stages = entry.tiles
        cut = f"{M}x{N} w{warps} s{stages}"
        expected.add((entry.arch, f"attention: {entry.kernel}", f"D={entry.head_size} {variant}", dtype, cut))
        if compile_cases._is_plain_wgmma(entry):
            expected.add((entry.arch, f"attention: {entry.kernel}", f"D={entry.head_size} {variant}", "float16", cut))
    described = {row for row in rows_of_page() if row[1].startswith("attention: ") and "documents" not in row[1]}
    assert described == expected, "the table of tiles has changed: make kernels-compiled"


def test_the_page_in_docs_has_every_kernel():
    rows = rows_of_page()
    cases = {(case.operation, case.size) for case in compile_cases.cases() if case.gate}
    assert {(row[1].partition(":")[0], row[2]) for row in rows} == cases, "make kernels-compiled"
    assert {row[0] for row in rows} == set(ARCHITECTURES)


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the kernels are compiled")
def test_nothing_is_compiled_in_the_interpreter():
    case = next(compile_cases.cases())
    with pytest.raises(RuntimeError, match="unset it"):
        compile_report.compile_case(case, "sm_90")


def test_kernels_compile_where_every_size_is_one(tmp_path):
    """Triton makes constants of such integers."""
    operations = ["embedding", "decode_attention", "dropout", "gelu", "bias_gelu"]
    options = ("--arch", "sm_90", "--only", "of", "one", "bfloat16", "--operations", *operations)
    rows = compile_kernels(tmp_path / "report.json", *options)
    assert {row.operation for row in rows} == set(operations)
