"""How the native backend's C++ is compiled, kept and refused."""

import subprocess
import sys
from pathlib import Path

import pytest
from fastgpt_kernels import UnsupportedInput, load_ops
from fastgpt_kernels.native import library, peak

NEEDED = pytest.mark.skipif(bool(library.reasons_against()), reason="; ".join(library.reasons_against()))
PROGRAM = "from fastgpt_kernels import load_ops; print(load_ops('native').name)"


@pytest.fixture(autouse=True)
def asked_anew():
    """What is known of this machine is asked again, before and after a test."""
    for known in (library.reasons_against, library.library, library._compiler, library._processor_flags):
        known.cache_clear()
    yield
    for known in (library.reasons_against, library.library, library._compiler, library._processor_flags):
        known.cache_clear()


def refusal() -> str:
    with pytest.raises(UnsupportedInput) as error:
        load_ops("native")
    return str(error.value)


def test_a_cpu_without_the_instructions_is_named_with_what_it_lacks(monkeypatch):
    monkeypatch.setattr(library, "_processor_flags", lambda: frozenset({"avx512f", "fma"}))
    assert "this CPU has no avx512bw, avx512vl, avx512dq, avx512_bf16" in refusal()
    assert "Set kernels.backend to 'torch'" in refusal()


def test_a_machine_without_a_compiler_is_told_so(monkeypatch):
    monkeypatch.setattr(library, "_compiler", lambda: None)
    assert "there is no g++ to compile them" in refusal()


def test_another_system_is_told_so(monkeypatch):
    monkeypatch.setattr(library.platform, "machine", lambda: "arm64")
    assert "they are for Linux on x86-64, and this is Linux on arm64" in refusal()


@NEEDED
def test_the_compiler_s_own_words_are_passed_on(monkeypatch, tmp_path):
    sources = tmp_path / "src"
    sources.mkdir()
    (sources / "wrong.cpp").write_text("int twice(int x) { return 2 * y; }\n")
    monkeypatch.setattr(library, "SOURCES", sources)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert "was not declared in this scope" in refusal()
    assert [path.name for path in (tmp_path / "cache" / "fastgpt" / "native").iterdir()] == ["lock"]


@NEEDED
def test_a_folder_that_cannot_be_written_is_named(monkeypatch, tmp_path):
    (tmp_path / "cache").write_text("a file\n")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert str(tmp_path / "cache") in refusal()


@NEEDED
def test_several_processes_at_once_compile_once_and_later_ones_not_at_all(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", ":".join(sys.path))
    command = [sys.executable, "-c", PROGRAM]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate()[0] for process in processes] == ["native\n", "native\n"]
    (made,) = (tmp_path / "fastgpt" / "native").glob("*.so")
    before = made.stat()
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout == "native\n"
    assert (made.stat().st_ino, made.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert made.parent.stat().st_mode & 0o077 == 0


@NEEDED
def test_a_change_of_the_sources_is_compiled_anew(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    first = library._compiled(library._folder())
    sources = tmp_path / "src"
    sources.mkdir()
    for file in library.SOURCES.iterdir():
        (sources / file.name).write_text(file.read_text())
    monkeypatch.setattr(library, "SOURCES", sources)
    assert library._compiled(library._folder()) == first
    (sources / "gelu.cpp").write_text((sources / "gelu.cpp").read_text() + "// changed\n")
    assert library._compiled(library._folder()) != first


@NEEDED
def test_the_loop_that_measures_the_cpu_has_every_instruction_that_is_counted():
    command = [library._compiler(), *library.FLAGS, "-S", "-o", "-", str(library.SOURCES / "peak.cpp")]
    assembly = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert assembly.count("vdpbf16ps") * 64 == peak.OPERATIONS


def test_the_sources_are_part_of_the_package():
    names = {path.name for path in Path(library.SOURCES).iterdir()}
    assert {"attention.cpp", "cross_entropy.cpp", "gelu.cpp", "norms.cpp", "vectors.h"} <= names
