"""What holds for every operation of the Triton backend: its torch.library ops are well formed, and it can be compiled,
checkpointed, run under autocast and captured in a CUDA graph, with the masks that its seed says at that moment."""

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import fastgpt_kernels
import pytest
import torch
from fastgpt_kernels import Ops, load_ops
from fastgpt_kernels.native.library import reasons_against
from fastgpt_kernels.testing import assert_close, output_and_gradients
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

# of this name the package holds the function
logits_file = importlib.import_module("fastgpt_kernels.torch_ops.logits")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GPU = pytest.mark.gpu
P, SEEDS = 0.3, (2**40 + 7, 5)
SIZES = (9, 20)  # rows, or positions


class Case(NamedTuple):
    """A call of an operation."""

    call: Callable[..., Tensor | tuple[Tensor, ...]]  # (ops, seed, *tensors)
    tensors: Callable[[int], list[Tensor]]  # of float32 and integers, for one of the `SIZES`
    drops: bool = False  # whether the seed counts
    products: bool = False  # whether autocast casts what it multiplies


def normal(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape) for shape in shapes]


def below(bound: int, *shape: int) -> Tensor:
    return torch.randint(bound, shape)


CASES = {
    "causal_attention, dropout, a window and documents": Case(
        lambda ops, seed, qkv, ids: ops.causal_attention(qkv, dropout_p=P, seed=seed, window=4, document_ids=ids),
        lambda n: [*normal((1, n, 3, 2, 24)), below(2, 1, n).sort().values],
        drops=True,
    ),
    "decode_attention": Case(
        lambda ops, seed, q, k, v, lengths: ops.decode_attention(q, k, v, lengths),
        lambda n: [*normal((2, 2, 16), (2, 2, n, 16), (2, 2, n, 16)), torch.tensor([n, 3])],
    ),
    "layer_norm": Case(
        lambda ops, seed, *tensors: ops.layer_norm(*tensors),
        lambda n: normal((n, 40), (40,), (40,)),
    ),
    "add_layer_norm": Case(
        lambda ops, seed, *tensors: ops.add_layer_norm(*tensors),
        lambda n: normal((n, 40), (n, 40), (40,), (40,)),
    ),
    "add_layer_norm, dropout": Case(
        lambda ops, seed, *tensors: ops.add_layer_norm(*tensors, dropout_p=P, seed=seed),
        lambda n: normal((2, n, 33), (2, n, 33), (33,), (33,)),
        drops=True,
    ),
    "add_layer_norm, dropout, the sum alone": Case(
        lambda ops, seed, *tensors: ops.add_layer_norm(*tensors, dropout_p=P, seed=seed)[1],
        lambda n: normal((n, 33), (n, 33), (33,), (33,)),
        drops=True,
    ),
    "gelu": Case(lambda ops, seed, x: ops.gelu(x), lambda n: normal((n, 40))),
    "bias_gelu": Case(lambda ops, seed, x, bias: ops.bias_gelu(x, bias, "none"), lambda n: normal((n, 40), (40,))),
    "linear": Case(
        lambda ops, seed, *tensors: ops.linear(*tensors),
        lambda n: normal((n, 16), (24, 16), (24,)),
        products=True,
    ),
    "linear_gelu": Case(
        lambda ops, seed, *tensors: ops.linear_gelu(*tensors),
        lambda n: normal((n, 16), (24, 16), (24,)),
        products=True,
    ),
    "embedding, dropout": Case(
        lambda ops, seed, tokens, *tables: ops.embedding(tokens, *tables, dropout_p=P, seed=seed),
        lambda n: [below(7, 2, n), *normal((7, 18), (30, 18))],
        drops=True,
    ),
    "dropout": Case(lambda ops, seed, x: ops.dropout(x, P, seed), lambda n: normal((n, 33)), drops=True),
    "dropout_add": Case(
        lambda ops, seed, *tensors: ops.dropout_add(*tensors, P, seed), lambda n: normal((n, 33), (n, 33)), drops=True
    ),
    "logits": Case(lambda ops, seed, *xs: ops.logits(*xs), lambda n: normal((n, 16), (41, 16)), products=True),
    "logits, padded": Case(
        lambda ops, seed, *xs: logits_file.padded_logits(*xs),
        lambda n: normal((2, n, 16), (41, 16)),
        products=True,
    ),
    "logits, padded, consumed by cross_entropy in one pass": Case(
        lambda ops, seed, x, weight, targets: ops.cross_entropy(
            logits_file.padded_logits(x, weight), targets, consume=True, expected_gradient=1.0
        ),
        lambda n: [*normal((n, 16), (41, 16)), below(41, n)],
        products=True,
    ),
    "cross_entropy": Case(
        lambda ops, seed, logits, targets: ops.cross_entropy(logits, targets),
        lambda n: [*normal((n, 41)), below(41, n)],
    ),
    "cross_entropy, consumed": Case(
        # a copy, because the logits are destroyed
        lambda ops, seed, logits, targets: ops.cross_entropy(logits * 2.0, targets, consume=True, reduction="sum"),
        lambda n: [*normal((n, 41)), below(41, n)],
    ),
    "cross_entropy, in one pass": Case(
        lambda ops, seed, logits, targets: ops.cross_entropy(
            logits * 2.0, targets, consume=True, expected_gradient=1.0
        ),
        lambda n: [*normal((n, 41)), below(41, n)],
    ),
    "cross_entropy, in one pass, row by row": Case(
        lambda ops, seed, logits, targets: ops.cross_entropy(
            logits * 2.0,
            targets,
            consume=True,
            expected_gradient=logits.new_full((1,), 0.5, dtype=torch.float32),
            reduction="none",
        ),
        lambda n: [*normal((n, 41)), below(41, n)],
    ),
    "linear_cross_entropy": Case(
        lambda ops, seed, x, weight, targets: ops.linear_cross_entropy(x, weight, targets),
        lambda n: [*normal((n, 16), (41, 16)), below(41, n)],
        products=True,
    ),
}
DROPPING = [name for name, case in CASES.items() if case.drops]


