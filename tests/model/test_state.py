import pytest
import torch
from fastgpt_kernels import load_ops

from fastgpt.errors import UserError
from fastgpt.model import GPT
from fastgpt.model.state import model_from_state


def test_a_model_takes_over_the_tensors_themselves(model: GPT) -> None:
    state = {name: p.detach().to(torch.bfloat16) for name, p in model.named_parameters()}
    taken = model_from_state(model.config, load_ops("torch"), state)
    for name, parameter in taken.named_parameters():
        assert parameter.data_ptr() == state[name].data_ptr()
        assert parameter.dtype == torch.bfloat16
        assert parameter.requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks.1.mlp.up.bias": None}, r"file: blocks\.1\.mlp\.up\.bias is missing \(1 of "),
        ({"blocks.2.mlp.up.bias": torch.zeros(84)}, r"file: blocks\.2\.mlp\.up\.bias belongs to no parameter"),
        ({"blocks.1.mlp.up.bias": torch.zeros(83)}, r"blocks\.1\.mlp\.up\.bias has shape \(83,\); .* asks for \(84,\)"),
        ({"blocks.1.mlp.up.bias": torch.zeros(84, dtype=torch.int8)}, r"up\.bias is torch\.int8; weights are floating"),
        ({"blocks.1.mlp.up.bias": torch.zeros(84).half()}, r"file: its tensors mix torch\.float16 and torch\.float32"),
    ],
)
def test_tensors_that_do_not_fit_are_named(model: GPT, change: dict[str, torch.Tensor | None], message: str) -> None:
    state = {name: tensor for name, tensor in (dict(model.state_dict()) | change).items() if tensor is not None}
    with pytest.raises(UserError, match=message) as caught:
        model_from_state(model.config, load_ops("torch"), state, where="file")
    assert "\n" not in str(caught.value)
