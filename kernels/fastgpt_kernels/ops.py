"""The operations that every backend offers: their shapes and arguments, in one place.

Each is a plain function of tensors, differentiable where a gradient has a meaning. dtypes are float32, float16 and
bfloat16, and float64 for the backends "torch" and "reference"; a backend that cannot take an input raises
`UnsupportedInput`. Forward-mode derivatives are not offered. A seed that is a tensor lies on the device of the inputs.
"""

from typing import Literal, NamedTuple, Protocol

from torch import Tensor

from fastgpt_kernels.checks import Approximate, Reduction, Seed

# ruff: noqa: D102 - the class says what its call does


class CausalAttention(Protocol):
    """softmax(scale Q K^T) V, each position over itself and those before it.

    qkv (B, T, 3, H, D), any strides -> (B, T, H, D) contiguous. `scale` is 1 / sqrt(D) when None. With `window` w,
    position i sees j with i - w < j <= i; with `document_ids` (B, T) integers, only those j whose id equals its own.
    Dropout acts on the weights.
    """

    def __call__(
        self,
        qkv: Tensor,
        *,
        scale: float | None = None,
        dropout_p: float = 0.0,
        seed: Seed | None = None,
        window: int | None = None,
        document_ids: Tensor | None = None,
    ) -> Tensor: ...


class DecodeAttention(Protocol):
    """One query over the keys and values kept of the tokens before it; no gradient.

    q (B, H, D); k_cache and v_cache (B, H, T_max, D), any strides, of which sequence b uses the first lengths[b]
    positions; lengths (B,) int32 or int64 -> (B, H, D). A length of 0 gives zeros.
    """

    def __call__(
        self, q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, *, scale: float | None = None
    ) -> Tensor: ...


class LayerNorm(Protocol):
    """x (..., N), weight (N,), bias (N,), each in a dtype of its own -> (..., N) in that of x."""

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor: ...


class AddLayerNorm(Protocol):
    """x and residual (..., N), weight and bias (N,) -> layer_norm(s) and s = residual + dropout(x), both (..., N).

    s is rounded to the dtype of residual and normalised as rounded; the first result has the dtype of x.
    """

    def __call__(
        self,
        x: Tensor,
        residual: Tensor,
        weight: Tensor,
        bias: Tensor,
        eps: float = 1e-5,
        *,
        dropout_p: float = 0.0,
        seed: Seed | None = None,
    ) -> tuple[Tensor, Tensor]: ...


class Gelu(Protocol):
    """x (any shape) -> x Phi(x), or its tanh form."""

    def __call__(self, x: Tensor, approximate: Approximate = "tanh") -> Tensor: ...


class BiasGelu(Protocol):
    """x (..., N), bias (N,) -> GELU(x + bias) in the dtype of x."""

    def __call__(self, x: Tensor, bias: Tensor, approximate: Approximate = "tanh") -> Tensor: ...


class Linear(Protocol):
    """x (..., K), weight (N, K) as in nn.Linear, bias (N,) -> x weight^T + bias, (..., N)."""

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor: ...


class LinearGelu(Protocol):
    """x (..., K), weight (N, K) as in nn.Linear, bias (N,) -> GELU(x weight^T + bias), (..., N)."""

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor, approximate: Approximate = "tanh") -> Tensor: ...


class Embedding(Protocol):
    """tokens (B, T) integers, token_table (V, N), position_table (at least T, N) -> dropout(token + position).

    (B, T, N); position t is row t of its table.
    """

    def __call__(
        self,
        tokens: Tensor,
        token_table: Tensor,
        position_table: Tensor,
        *,
        dropout_p: float = 0.0,
        seed: Seed | None = None,
    ) -> Tensor: ...


class Dropout(Protocol):
    """x (any shape) -> x / (1 - p) with probability 1 - p, else 0; the same seed keeps the same elements."""

    def __call__(self, x: Tensor, p: float, seed: Seed | None) -> Tensor: ...


class DropoutAdd(Protocol):
    """x and residual of one shape -> residual + dropout(x), in the dtype of residual."""

    def __call__(self, x: Tensor, residual: Tensor, p: float, seed: Seed | None) -> Tensor: ...


class Logits(Protocol):
    """x (..., N), weight (V, N) as in nn.Linear -> x weight^T, (..., V), whose rows may lie further apart than V."""

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor: ...


class CrossEntropy(Protocol):
    """logits (rows, V), targets (rows,) int64 -> the negative log-softmax at the targets, in nats.

    A scalar, or (rows,) for "none", in float32 (float64 for float64). Targets equal to `ignore_index` do not count:
    "mean" divides by those that do, and is NaN where none does. With `consume` the logits are destroyed: their memory
    takes the gradient, once.

    `expected_gradient` is the gradient that will come in for the result, as far as the caller knows it: a finite number
    other than 0, or a float32 tensor of one element on the logits' device. With `consume` a backend may then write the
    gradient in the forward, in the pass over the logits that the losses take; another gradient that does come in
    multiplies what was written, which is rounded a second time. It is a hint: without `consume`, or where the logits
    have no gradient, it is not used.
    """

    def __call__(
        self,
        logits: Tensor,
        targets: Tensor,
        *,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
        consume: bool = False,
        expected_gradient: float | Tensor | None = None,
    ) -> Tensor: ...


class LinearCrossEntropy(Protocol):
    """x (rows, N), weight (V, N), targets (rows,) int64 -> cross_entropy(x weight^T, targets), without all logits."""

    def __call__(
        self,
        x: Tensor,
        weight: Tensor,
        targets: Tensor,
        *,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
    ) -> Tensor: ...


class Ops(NamedTuple):
    """The operations of one backend."""

    name: Literal["triton", "native", "torch", "reference"]
    causal_attention: CausalAttention
    decode_attention: DecodeAttention
    layer_norm: LayerNorm
    add_layer_norm: AddLayerNorm
    gelu: Gelu
    bias_gelu: BiasGelu
    linear: Linear
    linear_gelu: LinearGelu
    embedding: Embedding
    dropout: Dropout
    dropout_add: DropoutAdd
    logits: Logits
    cross_entropy: CrossEntropy
    linear_cross_entropy: LinearCrossEntropy
