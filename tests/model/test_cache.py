from collections.abc import Callable

import pytest
import torch
from fastgpt_kernels import load_ops
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastgpt.config import ModelConfig
from fastgpt.errors import UserError
from fastgpt.generate import generate
from fastgpt.model import GPT, build_model
from fastgpt.model.cache import CachedLogits, KeyValueCache

CPU = torch.device("cpu")


def cached(model: GPT) -> CachedLogits:
    return CachedLogits(model, model.config, dtype=model.token_embedding.weight.dtype, device=CPU)


def cache_of(model: GPT, batch: int = 1, capacity: int = 13) -> KeyValueCache:
    return KeyValueCache(model.config, batch, capacity, dtype=model.token_embedding.weight.dtype, device=CPU)


def text_of(model: GPT, batch: int = 1, length: int = 30) -> Tensor:
    return torch.randint(model.config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(2))


@pytest.fixture
def twins(
    config_of: Callable[..., ModelConfig],
    scramble: Callable[[GPT], GPT],
    norm: str,
    window: int | None,
    dtype: torch.dtype,
) -> tuple[GPT, GPT]:
    """A model in a dtype, and the reference of the same rounded weights in float64."""
    banded = {"attention": "alternating", "window": window} if window else {}
    model = scramble(build_model(config_of(norm=norm, **banded), load_ops("torch"))).to(dtype).eval()
    exact = GPT(model.config, load_ops("reference")).double().eval()
    exact.load_state_dict(model.state_dict())
    return model, exact


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize("prompt", [1, 5, 12, 13, 17])
@torch.no_grad()
def test_logits_with_a_cache_are_as_close_to_float64_as_twice_those_without(
    twins: tuple[GPT, GPT], dtype: torch.dtype, prompt: int
) -> None:
    model, exact = twins
    with_cache, text = cached(model), text_of(model)
    errors = torch.zeros(2, dtype=torch.float64)
    largest = torch.zeros((), dtype=torch.float64)
    for length in range(prompt, text.shape[1]):
        window = text[:, :length][:, -13:]
        oracle = exact(window, last_only=True)
        ours, theirs = with_cache(window), model(window, last_only=True)
        assert ours.shape == theirs.shape
        assert ours.dtype == dtype
        errors = torch.maximum(errors, torch.stack([(x.double() - oracle).abs().max() for x in (ours, theirs)]))
        largest = torch.maximum(largest, oracle.abs().max())
    assert errors[0] <= 2 * max(errors[1], torch.finfo(dtype).eps * largest)


@pytest.mark.parametrize("prompt", [1, 6, 13, 20])
def test_greedy_text_with_a_cache_is_that_without(model: GPT, prompt: int) -> None:
    model.eval()
    ids = text_of(model)[0, :prompt].tolist()
    plain = generate(lambda window: model(window, last_only=True), ids, steps=30, context=13, temperature=0)
    assert list(generate(cached(model), ids, steps=30, context=13, temperature=0)) == list(plain)


def test_a_banded_layer_reads_its_window_of_the_cache(config_of: Callable[..., ModelConfig]) -> None:
    read: list[tuple[int, ...]] = []

    def decode(q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
        read.append(tuple(lengths.tolist()))
        return ops.decode_attention(q, keys, values, lengths)

    ops = load_ops("torch")
    config = config_of(attention="alternating", window=4)
    model = build_model(config, ops._replace(decode_attention=decode)).eval()
    list(generate(cached(model), [1, 2], steps=6, context=13, temperature=0))
    assert read == [(3,), (3,), (4,), (4,), (5,), (4,), (6,), (4,), (7,), (4,)]


def test_a_token_is_computed_once_until_the_window_slides(model: GPT) -> None:
    computed: list[int] = []
    model.eval().blocks[0].register_forward_pre_hook(lambda block, inputs: computed.append(inputs[1].shape[1]))
    list(generate(cached(model), [1, 2, 3, 4], steps=12, context=13, temperature=0))
    # the prompt, then a token a call while 13 fit; two windows more
    assert computed == [4] + 9 * [1] + [13, 13]


def test_a_second_text_reuses_what_it_shares_with_the_first(model: GPT) -> None:
    computed: list[int] = []
    model.eval().blocks[0].register_forward_pre_hook(lambda block, inputs: computed.append(inputs[1].shape[1]))
    logits = cached(model)
    first = list(generate(logits, [1, 2, 3, 4], steps=5, context=13, seed=1))
    computed.clear()
    assert list(generate(logits, [1, 2, 3, 4], steps=5, context=13, seed=1)) == first
    assert computed == 5 * [1]
    computed.clear()
    torch.testing.assert_close(logits(torch.tensor([[1, 2, 9, 4]])), model(torch.tensor([[1, 2, 9, 4]]))[:, -1])
    assert computed[0] == 4


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=13), min_size=1, max_size=12), st.integers(1, 2))
def test_any_order_of_texts_gives_the_logits_of_each(texts: list[list[int]], batch: int) -> None:
    config = ModelConfig(n_layer=1, n_head=2, n_embd=6, context=13, vocab_size=3)
    model = build_model(config, load_ops("torch"), seed=3).double().eval()
    logits = cached(model)
    for text in texts:
        window = torch.tensor([text, text[::-1]][:batch])
        torch.testing.assert_close(logits(window), model(window, last_only=True))


def test_the_cache_grows_with_the_text(config_of: Callable[..., ModelConfig]) -> None:
    model = build_model(config_of(context=300), load_ops("torch"), seed=3).double().eval()
    logits, text = cached(model), text_of(model, batch=2, length=200)
    for length in (1, 2, 63, 64, 65, 66, 129, 130, 131, 200):
        window = text[:, :length]
        torch.testing.assert_close(logits(window), model(window, last_only=True))


def test_a_cache_changes_no_gradient_mode_and_holds_no_graph(model: GPT) -> None:
    cache = cache_of(model.eval())
    assert model(text_of(model, length=3), cache=cache).requires_grad
    assert not any(kept.requires_grad for layer in cache.layers(1) for kept in layer[:2])
    assert not cached(model)(text_of(model, length=3)).requires_grad
    assert torch.is_grad_enabled()


def test_what_does_not_fit_a_cache_is_an_error(model: GPT, config_of: Callable[..., ModelConfig]) -> None:
    model.eval()
    cache = cache_of(model, capacity=4)
    with pytest.raises(UserError, match="5 tokens do not fit the cache: it holds 0 of at most 4"):
        model(text_of(model, length=5), cache=cache)
    model(text_of(model, length=3), cache=cache)
    with pytest.raises(UserError, match="2 tokens do not fit the cache: it holds 3 of at most 4"):
        model(text_of(model, length=2), cache=cache)
    cache.length = 2
    with pytest.raises(UserError, match="2 tokens at once after the 2 of the cache: give them one at a time"):
        model(text_of(model, length=2), cache=cache)
    whole = cache_of(model)
    model(text_of(model, length=13), cache=whole)
    with pytest.raises(UserError, match=r"1 tokens after 13 do not fit the model: model\.context allows 1 to 13"):
        model(text_of(model, length=1), cache=whole)
    dropping = GPT(config_of(dropout=0.1), load_ops("torch"))
    with pytest.raises(UserError, match="in evaluation mode"):
        dropping(text_of(model, length=1), cache=cache_of(dropping), dropout_seed=1)
