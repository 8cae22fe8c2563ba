"""PyTorch's compiler stays unloaded until somebody compiles, and works as ever when somebody does."""

import subprocess
import sys

import pytest
import torch
from fastgpt_kernels import load_ops
from fastgpt_kernels.compiler import COMPILER, Operation, hidden_once_loaded, leave_unloaded

TRAINS = f"""\
import sys, torch
from fastgpt_kernels import FusedAdamW, grad_norm, load_ops
ops = load_ops(sys.argv[1])
weight = torch.randn(50, 3 * 32, requires_grad=True)
optimizer = FusedAdamW([weight])

def loss():
    tokens = torch.arange(16)[None]
    qkv = ops.embedding(tokens, weight, weight, dropout_p=0.1, seed=3).unflatten(-1, (3, 2, 16))
    x = ops.causal_attention(qkv, dropout_p=0.1, seed=4).flatten(2).flatten(0, 1)
    x = ops.gelu(ops.layer_norm(x, x.new_ones(32), x.new_zeros(32)))
    return ops.cross_entropy(x @ weight[:, :32].T, tokens[0], consume=True)

losses = []
for _ in range(2):
    losses.append(loss())
    losses[-1].backward()
    optimizer.step()
    weight.grad = None
print({COMPILER!r} in sys.modules, 'sympy' in sys.modules)
compiled = torch.compile(loss, backend="eager")
print({COMPILER!r} in sys.modules, torch.equal(compiled(), loss()), float(losses[1]) < float(losses[0]))
"""


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_training_loads_no_compiler_and_compiling_does(backend, environment):
    done = subprocess.run(
        [sys.executable, "-c", TRAINS, backend], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.stdout.split() == ["False", "False", "True", "True", "True"], done.stdout + done.stderr


def test_a_function_is_hidden_as_soon_as_the_compiler_is_there(monkeypatch):
    told = []

    def plain(x, *, y):
        told.append("plain")
        return x, y

    def hidden(x, *, y):
        told.append("hidden")
        return plain(x, y=y)

    hidden.__wrapped__ = plain
    call = hidden_once_loaded(hidden)
    monkeypatch.setitem(sys.modules, COMPILER, None)
    monkeypatch.delitem(sys.modules, COMPILER)
    assert call(1, y=2) == (1, 2) and told == ["plain"]
    monkeypatch.setitem(sys.modules, COMPILER, object())
    assert call(1, y=2) == (1, 2) and told == ["plain", "hidden", "plain"]


def test_every_loaded_operation_is_left_to_itself_once():
    load_ops("torch")
    from fastgpt_kernels.torch_ops import attention

    operations = [value for value in vars(attention).values() if isinstance(value, Operation)]
    before = [dict(operation._backend_fns) for operation in operations]
    assert before and all(function.__module__ == "fastgpt_kernels.compiler" for f in before for function in f.values())
    leave_unloaded()
    assert [dict(operation._backend_fns) for operation in operations] == before


def test_an_operation_of_a_pytorch_without_these_names_is_as_it_was():
    from fastgpt_kernels import compiler

    class Other:
        pass

    compiler._leave_unloaded(Other())
    assert torch.is_tensor(load_ops("torch").gelu(torch.ones(2)))
