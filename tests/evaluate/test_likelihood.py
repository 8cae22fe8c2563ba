import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fastgpt_kernels import load_ops

from fastgpt.config import ModelConfig
from fastgpt.errors import UserError
from fastgpt.evaluate.likelihood import ROWS, Passage, Span, Window, encode_passages, likelihoods
from fastgpt.model import GPT, build_model
from fastgpt.model.convert import from_hugging_face
from fastgpt.tokenizer import train_tokenizer

SHAPE = {"n_layer": 2, "n_head": 3, "n_embd": 21, "context": 11, "vocab_size": 37}


def random_model(**changes: Any) -> GPT:
    """Weights large enough that every token before matters."""
    config = ModelConfig.model_validate(SHAPE | changes)
    model = build_model(config, load_ops("reference"))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return model.double().eval()


def random_spans(count: int, longest_prefix: int = 15) -> list[Span]:
    """Some of them too long for the context."""
    generator = torch.Generator().manual_seed(4)
    sizes = zip(
        torch.randint(1, longest_prefix + 1, (count,), generator=generator).tolist(),
        torch.randint(1, 6, (count,), generator=generator).tolist(),
        strict=True,
    )
    draw = lambda n: tuple(torch.randint(37, (n,), generator=generator).tolist())  # noqa: E731
    return [Span(draw(before), draw(scored), f"f:{row}") for row, (before, scored) in enumerate(sizes)]


def test_a_likelihood_is_the_sum_over_its_tokens_worked_by_hand(planted: Callable[..., Any]) -> None:
    model = planted([], last_only=True)
    model.config.vocab_size = 3
    model.weights = torch.nn.Parameter(torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8], [1 / 3] * 3]).double().log())
    spans = [Span((0,), (1, 2), "a"), Span((2, 1), (0,), "b"), Span((0, 2, 0), (0, 1, 1), "c")]
    found = likelihoods(model, spans)
    assert [math.exp(x.total) for x in found] == pytest.approx([0.25 * 0.8, 0.1, 0.5 * 0.25 * 0.1])
    assert [x.tokens for x in found] == [2, 1, 3]
    assert found[2].mean == pytest.approx(math.log(0.5 * 0.25 * 0.1) / 3)


def test_only_what_is_scored_becomes_logits_and_few_of_it_at_a_time(planted: Callable[..., Any]) -> None:
    model = planted([], context=600)
    likelihoods(model, [Span((0,) * 20, (1, 2), "a"), Span((0, 3), (1,), "b")])
    assert model.rows == [3]
    model.rows.clear()
    likelihoods(model, [Span((0,), (1,) * 500, "a")])
    assert model.rows == [ROWS, 500 - ROWS]


@pytest.mark.parametrize("changes", [{}, {"norm": "post"}, {"embedding": "table", "norm": "post"}])
def test_a_batch_finds_what_each_span_finds_alone(changes: dict[str, Any]) -> None:
    model, spans = random_model(**changes), random_spans(23)
    together = likelihoods(model, spans, batch_size=7)
    for span, found in zip(spans, together, strict=True):
        (alone,) = likelihoods(model, [span])
        assert found.total == pytest.approx(alone.total, rel=1e-12)
        assert found[1:] == alone[1:]
    assert len({round(x.total, 6) for x in together}) == len(spans)


def test_each_span_is_computed_once_beside_those_of_like_length(planted: Callable[..., Any]) -> None:
    model = planted([])
    spans = [Span((0,) * (3 * size), (1,), "a") for size in (4, 1, 3, 2, 1, 4)]
    likelihoods(model, spans, batch_size=2)
    assert model.batches == [(2, 12), (2, 6)]


def test_equal_spans_have_exactly_equal_likelihoods_whatever_stands_beside_them() -> None:
    spans = random_spans(6)
    model = random_model().float()
    found = likelihoods(model, [*spans, *reversed(spans)], batch_size=4)
    assert found[:6] == found[:5:-1]


