"""What is measured: the shapes of GPT-2 and GPT-3, by scale.

Scale "gpu" fills a GPU, "cpu" is a micro-batch of a CPU run, and "toy" proves that a suite works.
"""

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, TypeAlias

Scale: TypeAlias = Literal["gpu", "cpu", "toy"]
Cases: TypeAlias = dict[Scale, dict[str, Any]]

V, T_MAX = 50_257, 1024


class Size(NamedTuple):
    """A GPT: heads, columns and blocks."""

    H: int
    N: int
    layers: int


class Attention(NamedTuple):
    """A case of causal attention; `documents` of equal lengths in each sequence."""

    B: int
    T: int
    H: int
    D: int
    dropout_p: float = 0.0
    window: int | None = None
    documents: int | None = None


class Matrix(NamedTuple):
    """A case of an operation on rows of N columns."""

    rows: int
    N: int
    dropout_p: float = 0.0


class Losses(NamedTuple):
    """A case of a loss over V words; N is the width of the model."""

    rows: int
    V: int
    N: int = 0


class Update(NamedTuple):
    """The data of one training update."""

    context: int
    micro_batch_size: int
    micro_batches: int

    @property
    def tokens(self) -> int:
        """Of the whole update."""
        return self.context * self.micro_batch_size * self.micro_batches

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.micro_batches} x {self.micro_batch_size} x {self.context}"


class Tokens(NamedTuple):
    """A case of embedding B sequences of T tokens."""

    B: int
    T: int
    N: int
    V: int
    dropout_p: float = 0.0


# Radford et al. 2019, table 2
GPT2 = {
    "gpt2-124m": Size(12, 768, 12),
    "gpt2-1558m": Size(25, 1600, 48),
    "gpt2-355m": Size(16, 1024, 24),
    "gpt2-774m": Size(20, 1280, 36),
}
# Brown et al. 2020, table 2.1
WIDEST = 12_288

