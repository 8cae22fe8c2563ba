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
def test_a_damaged_library_is_compiled_again_and_never_loaded(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made = library._compiled(library._folder())
    whole = made.read_bytes()
    (made.parent / "tmpkilled").mkdir()
    for damaged in (whole[: len(whole) // 2], whole[: len(whole) // 2] + bytes(len(whole) // 2), b"", None):
        made.write_bytes(damaged) if damaged is not None else library._seal(made).unlink()
        assert library._compiled(library._folder()) == made and library._is_whole(made)
    assert {path.name for path in made.parent.iterdir()} == {made.name, library._seal(made).name, "lock"}


@NEEDED
def test_a_folder_that_others_may_write_is_refused(monkeypatch, tmp_path):
    folder = tmp_path / "fastgpt" / "native"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert f"{folder} is not yours alone to write" in refusal()


@NEEDED
def test_a_compiler_may_speak_any_language(monkeypatch, tmp_path):
    program = tmp_path / "g++"
    told = "if [ $1 = --version ]; then printf 'g++ \\374'; else printf '\\374 wrong' >&2; exit 1; fi"
    program.write_text(f"#!/bin/sh\n{told}\n")
    program.chmod(0o755)
    monkeypatch.setattr(library, "_compiler", lambda: str(program))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert "wrong" in refusal()


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
    products = {"attention.cpp", "product.cpp", "products.h"}
    rest = {"cross_entropy.cpp", "gelu.cpp", "norms.cpp", "sums.cpp", "peak.cpp", "chunks.h", "memory.h", "vectors.h"}
    assert names == products | rest