def test_what_is_cut_is_the_beginning_of_the_prefix() -> None:
    model = random_model()
    long = Span(tuple(range(20)), (30, 31, 32), "a")
    found, end, shorter = likelihoods(
        model, [long, Span(tuple(range(11, 20)), (30, 31, 32), "b"), Span(tuple(range(12, 20)), (30, 31, 32), "c")]
    )
    assert found.total == end.total != pytest.approx(shorter.total)
    assert [found.cut, end.cut, shorter.cut] == [True, False, False]
    assert Window.of(long, 11).tokens == (*range(11, 20), 30, 31, 32)  # of which the model reads 11


def test_what_is_scored_is_never_cut() -> None:
    model = random_model()
    (whole,) = likelihoods(model, [Span((1, 2), tuple(range(11)), "few.tsv:3")])
    assert (whole.tokens, whole.cut) == (11, True)
    message = "^few.tsv:3: 12 tokens to score do not fit the model, whose context is 11$"
    with pytest.raises(UserError, match=message):
        likelihoods(model, [Span((1,), tuple(range(12)), "few.tsv:3")])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changes", [{}, {"embedding": "table", "norm": "post"}])
def test_the_probabilities_of_all_tokens_that_may_follow_add_up_to_one(
    changes: dict[str, Any], dtype: torch.dtype
) -> None:
    found = likelihoods(random_model(**changes).to(dtype), [Span((5, 6), (token,), "a") for token in range(37)])
    assert sum(math.exp(x.total) for x in found) == pytest.approx(1, abs=1e-6)


def test_dropout_is_off_and_the_model_stays_in_its_mode() -> None:
    model, spans = random_model(dropout=0.5), random_spans(3)
    expected = likelihoods(model, spans)
    assert not model.training
    model.train()
    assert likelihoods(model, spans) == expected
    assert model.training


def test_weights_that_are_not_numbers_are_told() -> None:
    model = random_model()
    with torch.no_grad():
        next(iter(model.parameters()))[3, 3] = math.nan
    with pytest.raises(UserError, match="probabilities are not numbers"):
        likelihoods(model, random_spans(2))


def test_likelihoods_are_those_of_transformers() -> None:
    transformers = pytest.importorskip("transformers", reason="comparing with transformers needs the extra 'hf'")
    torch.manual_seed(3)
    config = transformers.GPT2Config(
        n_layer=2, n_head=3, n_embd=21, n_positions=24, vocab_size=37, initializer_range=0.4
    )
    theirs = transformers.GPT2LMHeadModel(config).double().eval()
    ours = from_hugging_face(theirs.state_dict(), theirs.config.to_dict(), load_ops("reference")).eval()
    spans = random_spans(9)
    for span, found in zip(spans, likelihoods(ours, spans, batch_size=4), strict=True):
        with torch.no_grad():
            logits = theirs(torch.tensor([[*span.prefix, *span.scored]])).logits[0]
        each = logits.log_softmax(-1)[len(span.prefix) - 1 : -1].gather(1, torch.tensor(span.scored)[:, None])
        assert found.total == pytest.approx(each.sum().item(), rel=1e-10)
        assert found.mean == pytest.approx(each.mean().item(), rel=1e-10)


def test_a_passage_begins_with_the_token_before_documents_and_its_space_is_on_what_is_scored() -> None:
    tokenizer = train_tokenizer(["a cat sat on the mat, and the cat sat on."] * 3, vocab_size=290)
    first, second = encode_passages(tokenizer, [Passage("a cat", " sat on", "a:1"), Passage("", "the mat", "a:2")])
    assert first.prefix == (tokenizer.end_of_text, *tokenizer.encode("a cat"))
    assert first.scored == tuple(tokenizer.encode(" sat on")) != tuple(tokenizer.encode("sat on"))
    assert [*first.prefix[1:], *first.scored] == tokenizer.encode("a cat sat on")
    assert second == Span((tokenizer.end_of_text,), tuple(tokenizer.encode("the mat")), "a:2")


def test_a_text_without_tokens_is_told_with_its_place(words: Any) -> None:
    with pytest.raises(UserError, match=r"^a:2: a text gives no tokens$"):
        encode_passages(words, [Passage("a", "b", "a:1"), Passage("a", " ", "a:2")])
