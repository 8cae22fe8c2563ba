"""The C++ of `src`, compiled on this machine when it is first needed, and loaded.

Compiled code is kept in ${XDG_CACHE_HOME:-~/.cache}/fastgpt/native, under a name that stands for sources, flags and
compiler; it can be deleted at any time. It uses the threads of PyTorch: its calls of OpenMP find the library that
PyTorch has loaded.
"""

import ctypes
import fcntl
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

from fastgpt_kernels.errors import UnsupportedInput

SOURCES = Path(__file__).with_name("src")
INSTRUCTIONS = ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16", "fma")
FLAGS = (
    *("-std=c++17", "-O3", "-fPIC", "-fopenmp", "-fno-math-errno", "-Wall", "-Wextra"),
    "-ffp-contract=off",  # a product is fused with a sum only where the code says so
    "-Wno-maybe-uninitialized",  # GCC's own headers leave registers undefined on purpose
    *(f"-m{name.replace('_', '')}" for name in INSTRUCTIONS),
)
REMEDY = "Set kernels.backend to 'torch' to run without them."


@functools.cache
def reasons_against() -> tuple[str, ...]:
    """Why these kernels cannot run here, as far as it can be known without compiling them."""
    reasons = []
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        reasons.append(f"they are for Linux on x86-64, and this is {platform.system()} on {platform.machine()}")
    elif missing := [name for name in INSTRUCTIONS if name not in _processor_flags()]:
        reasons.append(f"this CPU has no {', '.join(missing)}")
    if not torch.backends.openmp.is_available():
        reasons.append("this PyTorch was built without OpenMP")
    if _compiler() is None:
        reasons.append("there is no g++ to compile them")
    return tuple(reasons)


@functools.cache
def has_matrix_units() -> bool:
    """Whether this CPU multiplies bfloat16 matrices as such (AMX), which PyTorch does and these kernels do not."""
    return "amx_bf16" in _processor_flags()


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled code. The first call of a machine compiles it, in a few seconds.

    Raises:
        UnsupportedInput: it cannot run here, be compiled or be loaded.
    """
    if reasons := reasons_against():
        raise UnsupportedInput("The backend 'native' cannot run here", reasons, REMEDY)
    try:
        return ctypes.CDLL(str(_compiled(_folder())))
    except (OSError, RuntimeError, subprocess.CalledProcessError) as problem:
        told = problem.stderr.strip() if isinstance(problem, subprocess.CalledProcessError) else str(problem)
        raise UnsupportedInput("The backend 'native' cannot run here", [" ".join(told.split())], REMEDY) from problem


def _folder() -> Path:
    """Where compiled code is kept.

    Raises:
        RuntimeError: the user has no home.
    """
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base).absolute() / "fastgpt" / "native"


def _compiled(folder: Path) -> Path:
    """The library in a folder, compiled if it is not there; of several processes one compiles and the others wait."""
    compiler = _compiler()
    assert compiler is not None
    version = subprocess.run([compiler, "--version"], check=True, capture_output=True, text=True).stdout
    files = sorted(SOURCES.iterdir())
    said = "\0".join([version, *FLAGS, *(f"{file.name}\0{file.read_text()}" for file in files)])
    target = folder / f"{hashlib.sha256(said.encode()).hexdigest()[:16]}.so"
    if target.exists():
        return target
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # what lies there is run: it is nobody else's to write
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            _compile(compiler, [file for file in files if file.suffix == ".cpp"], target)
    return target


def _compile(compiler: str, files: list[Path], target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        objects = [Path(scratch) / f"{file.stem}.o" for file in files]
        compilations = [
            subprocess.Popen(
                [compiler, *FLAGS, "-c", str(file), "-o", str(made)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
            )
            for file, made in zip(files, objects, strict=True)
        ]
        for compilation in compilations:
            told = compilation.communicate()[1].decode(errors="replace")
            if compilation.returncode:
                raise subprocess.CalledProcessError(compilation.returncode, compilation.args, stderr=told)
        made = Path(scratch) / target.name
        # without -fopenmp, which would bring a second OpenMP with threads of its own beside PyTorch's
        linking = [compiler, "-shared", *map(str, objects), "-o", str(made)]
        subprocess.run(linking, check=True, capture_output=True, text=True)
        made.replace(target)


@functools.cache
def _compiler() -> str | None:
    return shutil.which("g++")


@functools.cache
def _processor_flags() -> frozenset[str]:
    lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    flags = next((line.partition(":")[2] for line in lines if line.startswith("flags")), "")
    return frozenset(flags.split())
