"""Every kernel compiled ahead of time, without a GPU: its registers, spills and shared memory.

    python -m fastgpt_kernels.compile_report --operations attention --arch 90

prints one line for each kernel, dtype and shape, and exits with code 1 when one of them spills registers, asks for more
shared memory than the architecture has, or lacks the tensor-core instructions that it should have. The launches are the
operations' own, with meta tensors, a driver that knows only its target, and no launch after the compilation: tile
sizes, alignment and every other specialisation are those of a real run.
"""

import argparse
import contextlib
import io
import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from fastgpt_kernels import attention, dropout, gelu, launch, layernorm

# largest shared memory of a block: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}
FP32, FP16, BF16 = launch.DTYPES
OPERATIONS = ("attention", "layer_norm", "gelu", "bias_gelu", "dropout")
HEAD_SIZES = (16, 32, 40, 48, 64, 72, 80, 96, 104, 128)
COLUMNS = (7, 128, 768, 1024, 1600, 4096, 5120, 8192, 12288, 16384)


class Case(NamedTuple):
    """One operation at one size and dtype, as a call that makes all its launches."""

    operation: str
    size: str
    dtype: torch.dtype
    launches: Callable[[], None]
    quick: bool = False  # one of the few that represent the others


class Compiled(NamedTuple):
    """What the compiler says of one kernel."""

    operation: str
    size: str
    dtype: str
    arch: int
    kernel: str
    registers: int
    spilled_bytes: int
    shared_bytes: int
    wgmma: bool
    seconds: float

    def faults(self) -> list[str]:
        """What is wrong with the kernel; nothing, if all is well."""
        faults = []
        if self.spilled_bytes:
            faults.append(f"spills {self.spilled_bytes} bytes")
        if self.shared_bytes > SHARED_MEMORY[self.arch]:
            faults.append(f"exceeds the {SHARED_MEMORY[self.arch]} bytes of shared memory")
        if self.operation == "attention" and self.dtype != "float32" and self.arch == 90 and not self.wgmma:
            faults.append("has no wgmma")
        return faults


