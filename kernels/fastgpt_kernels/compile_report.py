"""Every kernel compiled ahead of time, without a GPU: its registers, spills and shared memory.

    python -m fastgpt_kernels.compile_report --operations attention --arch sm_90

prints one line for each kernel, dtype and shape, and exits with code 1 when one of them does not compile, spills more
than its budget, asks for more shared memory than the architecture has, or lacks an instruction that it should have.
With `--gate` it compiles what CI does (`make compile-gate`, under two versions of Triton), and fails too where a kernel
of the package is not among it for every architecture. With `--markdown FILE` it writes the tables of
docs/kernels-compiled.md (`make kernels-compiled`).

The launches are those of compile_cases.py, with a driver that knows only its target, and nothing is run.

    registers  of a thread; on gfx942 its vector registers (512 of a program with one wave for each SIMD, else 256)
    spills     bytes that a thread stores to and loads from memory for want of registers; on gfx942 its scratch memory
    shared     bytes of a program
"""

import argparse
import ast
import contextlib
import io
import json
import multiprocessing
import re
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from fastgpt_kernels import launch, tiles
from fastgpt_kernels.arguments import file_to_read, file_to_write, positive_integer
from fastgpt_kernels.compile_cases import Case, cases
from fastgpt_kernels.tiles import ARCHITECTURES

# Largest shared memory of a program. NVIDIA: CUDA C++ Programming Guide, "Technical Specifications per Compute
# Capability", less the kilobyte that CUDA keeps. AMD: CDNA 3 instruction set reference, section 11, "Data Share".
SHARED_MEMORY = {
    "sm_80": 163 * 1024,
    "sm_89": 99 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "gfx942": 64 * 1024,
}
TENSOR_MEMORY = 512  # columns of a multiprocessor, sm_100
INSTRUCTIONS = ("wgmma", "tcgen05.mma", "mma.sync", "v_mfma")


INTERPRETED = "nothing is compiled under TRITON_INTERPRET=1: unset it"


class Compiled(NamedTuple):
    """What the compiler says of one kernel."""

    operation: str
    size: str
    dtype: str
    arch: str
    kernel: str  # with its file: "gelu.gelu_forward_kernel"
    tiles: str
    registers: int
    spilled_bytes: int
    spill_budget: int | None
    shared_bytes: int
    tensor_columns: int  # of tensor memory
    instruction: str  # that multiplies matrices
    needed: str  # the instruction that must be there
    seconds: float
    error: str = ""  # why it was not compiled

    def faults(self) -> list[str]:
        """What is wrong with the kernel; nothing, if all is well."""
        if self.error:
            return [self.error]
        faults = []
        if self.spill_budget is not None and self.spilled_bytes > self.spill_budget:
            budget = f", {self.spill_budget} are allowed" if self.spill_budget else ""
            faults.append(f"spills {self.spilled_bytes} bytes{budget}")
        if self.shared_bytes > SHARED_MEMORY[self.arch]:
            faults.append(f"exceeds the {SHARED_MEMORY[self.arch]} bytes of shared memory")
        if self.tensor_columns > TENSOR_MEMORY:
            faults.append(f"exceeds the {TENSOR_MEMORY} columns of tensor memory")
        if self.needed and self.instruction != self.needed:
            faults.append(f"has no {self.needed}")
        return faults


class OfflineDriver:
    """As much of a Triton driver as compiling asks for."""

    def __init__(self, arch: str) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        """The architecture to compile for."""
        if self.arch.startswith("gfx"):
            return GPUTarget("hip", self.arch, 64)
        return GPUTarget("cuda", int(self.arch.removeprefix("sm_")), 32)

    def get_current_device(self) -> str:
        """Kernels are cached by device: one for each architecture."""
        return self.arch

    def get_current_stream(self, device: str) -> int:
        """Nothing is launched on it."""
        return 0


