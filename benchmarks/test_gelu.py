import pytest
import torch

SHAPES = {"cpu": {"toy": (256, 384)}, "cuda": {"gpt2-124m": (65536, 3072), "gpt2-1558m": (32768, 6400)}}
HERE = SHAPES["cuda" if torch.cuda.is_available() else "cpu"]
FORMULA = "bytes: read x, write y; backward read x and dy, write dx"


@pytest.mark.parametrize("shape", HERE.values(), ids=HERE.keys())
def test_gelu(shape, ops, device, check, measure):
    x = torch.randn(shape).to(device, torch.bfloat16 if device == "cuda" else torch.float32)
    check(lambda ops, x: ops.gelu(x), x[:128])
    size = x.numel() * x.element_size()
    measure(ops.gelu, x, work=(2 * size, 3 * size), formula=FORMULA)


@pytest.mark.parametrize("shape", HERE.values(), ids=HERE.keys())
def test_bias_gelu(shape, ops, device, check, measure):
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    x, bias = (torch.randn(s).to(device, dtype) for s in (shape, shape[1:]))
    check(lambda ops, *xs: ops.bias_gelu(*xs), x[:128], bias)
    size = x.numel() * x.element_size()
    measure(ops.bias_gelu, x, bias, work=(2 * size, 3 * size), formula=FORMULA)
