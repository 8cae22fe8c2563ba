import pytest
import torch

SHAPES = {  # B, T, H, D
    "cpu": {"toy": (2, 128, 2, 64)},
    "cuda": {
        "gpt2-124m": (16, 1024, 12, 64),
        "gpt2-1558m": (8, 1024, 25, 64),
        "gpt3-2.7b, D=80": (4, 2048, 32, 80),
        "gpt3-6.7b, D=128": (4, 2048, 32, 128),
    },
}
HERE = SHAPES["cuda" if torch.cuda.is_available() else "cpu"]


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("shape", HERE.values(), ids=HERE.keys())
def test_causal_attention(shape, dropout_p, ops, device, check, measure):
    B, T, H, D = shape
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    qkv = torch.randn(B, T, 3, H, D).to(device, dtype)
    check(lambda ops, x: ops.causal_attention(x), qkv[:1, :, :, :2])
    forward = 2 * 2 * B * H * (T * T / 2) * D
    measure(
        lambda x: ops.causal_attention(x, dropout_p=dropout_p, seed=1),
        qkv,
        work=(forward, 2.5 * forward),
        formula="FLOPs: 2 products forward and 5 backward, each 2 B H (T^2 / 2) D",
    )