def compile_case(case: Case, arch: str) -> list[Compiled]:
    """Compile what one case launches, for one of the `ARCHITECTURES`."""
    if launch.INTERPRETED:
        raise RuntimeError(INTERPRETED)
    compiled: list[Compiled] = []
    run = JITFunction.run

    def compile_only(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        name = kernel.fn.__name__.strip("_")
        if case.kernel is not None and name != f"{case.kernel}_kernel":
            return
        kernel.device_caches.clear()  # it would not be compiled again, and have no log
        row = Compiled(
            operation=case.operation,
            size=case.size,
            dtype=str(case.dtype).removeprefix("torch."),
            arch=arch,
            kernel=f"{kernel.fn.__module__.rpartition('.')[2]}.{name}",
            tiles=_tiles_of(options),
            registers=0,
            spilled_bytes=0,
            spill_budget=case.spill_budget,
            shared_bytes=0,
            tensor_columns=0,
            instruction="",
            needed=case.instruction,
            seconds=0.0,
        )
        start = time.perf_counter()
        try:
            with contextlib.redirect_stdout(io.StringIO()) as ptxas_log:
                binary = run(kernel, *args, grid=grid, warmup=True, **options)
        except Exception as error:
            compiled.append(row._replace(error=f"{type(error).__name__}: {' '.join(str(error).split())[-300:]}"))
            return
        assembly = binary.asm["amdgcn" if "amdgcn" in binary.asm else "ptx"]
        registers, spilled_bytes = _of_amd(assembly) if "amdgcn" in binary.asm else _of_nvidia(ptxas_log.getvalue())
        compiled.append(
            row._replace(
                registers=registers,
                spilled_bytes=spilled_bytes,
                shared_bytes=binary.metadata.shared,
                tensor_columns=getattr(binary.metadata, "tmem_size", None) or 0,
                instruction=next((word for word in INSTRUCTIONS if word in assembly), ""),
                seconds=round(time.perf_counter() - start, 2),
            )
        )

    forced: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if case.kernel is not None and case.tiles is not None:
        forced = tiles.forced(case.kernel, case.tiles)
    token = launch.compiling_for.set(arch)
    try:
        # always_compile: a kernel from the cache on the disk would have no log
        with (
            knobs.nvidia.scope(),
            knobs.compilation.scope(),
            mock.patch.object(JITFunction, "run", compile_only),
            forced,
        ):
            knobs.nvidia.dump_ptxas_log = True
            knobs.compilation.always_compile = True
            driver.set_active(OfflineDriver(arch))
            case.launches()
    finally:
        launch.compiling_for.reset(token)
    return compiled


def _of_nvidia(ptxas_log: str) -> tuple[int, int]:
    registers = re.findall(r"Used (\d+) registers", ptxas_log)
    return int(registers[-1]), sum(map(int, re.findall(r"(\d+) bytes spill", ptxas_log)))


def _of_amd(assembly: str) -> tuple[int, int]:
    def field(name: str) -> int:
        return int(re.findall(rf"\.{name}:\s+(\d+)", assembly)[-1])

    return field("vgpr_count"), field("private_segment_fixed_size")


def _tiles_of(options: dict[str, Any]) -> str:
    """128 x 64, 8 warps, 3 stages: as "128x64 w8 s3"."""
    blocks = "x".join(str(options[name]) for name in ("BLOCK_M", "BLOCK_N") if name in options)
    numbers = {"w": options.get("num_warps"), "s": options.get("num_stages")}
    return " ".join([blocks, *(f"{letter}{number}" for letter, number in numbers.items() if number)]).strip()


@cache
def _numbered_cases() -> list[Case]:
    return list(cases())


def _compile_number(number: int, arch: str) -> list[Compiled]:
    return compile_case(_numbered_cases()[number], arch)


def compile_all(work: Iterable[tuple[int, str]], jobs: int) -> Iterator[list[Compiled]]:
    """Compile cases by their number in `cases()`, each for an architecture, in several processes."""
    if jobs == 1:
        yield from (_compile_number(*item) for item in work)
        return
    # spawn: a forked process would inherit the threads' locks of torch and LLVM
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(_compile_number, *zip(*work, strict=True))


PAGE = """\
# Kernels, compiled

What the compiler says of every kernel of the gate, under Triton {versions}. `make kernels-compiled` writes this page,
`make compile-gate` compiles the same in CI. Where the versions differ, a cell has a number for each, in this order.

Head sizes are those of the table of tiles, `attention_tiles.json`; `plain` is attention without dropout, window and
documents. Registers and spilled bytes are those of a thread (on gfx942, vector registers and scratch memory), shared
memory is that of a program. A kernel that is launched in several variants has the largest numbers of them."""


def kernels_of_package() -> set[str]:
    """Every kernel that a file of this package launches, as "gelu.gelu_forward_kernel"; a kernel starts in its file."""
    found = set()
    for path in Path(__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel"):
                decorators = {ast.unparse(decorator) for decorator in node.decorator_list}
                if any(decorator.startswith("triton.jit") for decorator in decorators):
                    found.add(f"{path.stem}.{node.name.strip('_')}")
    return found


def uncovered(rows: Iterable[Compiled], architectures: Iterable[str]) -> list[str]:
    """The kernels of the package that are not among the rows for each of the architectures."""
    compiled = {(row.kernel, row.arch) for row in rows}
    return [
        f"{kernel} was not compiled for {arch}"
        for kernel in sorted(kernels_of_package())
        for arch in architectures
        if (kernel, arch) not in compiled
    ]


HEADER = (
    f"{'kernel':<46}{'size':<37}{'dtype':<10}{'arch':<8}{'tiles':<15}"
    f"{'regs':>5}{'spills':>8}{'shared':>8}  {'matrix':<12}{'s':>5}"
)


def line(row: Compiled) -> str:
    """A row of the printed table."""
    name = f"{row.operation} {row.kernel.removesuffix('_kernel')}"
    return (
        f"{name:<46}{row.size:<37}{row.dtype:<10}{row.arch:<8}{row.tiles:<15}"
        f"{row.registers:>5}{row.spilled_bytes:>8}{row.shared_bytes:>8}  "
        f"{row.instruction or '-':<12}{row.seconds:>5.1f}" + "".join(f"  {fault}" for fault in row.faults())
    )


def markdown(reports: Sequence[tuple[str, Sequence[Compiled]]]) -> str:
    """docs/kernels-compiled.md.

    Args:
        reports: the rows of the gate under each version of Triton.
    """
    text = [PAGE.format(versions=" and ".join(version for version, _ in reports))]
    merged = [_largest(rows) for _, rows in reports]
    for arch in ARCHITECTURES:
        text += [
            "",
            f"## {arch}",
            "",
            f"At most {SHARED_MEMORY[arch]:,} bytes of shared memory.",
            "",
            "| Kernel | Size | dtype | Tiles | Registers | Spilled bytes | Shared memory | Matrix instruction |",
            "|---|---|---|---|--:|--:|--:|---|",
        ]
        for key in merged[0]:
            rows = [report[key] for report in merged if key in report]
            if rows[0].arch == arch:
                text.append("| " + " | ".join(_cells(rows)) + " |")
    return "\n".join(text) + "\n"


def _cells(rows: Sequence[Compiled]) -> Iterator[str]:
    """A row of the page, from its kernel under each Triton."""

    def numbers(values: Iterable[int | str]) -> str:
        words = [f"{value:,}" if isinstance(value, int) else value for value in values]
        return words[0] if len(set(words)) == 1 else " / ".join(words)

    first = rows[0]
    yield f"{first.operation}: {first.kernel.rpartition('.')[2].removesuffix('_kernel')}"
    yield first.size
    yield first.dtype
    yield first.tiles
    yield numbers(row.registers for row in rows)
    spilled = numbers(row.spilled_bytes for row in rows)
    yield f"{spilled} (budget {first.spill_budget:,})" if first.spill_budget else spilled
    yield numbers(row.shared_bytes for row in rows)
    yield numbers(row.instruction for row in rows)


def _largest(rows: Iterable[Compiled]) -> dict[tuple[str, ...], Compiled]:
    """The rows by what tells them apart; of several variants, the largest numbers."""
    merged: dict[tuple[str, ...], Compiled] = {}
    for row in rows:
        key = (row.arch, row.operation, row.kernel, row.size, row.dtype, row.tiles)
        other = merged.get(key, row)
        merged[key] = row._replace(
            registers=max(row.registers, other.registers),
            spilled_bytes=max(row.spilled_bytes, other.spilled_bytes),
            shared_bytes=max(row.shared_bytes, other.shared_bytes),
        )
    return merged


def read(path: Path) -> tuple[str, list[Compiled]]:
    """The version of Triton and the rows that `--json` wrote."""
    report = json.loads(path.read_text())
    return report["triton"], [Compiled(**row) for row in report["rows"]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; the exit code says whether a kernel has a fault."""
    operations = list(dict.fromkeys(case.operation for case in _numbered_cases()))
    parser = argparse.ArgumentParser(
        prog="python -m fastgpt_kernels.compile_report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--operations", nargs="+", choices=operations, default=operations)
    parser.add_argument("--arch", nargs="+", choices=ARCHITECTURES, default=ARCHITECTURES)
    parser.add_argument("--only", nargs="+", default=[], help="only cases with all of these words: D=64 plain bfloat16")
    parser.add_argument("--gate", action="store_true", help="only the cases that CI compiles")
    parser.add_argument(
        "--no-float32-attention",
        action="store_true",
        help="leave out what is there for tests and comparisons only, and takes a third of the time",
    )
    parser.add_argument(
        "--candidates", action="store_true", help="only attention's tiles that may be chosen and are not"
    )
    parser.add_argument("--jobs", type=positive_integer, default=1, help="processes")
    parser.add_argument("--json", type=file_to_write, help="also write the rows to this file")
    parser.add_argument("--markdown", type=file_to_write, help="write the page of docs to this file; with --gate")
    parser.add_argument(
        "--beside", type=file_to_read, nargs="+", default=[], help="files of --json, for the page of --markdown"
    )
    options = parser.parse_args(arguments)
    if launch.INTERPRETED:
        parser.error(INTERPRETED)
    if options.beside and not options.markdown:
        parser.error("--beside is for the page of --markdown")
    whole = options.operations == operations and not options.only
    every = whole and not options.no_float32_attention
    if options.markdown and not (options.gate and every and list(options.arch) == list(ARCHITECTURES)):
        parser.error("--markdown needs --gate, and all of it")

    work = [
        (number, arch)
        for number, case in enumerate(_numbered_cases())
        for arch in options.arch
        if case.operation in options.operations
        and case.arch in (None, arch)
        and (case.gate or not options.gate)
        and (case.is_candidate or not options.candidates)
        and not (options.no_float32_attention and (case.operation, case.dtype) == ("attention", torch.float32))
        and set(options.only) <= {*case.size.split(), str(case.dtype).removeprefix("torch.")}
    ]
    start = time.perf_counter()
    print(f"triton {triton.__version__}\n{HEADER}")
    rows: list[Compiled] = []
    for compiled in compile_all(work, options.jobs):
        for row in compiled:
            rows.append(row)
            print(line(row), flush=True)
    if options.json:
        options.json.write_text(json.dumps({"triton": triton.__version__, "rows": [row._asdict() for row in rows]}))
    if options.markdown:
        options.markdown.write_text(markdown([(triton.__version__, rows), *map(read, options.beside)]))
    faulty = [row for row in rows if row.faults()]
    missing = uncovered(rows, options.arch) if options.gate and whole else []
    print(f"{len(rows)} kernels, {len(faulty)} with a fault, in {time.perf_counter() - start:.0f} s")
    print(*(line(row) for row in faulty), *missing, sep="\n")
    return 1 if faulty or missing or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