class OfflineDriver:
    """As much of a Triton driver as compiling asks for."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        """The architecture to compile for."""
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        """Kernels are cached by device: one for each architecture."""
        return self.arch

    def get_current_stream(self, device: int) -> int:
        """Nothing is launched on it."""
        return 0


def cases() -> Iterator[Case]:
    """Everything that is compiled."""
    for dtype in launch.DTYPES:
        for D in HEAD_SIZES:
            for p in (0.0, 0.1):
                quick = (D, dtype, p) in {(64, BF16, 0.0), (64, FP32, 0.0), (80, FP16, 0.1), (128, BF16, 0.1)}
                yield Case("attention", f"D={D} p={p}", dtype, _attention(D, dtype, p), quick)
        for N in COLUMNS:
            yield Case("layer_norm", f"N={N}", dtype, _layer_norm(N, dtype), (N, dtype) in {(768, BF16), (16384, FP32)})
        for approximate in ("tanh", "none"):
            x, bias = _meta(4096, 3072, dtype=dtype), _meta(3072, dtype=dtype)
            quick = (approximate, dtype) == ("tanh", BF16)
            yield Case("gelu", approximate, dtype, _gelu(x, approximate), quick)
            yield Case("bias_gelu", approximate, dtype, _bias_gelu(x, bias, approximate), quick)
        yield Case("dropout", "", dtype, _dropout(_meta(4096, 768, dtype=dtype)), dtype == BF16)


def compile_case(case: Case, arch: int) -> list[Compiled]:
    """Compile what one case launches for an architecture: 80 or 90."""
    if launch.INTERPRETED:
        raise RuntimeError("nothing is compiled under TRITON_INTERPRET=1: unset it")
    compiled: list[Compiled] = []
    run = JITFunction.run

    def compile_only(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        start = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()) as ptxas_log:
            binary = run(kernel, *args, grid=grid, warmup=True, **options)
        seconds = time.perf_counter() - start
        compiled.append(
            Compiled(
                operation=case.operation,
                size=case.size,
                dtype=str(case.dtype).removeprefix("torch."),
                arch=arch,
                kernel=kernel.fn.__name__.strip("_"),
                registers=int(re.findall(r"Used (\d+) registers", ptxas_log.getvalue())[-1]),
                spilled_bytes=sum(map(int, re.findall(r"(\d+) bytes spill", ptxas_log.getvalue()))),
                shared_bytes=binary.metadata.shared,
                wgmma="wgmma" in binary.asm["ptx"],
                seconds=seconds,
            )
        )

    # always_compile: a kernel from the cache would have no log
    with (
        knobs.nvidia.scope(),
        knobs.compilation.scope(),
        mock.patch.object(launch, "compute_capability", lambda device: arch),
        mock.patch.object(JITFunction, "run", compile_only),
    ):
        knobs.nvidia.dump_ptxas_log = True
        knobs.compilation.always_compile = True
        driver.set_active(OfflineDriver(arch))
        case.launches()
    return compiled


def _meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _attention(D: int, dtype: torch.dtype, p: float) -> Callable[[], None]:
    def launches() -> None:
        qkv, out = _meta(2, 1024, 3, 12, D, dtype=dtype), _meta(2, 1024, 12, D, dtype=dtype)
        seed = _meta(1, dtype=torch.int64) if p else None
        _, lse = attention.launch_forward(qkv, 0.125, p, seed)
        attention.launch_backward(qkv, out, lse, out, 0.125, p, seed)

    return launches


def _layer_norm(N: int, dtype: torch.dtype) -> Callable[[], None]:
    def launches() -> None:
        x, weight, mean = _meta(4096, N, dtype=dtype), _meta(N, dtype=dtype), _meta(4096, dtype=FP32)
        layernorm.launch_forward(x, weight, weight, 1e-5)
        layernorm.launch_backward(x, weight, weight, mean, mean, x)

    return launches


def _gelu(x: Tensor, approximate: str) -> Callable[[], None]:
    def launches() -> None:
        gelu.launch_gelu_forward(x, approximate)
        gelu.launch_gelu_backward(x, x, approximate)

    return launches


def _bias_gelu(x: Tensor, bias: Tensor, approximate: str) -> Callable[[], None]:
    def launches() -> None:
        gelu.launch_bias_gelu_forward(x, bias, approximate)
        gelu.launch_bias_gelu_backward(x, bias, x, approximate)

    return launches


def _dropout(x: Tensor) -> Callable[[], None]:
    def launches() -> None:
        dropout.launch_dropout(x, 0.1, _meta(1, dtype=torch.int64))

    return launches


def main() -> int:
    """Print the table; the exit code says whether a kernel has a fault."""
    parser = argparse.ArgumentParser(prog="python -m fastgpt_kernels.compile_report", description=__doc__)
    parser.add_argument("--operations", nargs="+", choices=OPERATIONS, default=OPERATIONS)
    parser.add_argument("--arch", nargs="+", type=int, choices=sorted(SHARED_MEMORY), default=sorted(SHARED_MEMORY))
    parser.add_argument("--quick", action="store_true", help="only a few cases that represent the others")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    arguments = parser.parse_args()

    rows: list[Compiled] = []
    print(f"triton {triton.__version__}")
    print(
        f"{'kernel':<36}{'size':<14}{'dtype':<10}{'arch':>5}{'regs':>6}{'spills':>8}{'shared':>9}{'wgmma':>7}{'s':>6}"
    )
    for case in cases():
        if case.operation not in arguments.operations or (arguments.quick and not case.quick):
            continue
        for arch in arguments.arch:
            for row in compile_case(case, arch):
                rows.append(row)
                name = f"{row.operation} {row.kernel.removesuffix('_kernel')}"
                print(
                    f"{name:<36}{row.size:<14}{row.dtype:<10}{row.arch:>5}{row.registers:>6}{row.spilled_bytes:>8}"
                    f"{row.shared_bytes:>9}{'yes' if row.wgmma else '-':>7}{row.seconds:>6.1f}"
                    + "".join(f"  {fault}" for fault in row.faults()),
                    flush=True,
                )
    if arguments.json:
        arguments.json.write_text(json.dumps([row._asdict() for row in rows], indent=1))
    faulty = sum(bool(row.faults()) for row in rows)
    print(f"{len(rows)} kernels, {faulty} with a fault")
    return 1 if faulty else 0


if __name__ == "__main__":
    sys.exit(main())
