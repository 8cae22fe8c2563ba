"""The GPU's turn: its tests, then the kernel benchmarks, in one command of less than eight minutes.

    python benchmarks/gpu.py

The full record goes to a JSON file in the folder $OUT, or in benchmarks/results; a short table comes last. The exit
code is 1 where a test or a benchmark failed. Without a GPU it runs the toy shapes of the CPU.
"""

import datetime
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
SUITES = ("attention", "layernorm", "gelu", "dropout")
BACKENDS = ("reference", "torch", "triton")
TEST_SECONDS, BENCHMARK_SECONDS = 230, 230


def main() -> int:
    """Run both; 1 if either failed."""
    out = Path(os.environ.get("OUT", ROOT / "benchmarks" / "results"))
    out.mkdir(parents=True, exist_ok=True)
    record = out / f"kernels_{datetime.date.today()}_{commit()}.json"
    tests_passed = pytest("tests", "-m", "gpu", f"--junitxml={out / 'gpu_tests.xml'}", seconds=TEST_SECONDS)
    benchmarks_passed = pytest(
        *(f"benchmarks/test_{suite}.py" for suite in SUITES),
        "--benchmark-enable",
        "--benchmark-columns=median,iqr",
        f"--benchmark-json={record}",
        seconds=BENCHMARK_SECONDS,
    )
    if record.exists() and record.stat().st_size:
        print_table(json.loads(record.read_text()))
        print(f"record: {record}")
    print(f"tests {'passed' if tests_passed else 'FAILED'}, benchmarks {'passed' if benchmarks_passed else 'FAILED'}")
    return 0 if tests_passed and benchmarks_passed else 1


def pytest(*arguments: str, seconds: int) -> bool:
    """Whether pytest passes with these arguments in this time."""
    command = [sys.executable, "-m", "pytest", "-n", "0", "-q", "--tb=short", *arguments]
    try:
        return subprocess.run(command, cwd=ROOT, timeout=seconds).returncode == 0
    except subprocess.TimeoutExpired:
        print(f"stopped after {seconds} s: {' '.join(command)}")
        return False


def commit() -> str:
    """The short name of the commit, or "unknown" outside a repository."""
    result = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return result.stdout.strip() or "unknown"


def print_table(record: dict) -> None:
    """One line for each operation, direction and shape: the median of each backend, and what the last one reaches."""
    rows: dict[str, dict[str, dict]] = {}
    for benchmark in record["benchmarks"]:
        backend = benchmark["params"]["ops"]
        rows.setdefault(benchmark["name"].removeprefix("test_").replace(f"{backend}-", ""), {})[backend] = benchmark
    print(f"\n{record['machine_info']['device']}, torch {record['machine_info']['torch']}; median in ms")
    print(f"{'':<56}" + "".join(f"{backend:>10}" for backend in BACKENDS) + f"{'rate':>16}")
    for name, by_backend in rows.items():
        times = [1e3 * by_backend[b]["stats"]["median"] if b in by_backend else float("nan") for b in BACKENDS]
        info = next(by_backend[b]["extra_info"] for b in reversed(BACKENDS) if b in by_backend)
        unit = "TFLOP/s" if info["formula"].startswith("FLOPs") else "TB/s"
        print(f"{name:<56}" + "".join(f"{t:>10.3f}" for t in times) + f"{info['rate'] / 1e12:>10.3g} {unit}")


if __name__ == "__main__":
    sys.exit(main())
