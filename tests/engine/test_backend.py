import logging

import pytest
import torch
from fastgpt_kernels import UnsupportedInput, load_ops
from fastgpt_kernels.native.library import reasons_against

from fastgpt.engine import backend
from fastgpt.engine.backend import ops_for
from fastgpt.errors import UserError
from fastgpt.train import start

CPU = torch.device("cpu")


@pytest.mark.skipif(bool(reasons_against()), reason="; ".join(reasons_against()))
def test_auto_is_native_for_bf16_on_a_cpu_that_multiplies_it(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert ops_for("auto", CPU, torch.bfloat16).name == "native"
    assert "kernels.backend auto: native, which is for bf16 on this kind of CPU" in caplog.text


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float16])
def test_auto_is_torch_for_other_numbers_on_a_cpu(dtype: torch.dtype | None) -> None:
    assert ops_for("auto", CPU, dtype).name == "torch"


def test_auto_is_torch_where_native_cannot_run_and_says_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def load(name: str) -> object:
        if name == "native":
            raise UnsupportedInput("The backend 'native' cannot run here", ["this CPU has no fma"], "Another CPU.")
        return load_ops("torch")

    monkeypatch.setattr(backend, "load_ops", load)
    with caplog.at_level(logging.INFO):
        assert ops_for("auto", CPU, torch.bfloat16).name == "torch"
    assert "kernels.backend auto: torch, because the native kernels cannot run: this CPU has no fma" in caplog.text
    with pytest.raises(UserError, match=r"kernels\.backend: The backend 'native' cannot run here: - this CPU has no f"):
        ops_for("native", CPU)


@pytest.mark.parametrize(
    ("others", "agreed"), [([], "native"), (["native"], "native"), (["torch"], "torch"), (["native", "torch"], "torch")]
)
def test_hosts_that_differ_run_what_all_can(others: list[str], agreed: str, caplog: pytest.LogCaptureFixture) -> None:
    class Several:
        def gather(self, value: str) -> list[str]:
            return [value, *others]

    with caplog.at_level(logging.INFO):
        assert start._agreed("native", Several()) == agreed  # type: ignore[arg-type]
    assert ("the hosts of the ranks run different kernels: native, torch" in caplog.text) == (agreed == "torch")
