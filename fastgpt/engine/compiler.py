"""What torch.compile asks of a machine, and where its work is kept from one start to the next.

PyTorch keeps compiled graphs in the folder that TORCHINDUCTOR_CACHE_DIR names, by default one under /tmp, which a
reboot empties. Ours is ${XDG_CACHE_HOME:-~/.cache}/fastgpt/compile/CPU, where CPU stands for the processor: code for
one may have instructions that another lacks, and a home may be shared by several. Ranks may share it too. It can be
deleted at any time.
"""

import contextlib
import hashlib
import importlib.util
import logging
import os
import platform
import tempfile
from pathlib import Path
from typing import Any

import fastgpt_kernels
import torch

from fastgpt.engine.compiled import REMEDY
from fastgpt.engine.ranks import Ranks
from fastgpt.errors import SharedError

log = logging.getLogger(__name__)

INDUCTOR, TRITON = "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"


def prepare_compiler(device: torch.device, ranks: Ranks) -> None:
    """Make this process ready for torch.compile, before anything is compiled in it; every rank calls this.

    Raises:
        SharedError: a rank's machine cannot compile.
    """
    folder = keep_compiled_code()
    _mark_kernels()
    for problem in ranks.gather(missing_compiler(device)):
        if problem:
            raise SharedError(f"engine.compile: {problem}, or {REMEDY}")
    where = f"; compiled code is kept in {folder}" if folder else ""
    log.info("engine.compile: the first update compiles the blocks%s", where)


def keep_compiled_code() -> str | None:
    """Choose a folder that outlives the machine's next start, where the environment names none; returns it.

    Where there can be none PyTorch's default remains, which is logged.
    """
    if INDUCTOR not in os.environ:
        try:
            folder = cache_folder()
            _try_out(folder)
        except (OSError, RuntimeError) as problem:  # RuntimeError: nobody knows where the user's home is
            log.warning("engine.compile: compiled code is kept for now, not for good: %s", _told(problem))
            return None
        os.environ[INDUCTOR] = str(folder)
        # Triton's own default: left open, PyTorch would move our kernels' cache into its own once it compiles
        with contextlib.suppress(RuntimeError):
            home = os.environ.get("TRITON_HOME") or Path.home()
            os.environ.setdefault(TRITON, str(Path(home) / ".triton" / "cache"))
    return os.environ[INDUCTOR]


def cache_folder() -> Path:
    """Where compiled code is kept by default.

    Raises:
        RuntimeError: the user has no home.
    """
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base).absolute() / "fastgpt" / "compile" / processor_digest()


def _try_out(folder: Path) -> None:
    """See that code can be kept in a folder, and run from there.

    Raises:
        OSError: it cannot.
    """
    # what lies there is run: it is nobody else's to write
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass
    if os.statvfs(folder).f_flag & getattr(os, "ST_NOEXEC", 0):
        raise OSError(f"{folder} is on a file system that runs no code")


def processor_digest() -> str:
    """A name for this machine's kind of processor, the same for two that run the same code."""
    told = [platform.machine()]
    path = Path("/proc/cpuinfo")
    if path.is_file():
        first = path.read_text(errors="replace").split("\n\n")[0].splitlines()
        told += [line for line in first if line.startswith(("model name", "flags", "Features", "CPU part"))]
    else:
        told.append(platform.processor())
    return _digest("\n".join(told).encode())


def _mark_kernels() -> None:
    """Let PyTorch find a graph again only where our operations are as they were when it was compiled.

    It knows an operation by its name alone, and would take a graph from its cache that has the gradient of before.
    """
    settings: Any = torch.compiler.config
    tag = f"fastgpt_kernels-{kernels_digest()}"
    if tag not in settings.cache_key_tag:  # which the user may have set
        settings.cache_key_tag = f"{settings.cache_key_tag} {tag}".strip()


def kernels_digest() -> str:
    """A digest of the sources of our operations."""
    root = Path(fastgpt_kernels.__path__[0])
    sources = sorted(root.rglob("*.py"))
    return _digest(b"".join(str(path.relative_to(root)).encode() + path.read_bytes() for path in sources))


def missing_compiler(device: torch.device) -> str | None:
    """What this machine lacks for torch.compile, and the remedy; None where it has all."""
    if device.type == "cuda":
        return None if importlib.util.find_spec("triton") else "needs Triton on a GPU; install it (pip install triton)"
    from torch._inductor import config
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except (InvalidCxxCompiler, OSError):
        tried = config.cpp.cxx if isinstance(config.cpp.cxx, (list, tuple)) else [config.cpp.cxx]
        names = ", ".join(str(name) for name in tried if name)
        return f"needs a C++ compiler on a CPU, and {names} does not run; install g++, name another by CXX"
    return None


def _told(problem: Exception) -> str:
    """The system's words, without its number."""
    if isinstance(problem, OSError) and problem.filename:
        return f"{problem.filename}: {problem.strerror}"
    return str(problem)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