# the first two cases of a suite are also given to torch.compile, which takes seconds for each
ATTENTION: Cases = {
    "gpu": {
        "gpt2-124m T=1024": Attention(16, 1024, 12, 64),
        "gpt2-1558m T=1024": Attention(8, 1024, 25, 64),
        "gpt2-124m T=1024 dropout": Attention(16, 1024, 12, 64, dropout_p=0.1),
        "gpt2-124m T=4096": Attention(4, 4096, 12, 64),
        "gpt2-1558m T=4096": Attention(2, 4096, 25, 64),
        "gpt2-355m T=1024": Attention(16, 1024, 16, 64),
        "gpt2-774m T=1024": Attention(8, 1024, 20, 64),
        "gpt2-355m T=4096": Attention(4, 4096, 16, 64),
        "gpt2-774m T=4096": Attention(2, 4096, 20, 64),
        "gpt3-2.7b D=80": Attention(4, 2048, 32, 80),
        "gpt3-760m D=96": Attention(8, 2048, 16, 96),
        "gpt3-6.7b D=128": Attention(4, 2048, 32, 128),
        "gpt2-124m T=4096 window 256": Attention(4, 4096, 12, 64, window=256),
        "gpt2-124m T=4096 8 documents": Attention(4, 4096, 12, 64, documents=8),
        "gpt2-124m T=4096 dropout": Attention(4, 4096, 12, 64, dropout_p=0.1),
    },
    "cpu": {
        "gpt2-124m T=512": Attention(2, 512, 12, 64),
        "gpt2-124m T=1024": Attention(2, 1024, 12, 64),
        "gpt2-124m T=512 window 128": Attention(2, 512, 12, 64, window=128),
        "gpt2-124m T=512 8 documents": Attention(2, 512, 12, 64, documents=8),
    },
    "toy": {
        "toy": Attention(2, 48, 2, 16),
        "toy dropout": Attention(2, 48, 2, 16, dropout_p=0.1),
        "toy window 7": Attention(2, 48, 2, 16, window=7),
        "toy 3 documents": Attention(2, 48, 2, 16, documents=3),
    },
}
DECODE: Cases = {
    "gpu": {f"{name} T={T}": Attention(B, T, GPT2[name].H, 64) for T, B in ((1024, 64), (4096, 32)) for name in GPT2},
    "cpu": {"gpt2-124m T=1024": Attention(4, 1024, 12, 64)},
    "toy": {"toy": Attention(3, 20, 2, 16)},
}
NORMS: Cases = {
    "gpu": {
        "gpt2-124m": Matrix(65_536, 768),
        "gpt2-1558m": Matrix(32_768, 1600),
        "gpt2-355m": Matrix(65_536, 1024),
        "gpt2-774m": Matrix(32_768, 1280),
        "gpt3-175b": Matrix(8_192, WIDEST),
    },
    "cpu": {"gpt2-124m": Matrix(1024, 768), "gpt2-1558m": Matrix(1024, 1600)},
    "toy": {"toy": Matrix(24, 96)},
}
ADDED_NORMS: Cases = {
    "gpu": NORMS["gpu"] | {"gpt2-124m dropout": Matrix(65_536, 768, dropout_p=0.1)},
    "cpu": NORMS["cpu"],
    "toy": NORMS["toy"] | {"toy dropout": Matrix(24, 96, dropout_p=0.1)},
}
# N is the width of the model; the up-projection has 4 N columns
MLPS: Cases = {
    "gpu": {name: Matrix(65_536 if size.N <= 1024 else 32_768, size.N) for name, size in GPT2.items()},
    "cpu": {"gpt2-124m": Matrix(1024, 768)},
    "toy": {"toy": Matrix(24, 32)},
}
RESIDUALS: Cases = {
    "gpu": {name: Matrix(65_536 if size.N <= 1024 else 32_768, size.N, dropout_p=0.1) for name, size in GPT2.items()},
    "cpu": {"gpt2-124m": Matrix(1024, 768, dropout_p=0.1)},
    "toy": {"toy": Matrix(64, 96, dropout_p=0.1)},
}
EMBEDDINGS: Cases = {
    "gpu": {name: Tokens(32, 1024, size.N, V) for name, size in GPT2.items()}
    | {"gpt2-124m dropout": Tokens(32, 1024, 768, V, dropout_p=0.1)},
    "cpu": {"gpt2-124m": Tokens(2, 512, 768, V)},
    "toy": {"toy": Tokens(2, 9, 32, 50), "toy dropout": Tokens(2, 9, 32, 50, dropout_p=0.1)},
}
LOSSES: Cases = {
    "gpu": {"gpt2": Losses(32_768, V)},
    "cpu": {"gpt2": Losses(1024, V)},
    "toy": {"toy": Losses(12, 257)},
}
LINEAR_LOSSES: Cases = {
    "gpu": {name: Losses(16_384, V, size.N) for name, size in GPT2.items()},
    "cpu": {"gpt2-124m": Losses(1024, V, 768)},
    "toy": {"toy": Losses(12, 257, 32)},
}
LOGITS: Cases = LINEAR_LOSSES
MODELS: Cases = {
    "gpu": GPT2,
    "cpu": {"gpt2-124m": GPT2["gpt2-124m"]},
    "toy": {"toy": Size(2, 32, 2)},
}

REAL_BATCH = 8192  # no real run has fewer tokens in an update
# each micro-batch alone, and as many of them as a real update has
DATA = [
    Update(context, size, micro_batches)
    for context in (64, 256, 1024)
    for size in (1, 8, 64)
    for micro_batches in sorted({1, max(1, REAL_BATCH // (context * size))})
]


def parameter_shapes(size: Size, scale: Scale) -> Iterator[tuple[int, ...]]:
    """The shapes of a GPT-2's parameters, the output layer being the token table; at scale "toy" with few words."""
    N = size.N
    yield from ((V if scale != "toy" else 257, N), (T_MAX, N))
    for _ in range(size.layers):
        yield from ((N,), (N,), (3 * N, N), (3 * N,), (N, N), (N,))
        yield from ((N,), (N,), (4 * N, N), (4 * N,), (N, 4 * N), (N,))
    yield from ((N,), (N,))
