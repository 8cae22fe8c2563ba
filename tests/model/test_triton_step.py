"""One training step on the Triton kernels, in Triton's interpreter where there is no GPU."""

import os

import pytest
import torch

# before any kernel is defined: a process either interprets or compiles
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from fastgpt_kernels import Backend, load_ops
from torch import Tensor

from fastgpt.config import ModelConfig
from fastgpt.model import build_model
from fastgpt.model.dropout import dropout_seeds

SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 80, "context": 37, "vocab_size": 97}


def loss_and_gradients(
    backend: Backend, config: ModelConfig, dtype: torch.dtype, device: str, *, checkpointed: bool = False
) -> dict[str, Tensor]:
    """The loss of one batch and the gradient of every parameter, in float64 on the CPU."""
    model = build_model(config, load_ops(backend), seed=3).to(device, dtype)
    tokens = torch.randint(config.vocab_size, (2, config.context + 1), generator=torch.Generator().manual_seed(1))
    inputs, targets = tokens[:, :-1].to(device), tokens[:, 1:].to(device)
    loss = model(inputs, targets=targets, dropout_seed=9, checkpoint_activations=checkpointed)
    loss.backward()
    results = {"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters()}
    return {name: tensor.double().cpu() for name, tensor in results.items()}


def test_gradients_of_a_triton_step_are_as_close_to_float64_as_twice_pytorch(norm: str, device: str) -> None:
    config = ModelConfig.model_validate(SHAPE | {"norm": norm})
    oracle = loss_and_gradients("reference", config, torch.float64, device)
    theirs = loss_and_gradients("torch", config, torch.float32, device)
    ours = loss_and_gradients("triton", config, torch.float32, device)
    too_far = {}
    for name, exact in oracle.items():
        error, peer_error = ((result[name] - exact).abs().max() for result in (ours, theirs))
        allowed = 2 * max(peer_error, torch.finfo(torch.float32).eps * exact.abs().max())
        if not error <= allowed:
            too_far[name] = f"error {error:.3g}, allowed {allowed:.3g}"
    assert too_far == {}


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)])
def test_a_recomputed_triton_step_with_dropout_has_the_same_gradients(dtype: torch.dtype, device: str) -> None:
    # no multiple of four, by which masks are drawn
    config = ModelConfig.model_validate(SHAPE | {"n_embd": 34, "context": 19, "dropout": 0.2})
    kept = loss_and_gradients("triton", config, dtype, device)
    recomputed = loss_and_gradients("triton", config, dtype, device, checkpointed=True)
    assert [name for name in kept if not torch.equal(kept[name], recomputed[name])] == []


@pytest.mark.gpu
def test_a_captured_step_replays_with_the_masks_of_other_seeds(norm: str, device: str) -> None:
    config = ModelConfig.model_validate(SHAPE | {"norm": norm, "dropout": 0.2})
    model = build_model(config, load_ops("triton"), seed=3).to(device, torch.bfloat16)
    tokens = torch.randint(config.vocab_size, (2, config.context + 1), device=device)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    tables = [dropout_seeds(seed, config.n_layer).to(device) for seed in (5, 6)]

    def step(seeds: Tensor) -> list[Tensor]:
        loss = model(inputs, targets=targets, dropout_seed=seeds)
        return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]

    eager = [[x.clone() for x in step(table)] for table in tables]
    seeds = tables[0].clone()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step(seeds)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(seeds)
    for table, expected in zip(tables, eager, strict=True):
        seeds.copy_(table)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))
    assert not torch.equal(eager[0][0], eager[1][0])
