"""One operation's kernels, forward and backward, at small awkward shapes: what compute-sanitizer looks at.

    python -m benchmarks.sanitizer_case NAME

Without a GPU it runs in Triton's interpreter, which proves no more than that the case runs.
"""

import os
import sys
from collections.abc import Callable, Iterator

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before a kernel is defined

from fastgpt_kernels import FusedAdamW, grad_norm, launch, linear_gelu, load_ops
from fastgpt_kernels.ops import Ops
from fastgpt_kernels.tiles import listed
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# the interpreter cannot multiply bfloat16
DTYPES = (torch.bfloat16, torch.float32) if DEVICE.type == "cuda" else (torch.float16,)
SEED = 2**40 + 7
# more rows than a GPU has programs that share their sums; the interpreter has four
MANY, WIDE, LONG = (300, 768, 129) if DEVICE.type == "cuda" else (21, 24, 35)


def causal_attention(ops: Ops, draw: Callable[..., Tensor]) -> Iterator[object]:
    """Head sizes with and without padding, lengths beside the edges of tiles, every extra."""
    shapes = ((2, 1, 1, 16), (1, LONG, 1, 64), (1, 17, 1, 80), (1, 33, 1, 96), (1, 17, 1, 128), (1, 3, 1, 256))
    for B, T, H, D in shapes:
        yield ops.causal_attention(draw(B, T, 3, H, D))
    ids = (torch.arange(LONG, device=DEVICE) // 27).expand(2, LONG)
    yield ops.causal_attention(draw(2, LONG, 3, 1, 64), dropout_p=0.2, seed=SEED, window=20, document_ids=ids)


def decode_attention(ops: Ops, draw: Callable[..., Tensor]) -> Iterator[object]:
    """Lengths of 0, 1 and all; it has no gradient."""
    lengths = torch.tensor([0, 1, 131], device=DEVICE)
    for D in (40, 64):
        q, k_cache, v_cache = (draw(*shape).detach() for shape in ((3, 2, D), (3, 2, 131, D), (3, 2, 131, D)))
        ops.decode_attention(q, k_cache, v_cache, lengths)
    yield from ()


def layer_norm(ops: Ops, draw: Callable[..., Tensor]) -> Iterator[object]:
    """Widths of one piece, of several, and of the second kernel for the parameters."""
    for rows, N in ((5, 7), (MANY, 768), (9, 1023), (3, 5000)):
        yield ops.layer_norm(draw(rows, N), draw(N), draw(N))


def add_layer_norm(ops: Ops, draw: Callable[..., Tensor]) -> Iterator[object]:
    """The same with a residual, with and without dropout."""
    for rows, N, p in ((5, 7, 0.3), (MANY, 768, 0.0), (9, 1023, 0.3), (3, 5000, 0.3)):
        yield ops.add_layer_norm(draw(rows, N), draw(rows, N), draw(N), draw(N), dropout_p=p, seed=SEED)


def gelu(ops: Ops, draw: Callable[..., Tensor]) -> Iterator[object]:
    """Both forms."""
    yield ops.gelu(draw(3, 1023))
    yield ops.gelu(draw(2049), "none")


def bias_gelu(ops: Ops, draw: Callable[..., Tensor]) -> Iterator[object]:
    """Both forms, also with more rows than there are programs for them."""
    yield ops.bias_gelu(draw(MANY, 1023), draw(1023))
    yield ops.bias_gelu(draw(7, 64), draw(64), "none")


def linear_gelu_fused(ops: Ops, draw: Callable[..., Tensor]) -> Iterator[object]:
    """Every fused tile that may be chosen, whatever the table chooses."""
    if DEVICE.type == "cuda":
        arch = listed(launch.architecture(DEVICE))
        forward, backward = (linear_gelu.CANDIDATES[direction, arch] for direction in ("forward", "backward"))
    else:
        forward = backward = (linear_gelu.Tile(32, 32, 16, 4, 2),)
    for K, N in ((72, 96), (33, 70)):
        x, weight, bias, dy = (draw(*shape).detach() for shape in ((150, K), (N, K), (N,), (150, N)))
        if x.dtype == torch.float32:  # goes to cuBLAS
            continue
        for tile in forward:
            _, u = linear_gelu.launch_forward(x, weight, bias, "tanh", tile)
        for tile in backward:
            linear_gelu.launch_backward(weight, u, dy, "tanh", tile)
    yield from ()


def embedding(ops: Ops, draw: Callable[..., Tensor]) -> Iterator[object]:
    """Words that occur often, once and never."""
    tokens = (torch.arange(3 * 37, device=DEVICE) ** 2 % 91).view(3, 37)
    for N, p in ((7, 0.0), (WIDE, 0.3)):
        yield ops.embedding(tokens, draw(97, N), draw(41, N), dropout_p=p, seed=SEED)


def dropout(ops: Ops, draw: Callable[..., Tensor]) -> Iterator[object]:
    """A size between two blocks."""
    yield ops.dropout(draw(4099), 0.3, SEED)


def dropout_add(ops: Ops, draw: Callable[..., Tensor]) -> Iterator[object]:
    """The same with a residual."""
    yield ops.dropout_add(draw(4099), draw(4099), 0.3, SEED)


def cross_entropy(ops: Ops, draw: Callable[..., Tensor]) -> Iterator[object]:
    """Rows that do not count, few words and GPT-2's, the gradient beside the logits, over them, and in one pass."""
    for rows, V in ((5, 3), (4, 1023), (3, 50_257)):
        targets = torch.arange(rows, device=DEVICE) * 7919 % V
        targets[1] = -100
        yield ops.cross_entropy(draw(rows, V), targets)
        for expected in (None, 1.0, 0.5):
            yield ops.cross_entropy(draw(rows, V) * 1.0, targets, consume=True, expected_gradient=expected)


def linear_cross_entropy(ops: Ops, draw: Callable[..., Tensor]) -> Iterator[object]:
    """Few words and odd sizes."""
    for rows, N, V in ((5, 7, 3), (LONG, 40, 1023)):
        targets = torch.arange(rows, device=DEVICE) * 7919 % V
        yield ops.linear_cross_entropy(draw(rows, N), draw(V, N), targets)


def adamw(ops: Ops, draw: Callable[..., Tensor]) -> Iterator[object]:
    """Tensors of no element, of one, and beyond a chunk, with working copies."""
    masters = [torch.randn(size, device=DEVICE, requires_grad=True) for size in (0, 1, 7, 70_001)]
    working = [torch.empty_like(m, dtype=torch.bfloat16, requires_grad=False) for m in masters]
    for master in masters:
        master.grad = torch.randn_like(master)
    FusedAdamW(masters, backend="triton", working=zip(masters, working, strict=True)).step(gradient_scale=0.5)
    yield from ()


def gradient_norm(ops: Ops, draw: Callable[..., Tensor]) -> Iterator[object]:
    """The same sizes."""
    grad_norm([draw(*shape).detach() for shape in ((1,), (7,), (3, 341), (70_001,))])
    yield from ()


CASES: dict[str, Callable[[Ops, Callable[..., Tensor]], Iterator[object]]] = {
    case.__name__: case
    for case in (
        causal_attention,
        decode_attention,
        layer_norm,
        add_layer_norm,
        gelu,
        bias_gelu,
        linear_gelu_fused,
        embedding,
        dropout,
        dropout_add,
        cross_entropy,
        linear_cross_entropy,
        adamw,
        gradient_norm,
    )
}


def run(name: str) -> None:
    """One case in every dtype, with a gradient for each of its results."""
    ops = load_ops("triton")
    for dtype in DTYPES:
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int, dtype: torch.dtype = dtype, generator: torch.Generator = generator) -> Tensor:
            return torch.randn(shape, generator=generator).to(DEVICE, dtype).requires_grad_()

        for result in CASES[name](ops, draw):
            outs = result if isinstance(result, tuple) else (result,)
            torch.autograd.backward(outs, [torch.ones_like(out) for out in outs])
            if not all(out.isfinite().all() for out in outs):
                raise ArithmeticError(f"{name} in {dtype} has a result that is not finite")
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in CASES:
        print(f"name one case of {', '.join(CASES)}", file=sys.stderr)
        sys.exit(2)
    run(sys.argv[1])
