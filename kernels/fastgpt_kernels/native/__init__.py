"""C++ for CPUs that multiply bfloat16 (AVX512-BF16), compiled at first use.

What it has is for bfloat16 alone; for other dtypes, and for what a CPU's time does not go into, each operation is that
of `fastgpt_kernels.torch_ops`. Dropout masks are the same as there. There are no second derivatives but those of
what is the torch backend's, and no batching rules (`vmap`).
"""

from fastgpt_kernels.native.attention import causal_attention
from fastgpt_kernels.native.cross_entropy import cross_entropy
from fastgpt_kernels.native.dropout import dropout, dropout_add
from fastgpt_kernels.native.gelu import bias_gelu, gelu, linear_gelu
from fastgpt_kernels.native.layernorm import add_layer_norm, layer_norm
from fastgpt_kernels.native.linear import linear, logits
from fastgpt_kernels.torch_ops import decode_attention, embedding, linear_cross_entropy

__all__ = [
    "add_layer_norm",
    "bias_gelu",
    "causal_attention",
    "cross_entropy",
    "decode_attention",
    "dropout",
    "dropout_add",
    "embedding",
    "gelu",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "linear_gelu",
    "logits",
]
