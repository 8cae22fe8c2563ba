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
    *("-std=c++17", "-O3", "-fPIC", "-fopenmp", "-fno-math-errno", "-fno-strict-aliasing", "-Wall", "-Wextra"),
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
    try:
        reasons = reasons_against()
        loaded = None if reasons else ctypes.CDLL(str(_compiled(_folder())))
    except (OSError, RuntimeError, subprocess.CalledProcessError) as problem:
        told = problem.stderr if isinstance(problem, subprocess.CalledProcessError) else str(problem)
        raise UnsupportedInput("The backend 'native' cannot run here", [" ".join(told.split())], REMEDY) from problem
    if loaded is None:
        raise UnsupportedInput("The backend 'native' cannot run here", reasons, REMEDY)
    return loaded


def _folder() -> Path:
    """Where compiled code is kept.

    Raises:
        RuntimeError: the user has no home.
    """
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base).absolute() / "fastgpt" / "native"


def _compiled(folder: Path) -> Path:
    """The library in a folder, compiled if it is not there whole; of several processes one compiles, the others wait.

    Raises:
        OSError: the folder cannot be used, or is not the user's alone to write.
        subprocess.CalledProcessError: it does not compile.
    """
    compiler = _compiler()
    assert compiler is not None
    files = sorted(path for path in SOURCES.iterdir() if path.suffix in (".cpp", ".h"))
    said = [_run(compiler, "--version").encode(), *(flag.encode() for flag in FLAGS)]
    said += [part for file in files for part in (file.name.encode(), file.read_bytes())]
    target = folder / f"{_digest(bytes(1).join(said))}.so"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.stat()
    if found.st_uid != os.geteuid() or found.st_mode & 0o022:  # what lies there is run
        raise OSError(f"{folder} is not yours alone to write: chmod 700, or another XDG_CACHE_HOME")
    if not _is_whole(target):
        with (folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            for left in folder.glob("tmp*"):  # by a compilation that was killed
                shutil.rmtree(left, ignore_errors=True)
            if not _is_whole(target):
                _compile(compiler, [file for file in files if file.suffix == ".cpp"], target)
    return target


def _is_whole(target: Path) -> bool:
    """Whether a library is what was compiled: loading a damaged one would end the process."""
    try:
        return _seal(target).read_text() == _digest(target.read_bytes())
    except (OSError, UnicodeDecodeError):
        return False


def _seal(target: Path) -> Path:
    return target.with_suffix(".sha256")


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _compile(compiler: str, files: list[Path], target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        objects = [Path(scratch) / f"{file.stem}.o" for file in files]
        compilations = [
            subprocess.Popen(
                [compiler, *FLAGS, "-c", str(file), "-o", str(made)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
            )
            for file, made in zip(files, objects, strict=True)
        ]
        told = [compilation.communicate()[1].decode(errors="replace") for compilation in compilations]
        for compilation, words in zip(compilations, told, strict=True):
            if compilation.returncode:
                raise subprocess.CalledProcessError(compilation.returncode, compilation.args, stderr=words)
        made, seal = Path(scratch) / target.name, Path(scratch) / "seal"
        # without -fopenmp, which would bring a second OpenMP with threads of its own beside PyTorch's
        _run(compiler, "-shared", *map(str, objects), "-o", str(made))
        seal.write_text(_digest(made.read_bytes()))
        made.replace(target)
        seal.replace(_seal(target))


def _run(*command: str) -> str:
    """What a program prints.

    Raises:
        subprocess.CalledProcessError: it fails.
    """
    return subprocess.run(command, check=True, capture_output=True, text=True, errors="replace").stdout


@functools.cache
def _compiler() -> str | None:
    return shutil.which("g++")


@functools.cache
def _processor_flags() -> frozenset[str]:
    lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    flags = next((line.partition(":")[2] for line in lines if line.startswith("flags")), "")
    return frozenset(flags.split())
