"""compute-sanitizer's memcheck and racecheck over each operation's kernels, several processes at once.

    python -m benchmarks.sanitizer --lines FILE --until SECONDS

Each check is a line of JSON in the file, as `benchmarks.lines` has them. Exit code 1 where one found an error.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.lines import append
from benchmarks.results import NO_TIME, NOT_MEASURED

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ("memcheck", "racecheck")
PROGRAM = "compute-sanitizer"
FOUND_ERRORS = 99
# cores for each process: PyTorch's start and the compiler keep more than one busy
CORES = 2


def main() -> int:
    """Every check for which there is time; 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--lines", type=Path, required=True)
    parser.add_argument("--until", type=float, required=True)
    arguments = parser.parse_args()
    checks = [(tool, name) for name in case_names() for tool in TOOLS]
    program = shutil.which(PROGRAM)
    if program is None:
        append(arguments.lines, {"test": PROGRAM, "outcome": NOT_MEASURED, "reason": f"{PROGRAM} not found"})
        return 0
    failed = False
    writing = threading.Lock()

    def one(check: tuple[str, str]) -> None:
        nonlocal failed
        line = sanitize(program, *check, until=arguments.until)
        with writing:
            append(arguments.lines, line)
        failed = failed or line["outcome"] == "failed"

    with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // CORES)) as pool:
        list(pool.map(one, checks))
    return 1 if failed else 0


def case_names() -> list[str]:
    """The names of the cases; their file is not imported, as that takes PyTorch's seconds and the GPU's memory."""
    text = (ROOT / "benchmarks" / "sanitizer_case.py").read_text()
    return re.findall(r"^def (\w+)\(ops: Ops", text, re.MULTILINE)


def kernel_names() -> list[str]:
    """The kernels of ours: PyTorch's own would only take time."""
    names = set()
    for path in (ROOT / "kernels" / "fastgpt_kernels").glob("*.py"):
        names |= set(re.findall(r"^def (\w*kernel)\($", path.read_text(), re.MULTILINE))
    return sorted(names)


def sanitize(program: str, tool: str, name: str, until: float) -> dict[str, object]:
    """The line of one check."""
    line: dict[str, object] = {"test": f"{tool} {name}"}
    start = time.time()
    if start > until:
        return line | {"outcome": "skipped", "reason": NO_TIME}
    command = [program, "--tool", tool, "--error-exitcode", str(FOUND_ERRORS), "--target-processes", "application-only"]
    command += [part for kernel in kernel_names() for part in ("--kernel-name", f"kns={kernel}")]
    command += [sys.executable, "-m", "benchmarks.sanitizer_case", name]
    # PyTorch's allocator hands out parts of large blocks: an access beyond a tensor would be inside of its block
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        result = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=until - start
        )
    except subprocess.TimeoutExpired:
        return line | {"outcome": "skipped", "seconds": time.time() - start, "reason": NO_TIME}
    line["seconds"] = time.time() - start
    if result.returncode == 0:
        return line | {"outcome": "passed"}
    kind = "it found errors" if result.returncode == FOUND_ERRORS else f"exit code {result.returncode}"
    return line | {"outcome": "failed", "reason": f"{kind}:\n{(result.stdout + result.stderr)[-2000:]}"}


if __name__ == "__main__":
    sys.exit(main())
