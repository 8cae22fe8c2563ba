"""Where compiled code is kept, when it is found again, and what is said of a machine that cannot compile."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastgpt.engine import compiler
from fastgpt.engine.compiler import (
    INDUCTOR,
    TRITON,
    cache_folder,
    keep_compiled_code,
    kernels_digest,
    missing_compiler,
    prepare_compiler,
)
from fastgpt.engine.ranks import Ranks
from fastgpt.errors import SharedError

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def untouched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A home of this test's own, and an environment and PyTorch settings that are put back after it."""
    for name in (INDUCTOR, TRITON, "TRITON_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, "")  # so that whatever the test leaves there is undone
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    with torch.compiler.config.patch(cache_key_tag=""):
        yield


def test_code_is_kept_in_the_users_cache_for_this_processor(tmp_path: Path) -> None:
    folder = keep_compiled_code()
    assert folder is not None and Path(folder).parent == tmp_path / ".cache" / "fastgpt" / "compile"
    assert os.environ[INDUCTOR] == folder == str(cache_folder())
    assert Path(folder).stat().st_mode & 0o077 == 0, "what is run is nobody else's to write"
    # where Triton keeps its own
    assert os.environ[TRITON] == str(tmp_path / ".triton" / "cache")


def test_xdg_cache_home_and_triton_home_are_heard(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("TRITON_HOME", str(tmp_path / "triton"))
    assert str(keep_compiled_code()).startswith(str(tmp_path / "xdg" / "fastgpt" / "compile"))
    assert os.environ[TRITON] == str(tmp_path / "triton" / ".triton" / "cache")


def test_a_folder_that_the_user_names_is_left_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(INDUCTOR, "/somewhere/else")
    monkeypatch.setenv(TRITON, "/another")
    assert keep_compiled_code() == "/somewhere/else"
    assert (os.environ[INDUCTOR], os.environ[TRITON]) == ("/somewhere/else", "/another")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_one_logged_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert keep_compiled_code() is None
    assert INDUCTOR not in os.environ
    (record,) = caplog.records
    assert record.message.startswith("engine.compile: compiled code is kept for now, not for good: ")
    assert record.message.endswith(": Not a directory")
    with caplog.at_level(logging.INFO, logger="fastgpt"):
        prepare_compiler(CPU, Ranks())
    assert caplog.records[-1].message == "engine.compile: the first update compiles the blocks"


def test_a_folder_that_runs_no_code_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_flag=os.ST_NOEXEC))
    assert keep_compiled_code() is None
    assert "is on a file system that runs no code" in caplog.text


def test_a_start_says_what_is_to_come(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="fastgpt"):
        prepare_compiler(CPU, Ranks())
    (record,) = caplog.records
    assert record.message == (
        f"engine.compile: the first update compiles the blocks; compiled code is kept in {cache_folder()}"
    )


def test_code_of_other_kernels_is_not_found_again() -> None:
    """The tag is part of the key under which PyTorch keeps a graph; the user's own stays in it."""
    torch.compiler.config.cache_key_tag = "mine"
    prepare_compiler(CPU, Ranks())
    tag = torch.compiler.config.cache_key_tag
    assert tag == f"mine fastgpt_kernels-{kernels_digest()}"
    prepare_compiler(CPU, Ranks())
    assert torch.compiler.config.cache_key_tag == tag


def test_the_digest_follows_every_source(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = tmp_path / "package"
    (package / "inner").mkdir(parents=True)
    source = package / "inner" / "op.py"
    source.write_text("a = 1\n")
    monkeypatch.setattr(compiler.fastgpt_kernels, "__path__", [str(package)])
    before = kernels_digest()
    assert kernels_digest() == before
    source.write_text("a = 2\n")
    changed = kernels_digest()
    source.rename(package / "op.py")
    assert len({before, changed, kernels_digest()}) == 3


def test_a_cpu_without_a_cpp_compiler_is_told() -> None:
    from torch._inductor import config

    assert missing_compiler(CPU) is None
    with config.patch({"cpp.cxx": (None, "no-such-g++")}), pytest.raises(SharedError) as caught:
        prepare_compiler(CPU, Ranks())
    assert str(caught.value) == (
        "engine.compile: needs a C++ compiler on a CPU, and no-such-g++ does not run; "
        "install g++, name another by CXX, or set engine.compile=false"
    )


def test_a_gpu_without_triton_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler.importlib.util, "find_spec", lambda name: None)
    assert missing_compiler(torch.device("cuda")) == "needs Triton on a GPU; install it (pip install triton)"


def test_every_rank_hears_of_the_one_that_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks()
    monkeypatch.setattr(ranks, "gather", lambda mine: [mine, "needs a C++ compiler"])
    with pytest.raises(SharedError, match=r"^engine\.compile: needs a C\+\+ compiler, or set engine\.compile=false$"):
        prepare_compiler(CPU, ranks)
