import pytest
import torch

SHAPES = {
    "cpu": {"toy": (256, 96)},
    "cuda": {"gpt2-124m": (65536, 768), "gpt2-1558m": (32768, 1600), "gpt3-175b": (8192, 12288)},
}
HERE = SHAPES["cuda" if torch.cuda.is_available() else "cpu"]


@pytest.mark.parametrize("shape", HERE.values(), ids=HERE.keys())
def test_layer_norm(shape, ops, device, check, measure):
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    x, weight, bias = (torch.randn(s).to(device, dtype) for s in (shape, shape[1:], shape[1:]))
    check(lambda ops, *xs: ops.layer_norm(*xs), x[:128], weight, bias)
    size = x.numel() * x.element_size()
    measure(
        ops.layer_norm,
        x,
        weight,
        bias,
        work=(2 * size, 3 * size),
        formula="bytes: read x, write y; backward read x and dy, write dx",
    )
