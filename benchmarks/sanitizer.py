"""compute-sanitizer's memcheck and racecheck over each operation's kernels, several processes at once, the most telling
first.

    python -m benchmarks.sanitizer --lines FILE --until SECONDS

Each check is a line of JSON in the file, as `benchmarks.lines` has them. Exit code 1 where one found an error.
"""

import argparse
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.lines import append
from benchmarks.results import NO_TIME, NOT_MEASURED

ROOT = Path(__file__).resolve().parents[1]
# in the order of their turns: first the kernels with the most ways to go wrong, last those that another case has too
CASES = (
    "causal_attention",
    "add_layer_norm",
    "cross_entropy",
    "embedding",
    "linear_gelu_fused",
    "decode_attention",
    "bias_gelu",
    "adamw",
    "gradient_norm",
    "dropout_add",
    "gelu",
    "dropout",
    "layer_norm",
    "linear_cross_entropy",
)
# without shared memory, in which alone racecheck looks for races
ELEMENT_BY_ELEMENT = ("gelu", "dropout", "dropout_add", "adamw")
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
    program = shutil.which(PROGRAM)
    if program is None:
        append(arguments.lines, {"test": PROGRAM, "outcome": NOT_MEASURED, "reason": f"{PROGRAM} not found"})
        return 0
    failed = False
    writing = threading.Lock()

    compiled = {name: threading.Event() for name in CASES}

    def one(check: tuple[str, str]) -> None:
        nonlocal failed
        tool, name = check
        if tool != "memcheck":
            compiled[name].wait()
        try:
            line = sanitize(program, tool, name, until=arguments.until)
        finally:
            compiled[name].set()
        with writing:
            append(arguments.lines, line)
        failed = failed or line["outcome"] == "failed"

    with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // CORES)) as pool:
        list(pool.map(one, checks()))
    return 1 if failed else 0


def checks() -> list[tuple[str, str]]:
    """Tools and cases in the order of their turns: a case's second check finds what its first one compiled."""
    races = [("racecheck", name) for name in CASES if name not in ELEMENT_BY_ELEMENT]
    return [("memcheck", name) for name in CASES] + races


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
    # a group of its own, so that all of it can be ended; in the session of this part, which is ended with the part
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=-1, stderr=subprocess.STDOUT, text=True, process_group=0
    ) as process:
        try:
            output, _ = process.communicate(timeout=until - start)
        except subprocess.TimeoutExpired:
            return line | {"outcome": "skipped", "seconds": time.time() - start, "reason": NO_TIME}
        finally:
            # what is looked at is a child of the program, and would stay on the GPU without it
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    line["seconds"] = time.time() - start
    if process.returncode == 0:
        return line | {"outcome": "passed"}
    kind = "it found errors" if process.returncode == FOUND_ERRORS else f"exit code {process.returncode}"
    return line | {"outcome": "failed", "reason": f"{kind}:\n{output[-2000:]}"}


if __name__ == "__main__":
    sys.exit(main())
