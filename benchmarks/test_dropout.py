import pytest
import torch

SHAPES = {"cpu": {"toy": (256, 96)}, "cuda": {"gpt2-124m": (65536, 768), "gpt2-1558m": (32768, 1600)}}
HERE = SHAPES["cuda" if torch.cuda.is_available() else "cpu"]


@pytest.mark.parametrize("shape", HERE.values(), ids=HERE.keys())
def test_dropout(shape, ops, device, measure):
    x = torch.randn(shape).to(device, torch.bfloat16 if device == "cuda" else torch.float32)
    out = ops.dropout(x, 0.1, 1)
    assert torch.equal(out, ops.dropout(x, 0.1, 1)) and 0.05 < (out == 0).float().mean().item() < 0.15
    size = x.numel() * x.element_size()
    measure(
        lambda x: ops.dropout(x, 0.1, 1), x, work=(2 * size, 2 * size), formula="bytes: read and write, each direction"
    )
