import inspect
import logging
import os
import subprocess
import sys

import pytest
import torch
from fastgpt_kernels import Ops, UnsupportedInput, dispatch, load_ops


def run_without_interpreter(code: str) -> str:
    """The output of a program in which Triton compiles."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("backend", ["torch", "reference", "triton"])
def test_a_backend_brings_every_operation(backend):
    ops = load_ops(backend)
    assert ops.name == backend
    assert all(callable(operation) for operation in ops[1:])


def test_backends_share_their_names_and_defaults():
    for operation in Ops._fields[1:]:
        signatures = {
            str(inspect.signature(getattr(load_ops(backend), operation)))
            for backend in ("torch", "reference", "triton")
        }
        assert len(signatures) == 1, operation


@pytest.mark.parametrize(
    ("gpu", "chosen", "message"),
    [
        (False, "torch", "kernels: torch, because PyTorch sees no GPU"),
        (True, "triton", "kernels: triton, because PyTorch sees a GPU (H100)"),
    ],
)
def test_auto_chooses_by_the_hardware_and_says_so_once(gpu, chosen, message, monkeypatch, caplog):
    dispatch._automatic_backend.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "H100")
    with caplog.at_level(logging.INFO, logger="fastgpt_kernels"):
        assert load_ops().name == chosen
        assert load_ops("auto").name == chosen
    dispatch._automatic_backend.cache_clear()
    assert [(record.levelname, record.message) for record in caplog.records] == [("INFO", message)]


def test_auto_without_triton_is_torch(monkeypatch, caplog):
    dispatch._automatic_backend.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: None)
    with caplog.at_level(logging.INFO, logger="fastgpt_kernels"):
        assert load_ops().name == "torch"
    dispatch._automatic_backend.cache_clear()
    assert caplog.messages == ["kernels: torch, because Triton is not installed"]


def test_an_unknown_backend_is_met_with_the_nearest_one():
    with pytest.raises(UnsupportedInput) as error:
        load_ops("trition")
    assert str(error.value) == (
        "'trition' is not a kernel backend:\n"
        "  - allowed: 'auto', 'triton', 'native', 'torch', 'reference'\n"
        "Did you mean 'triton'?"
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_triton_without_a_gpu_or_interpreter_says_what_to_do():
    output = run_without_interpreter(
        "from fastgpt_kernels import load_ops, UnsupportedInput\n"
        "try: load_ops('triton')\n"
        "except UnsupportedInput as error: print(error)"
    )
    assert output == (
        "The backend 'triton' cannot run here:\n"
        "  - PyTorch sees no GPU\n"
        "  - TRITON_INTERPRET=1 was not set\n"
        "Set kernels.backend to 'torch' to run without Triton, or the environment variable TRITON_INTERPRET=1 before "
        "the start to run the kernels, slowly, in Triton's interpreter.\n"
    )


def test_importing_the_package_imports_no_triton_and_asks_nothing_of_cuda():
    output = run_without_interpreter(
        "import sys, torch\n"
        "before = 'triton' in sys.modules\n"
        "torch.cuda.is_available = torch.cuda.init = None\n"  # a call would fail
        "import fastgpt_kernels\n"
        "fastgpt_kernels.load_ops('torch'), fastgpt_kernels.load_ops('reference')\n"
        "print('triton' in sys.modules and not before, torch.cuda.is_initialized())"
    )
    assert output == "False False\n"
