"""The kernels of fastgpt: each operation in Triton, in PyTorch's built-ins, and as a readable reference.

    ops = load_ops("auto")
    y = ops.causal_attention(qkv)

Importing this package imports no Triton and asks nothing of CUDA; `load_ops` does, where the backend needs it.
"""

from fastgpt_kernels.accumulation import accumulate
from fastgpt_kernels.dispatch import Backend, load_ops
from fastgpt_kernels.errors import UnsupportedInput
from fastgpt_kernels.ops import Ops
from fastgpt_kernels.optim import FusedAdamW, grad_norm

__all__ = ["Backend", "FusedAdamW", "Ops", "UnsupportedInput", "accumulate", "grad_norm", "load_ops"]
