import json
import os
import subprocess
import sys
from pathlib import Path

import fastgpt_kernels
import pytest
import torch
from fastgpt_kernels import compile_report
from fastgpt_kernels.compile_report import Compiled

FINE = Compiled("attention", "D=64", "bfloat16", 90, "forward_kernel", 200, 0, 65536, True, 1.0)


def compile_kernels(report: Path, *options: str) -> list[Compiled]:
    """Compile in a process of its own: this one interprets."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    command = [sys.executable, "-m", "fastgpt_kernels.compile_report", "--json", report, *options]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    print(result.stdout)  # pytest shows the table of a failed test
    assert result.returncode == 0, result.stderr
    return [Compiled(**row) for row in json.loads(report.read_text())]


def test_no_kernel_spills_or_takes_too_much_shared_memory(tmp_path):
    rows = compile_kernels(tmp_path / "report.json", "--quick")
    assert not [row for row in rows if row.faults()]
    assert {row.arch for row in rows} == {80, 90}
    sources = Path(fastgpt_kernels.__file__).parent.glob("*.py")
    kernels = {line[4:-1] for source in sources for line in source.read_text().splitlines() if "_kernel(" in line[:60]}
    kernels = {name.strip("_") for name in kernels if name.endswith("_kernel")}
    assert {row.kernel for row in rows} == kernels


@pytest.mark.slow
def test_no_kernel_spills_at_any_size_and_dtype(tmp_path):
    rows = compile_kernels(tmp_path / "report.json")
    assert {row.dtype for row in rows} == {"float32", "float16", "bfloat16"}


@pytest.mark.parametrize(
    ("change", "faults"),
    [
        ({}, []),
        ({"spilled_bytes": 8}, ["spills 8 bytes"]),
        ({"shared_bytes": 233_472}, ["exceeds the 232448 bytes of shared memory"]),
        ({"wgmma": False}, ["has no wgmma"]),
        ({"wgmma": False, "arch": 80}, []),
        ({"wgmma": False, "dtype": "float32"}, []),
        ({"arch": 80, "shared_bytes": 170_000}, ["exceeds the 166912 bytes of shared memory"]),
    ],
)
def test_faults_are_found(change, faults):
    assert FINE._replace(**change).faults() == faults


def test_nothing_is_compiled_in_the_interpreter():
    case = next(compile_report.cases())
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="unset it"):
            compile_report.compile_case(case, 90)
