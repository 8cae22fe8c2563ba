"""PyTorch's best: the backend that runs everywhere, and that a CPU trains with. One operation a file.

PyTorch's built-ins where they are the fastest way; elsewhere their composition with the fewest passes over memory.
"""

from fastgpt_kernels.torch_ops.attention import causal_attention
from fastgpt_kernels.torch_ops.cross_entropy import cross_entropy
from fastgpt_kernels.torch_ops.decode import decode_attention
from fastgpt_kernels.torch_ops.dropout import dropout, dropout_add
from fastgpt_kernels.torch_ops.embedding import embedding
from fastgpt_kernels.torch_ops.gelu import bias_gelu, gelu, linear_gelu
from fastgpt_kernels.torch_ops.layernorm import add_layer_norm, layer_norm
from fastgpt_kernels.torch_ops.linear import linear
from fastgpt_kernels.torch_ops.linear_cross_entropy import linear_cross_entropy
from fastgpt_kernels.torch_ops.logits import logits

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