def tensors_of(
    name: str, size: int = SIZES[0], dtype: torch.dtype = torch.float32, device: str = DEVICE
) -> list[Tensor]:
    return [x.to(device) for x in cast(CASES[name].tensors(size), dtype)]


def cast(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [x.to(dtype) if x.is_floating_point() else x for x in tensors]


def seed_of(place: int, device: str = DEVICE) -> Tensor:
    return torch.tensor([SEEDS[place]], device=device)


def results(name: str, ops: Ops, seed: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Outputs, and gradients where there are any."""
    return results_of(lambda *xs: CASES[name].call(ops, seed, *xs), name, tensors)


def results_of(call: Callable[..., Any], name: str, tensors: Sequence[Tensor]) -> list[Tensor]:
    if name == "decode_attention":
        return [call(*tensors).double().cpu()]
    return output_and_gradients(call, tensors)


def same(ours: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


class Calls(TorchDispatchMode):
    """Writes down the arguments with which our operators are called."""

    def __init__(self) -> None:
        super().__init__()
        self.arguments: dict[str, list[tuple[Any, ...]]] = {}

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator.namespace == "fastgpt":
            copies = [x.detach().clone() if isinstance(x, Tensor) else x for x in args]
            self.arguments.setdefault(operator._schema.name, []).append((*copies, *(kwargs or {}).values()))
        return operator(*args, **(kwargs or {}))


def operators() -> dict[str, Any]:
    """Every custom operator of the package, by its name."""
    modules = [
        importlib.import_module(module.name)
        for module in pkgutil.walk_packages(fastgpt_kernels.__path__, "fastgpt_kernels.")
    ]
    found = [x for module in modules for x in vars(module).values() if isinstance(x, torch.library.CustomOpDef)]
    runs = [operator for operator in found if "native" not in operator._qualname or not reasons_against()]
    return {operator._qualname: operator for operator in runs}


OPERATORS = operators()


@pytest.fixture(scope="module")
def calls() -> dict[str, list[tuple[Any, ...]]]:
    """The arguments of every operator in all the cases, forward and backward."""
    with Calls() as calls:
        for name in CASES:
            results(name, load_ops("triton"), seed_of(0), tensors_of(name))
            # some ways of the torch backend are for a CPU, or for 16 bits, only
            on_cpu = tensors_of(name, dtype=torch.float16, device="cpu")
            results(name, load_ops("torch"), seed_of(0, "cpu"), on_cpu)
            if not reasons_against():
                on_cpu = tensors_of(name, dtype=torch.bfloat16, device="cpu")
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(importlib.import_module("fastgpt_kernels.native.linear"), "FEWEST_ROWS", 1)
                    results(name, load_ops("native"), seed_of(0, "cpu"), on_cpu)
        results("dropout", load_ops("reference"), seed_of(0), tensors_of("dropout"))
    return calls.arguments


@pytest.mark.usefixtures("device")
def test_every_operator_of_the_package_is_in_the_cases(calls):
    assert set(calls) == set(OPERATORS)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("operator", OPERATORS)
def test_torch_library_finds_every_operator_well_formed(operator, calls):
    definition = OPERATORS[operator]
    differentiable = definition._backward_fn is not None
    arguments = tuple(
        x.requires_grad_(differentiable and x.is_floating_point()) if isinstance(x, Tensor) else x
        for x in calls[operator][0]
    )
    torch.library.opcheck(definition, arguments)


@pytest.mark.parametrize("name", CASES)
def test_one_graph_serves_every_size_and_seed(name, device, triton_ops):
    call = CASES[name].call
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda seed, *tensors: call(triton_ops, seed, *tensors), fullgraph=True, backend="aot_eager", dynamic=True
    )
    seed = seed_of(0)
    for place, size in enumerate(SIZES):
        seed.copy_(seed_of(place))
        tensors = tensors_of(name, size)
        with torch._dynamo.config.patch(error_on_recompile=place > 0):
            ours = results_of(lambda *xs: compiled(seed, *xs), name, tensors)
        assert same(ours, results(name, triton_ops, seed_of(place), tensors))


@GPU
@pytest.mark.parametrize("name", CASES)
def test_inductor_makes_one_graph_of_it(name, device, triton_ops):
    call = CASES[name].call
    torch._dynamo.reset()
    compiled = torch.compile(lambda seed, *tensors: call(triton_ops, seed, *tensors), fullgraph=True)
    seed = seed_of(0)
    for place in range(2):
        seed.copy_(seed_of(place))
        tensors = tensors_of(name, dtype=torch.bfloat16)
        ours = results_of(lambda *xs: compiled(seed, *xs), name, tensors)
        # masks depend on no dtype: in float32 the same kernels are an oracle for 16 bits
        eager, exact = (
            results(name, triton_ops, seed_of(place), cast(tensors, dtype)) for dtype in (torch.bfloat16, torch.float32)
        )
        dtypes = [torch.bfloat16] * len(exact)
        if "cross_entropy" in name:
            dtypes[0] = torch.float32
        assert_close(ours, eager, exact, dtypes)


@pytest.mark.parametrize("name", DROPPING)
def test_another_seed_is_another_mask(name, device, triton_ops):
    tensors = tensors_of(name)
    first, again, other = (results(name, triton_ops, seed_of(place), tensors)[0] for place in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("name", [name for name in CASES if name != "decode_attention"])
def test_checkpointing_recomputes_the_same_bits(name, device, triton_ops):
    tensors, seed = tensors_of(name), seed_of(0)
    call = lambda *xs: CASES[name].call(triton_ops, seed, *xs)  # noqa: E731
    recomputed = output_and_gradients(lambda *xs: checkpoint(call, *xs, use_reentrant=False), tensors)
    assert same(recomputed, output_and_gradients(call, tensors))


@pytest.mark.parametrize("name", CASES)
def test_autocast_changes_nothing_but_products(name, device, triton_ops):
    tensors, seed = tensors_of(name), seed_of(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float16
    with torch.autocast(device, dtype):
        ours = results(name, triton_ops, seed, tensors)
    used = dtype if CASES[name].products else torch.float32
    call = lambda *xs: CASES[name].call(triton_ops, seed, *cast(xs, used))  # noqa: E731
    assert same(ours, results_of(call, name, tensors))


@GPU
@pytest.mark.parametrize("name", CASES)
def test_a_captured_graph_replays_with_the_seed_and_inputs_of_the_moment(name, device, triton_ops):
    static, seed = tensors_of(name), seed_of(0)

    def step() -> list[Tensor]:
        leaves = [x.detach().requires_grad_(x.is_floating_point() and name != "decode_attention") for x in static]
        outs = CASES[name].call(triton_ops, seed, *leaves)
        outs = outs if isinstance(outs, tuple) else (outs,)
        wanted = [x for x in leaves if x.requires_grad]
        if not wanted:
            return list(outs)
        ones = [torch.ones_like(out) for out in outs]
        return [*outs, *torch.autograd.grad(outs, wanted, ones, allow_unused=True, materialize_grads=True)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()  # compiles the kernels
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for place in (0, 1, 0):
        seed.copy_(seed_of(place))
        for old, new in zip(static, tensors_of(name), strict=True):
            old.copy_(new)
        graph.replay()
        replayed = [x.clone() for x in captured]
        assert same(replayed, step())
