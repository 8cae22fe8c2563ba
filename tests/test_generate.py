import io
import math
from pathlib import Path

import pytest
import torch
from fastgpt_kernels import load_ops
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastgpt.config import ModelConfig
from fastgpt.errors import UserError
from fastgpt.generate import generate, generate_command, next_token_probabilities, stream_text
from fastgpt.load import save_model
from fastgpt.model import build_model
from fastgpt.tokenizer import train_tokenizer
from fastgpt.tokenizer.base import Tokenizer

logits_lists = st.lists(st.integers(-240, 240).map(lambda eighths: eighths / 8), min_size=1, max_size=20)


def counting(window: Tensor) -> Tensor:
    """The likeliest token after t is t + 1, of ten."""
    return 3.0 * torch.nn.functional.one_hot((window[:, -1] + 1) % 10, 10).float()


def test_greedy_takes_the_likeliest_token() -> None:
    assert list(generate(counting, [3], steps=12, context=4, temperature=0)) == [4, 5, 6, 7, 8, 9, 0, 1, 2, 3, 4, 5]


def test_the_model_sees_at_most_the_last_context_tokens() -> None:
    windows = []

    def watching(window: Tensor) -> Tensor:
        windows.append(window.tolist())
        return counting(window)

    list(generate(watching, [1, 2], steps=4, context=3, temperature=0))
    assert windows == [[[1, 2]], [[1, 2, 3]], [[2, 3, 4]], [[3, 4, 5]]]
    windows.clear()
    list(generate(watching, [1, 2, 3, 4, 5], steps=1, context=3, temperature=0))
    assert windows == [[[3, 4, 5]]]


def test_tokens_come_one_by_one() -> None:
    calls = []

    def watching(window: Tensor) -> Tensor:
        calls.append(1)
        return counting(window)

    stream = generate(watching, [1], steps=5, context=3)
    assert len(calls) == 0
    next(stream)
    assert len(calls) == 1


def test_the_same_seed_draws_the_same_tokens_whatever_the_global_generator() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = list(generate(counting, [3], steps=50, context=4, seed=5))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert list(generate(counting, [3], steps=50, context=4, seed=5)) == first
    assert list(generate(counting, [3], steps=50, context=4, seed=6)) != first


def test_the_stop_token_ends_the_text_and_is_not_in_it() -> None:
    assert list(generate(counting, [3], steps=12, context=4, temperature=0, stop=7)) == [4, 5, 6]


def test_the_callers_gradients_stay_on_while_tokens_stream() -> None:
    for _ in generate(counting, [3], steps=2, context=4):
        assert torch.is_grad_enabled()


def test_frequencies_follow_the_probabilities() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    drawn = list(generate(lambda window: logits, [0], steps=4000, context=1, temperature=0.7))
    expected = (logits[0] / 0.7).softmax(-1)
    observed = torch.tensor(drawn).bincount(minlength=4) / 4000
    assert ((observed - expected).abs() < 5 * (expected * (1 - expected) / 4000).sqrt()).all()


@given(
    logits_lists, st.floats(0.1, 5), st.one_of(st.none(), st.integers(1, 25)), st.one_of(st.none(), st.floats(0.01, 1))
)
def test_the_distribution_is_what_its_definition_says(
    values: list[float], temperature: float, top_k: int | None, top_p: float | None
) -> None:
    logits = torch.tensor(values, dtype=torch.float64)
    ours = next_token_probabilities(logits, temperature=temperature, top_k=top_k, top_p=top_p)
    order = sorted(range(len(values)), key=lambda i: -values[i])[: top_k or len(values)]
    weights = {i: math.exp((values[i] - max(values)) / temperature) for i in order}
    total = sum(weights.values())
    kept, mass = [], 0.0
    for i in order:
        kept.append(i)
        mass += weights[i] / total
        if top_p is not None and top_p < 1 and mass >= top_p - 1e-12:
            break
    # a token on the very edge of the mass may fall on either side in floating point
    if top_p is None or abs(mass - top_p) > 1e-9:
        expected = torch.zeros(len(values), dtype=torch.float64)
        for i in kept:
            expected[i] = weights[i] / sum(weights[j] for j in kept)
        torch.testing.assert_close(ours, expected)
    assert ours.sum() == pytest.approx(1)


@given(logits_lists, st.floats(0.01, 0.99))
def test_top_p_keeps_the_smallest_set_that_reaches_its_mass(values: list[float], top_p: float) -> None:
    logits = torch.tensor(values, dtype=torch.float64)
    full = logits.softmax(-1)
    kept = full[next_token_probabilities(logits, top_p=top_p) > 0]
    assert len(kept) >= 1
    assert kept.sum() >= top_p - 1e-12
    assert kept.sum() - kept.min() < top_p + 1e-12


def test_extreme_temperatures_are_the_argmax_and_the_uniform_distribution() -> None:
    logits = torch.tensor([1.0, 3.0, 2.0])
    assert next_token_probabilities(logits, temperature=1e-300).tolist() == [0, 1, 0]
    assert next_token_probabilities(logits, temperature=0).tolist() == [0, 1, 0]
    torch.testing.assert_close(next_token_probabilities(logits, temperature=1e300), torch.full((3,), 1 / 3).double())


def test_equal_logits_are_cut_to_exactly_k() -> None:
    assert (next_token_probabilities(torch.zeros(9), top_k=4) > 0).sum() == 4
    assert next_token_probabilities(torch.zeros(9), top_p=1.0).gt(0).all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_numbers_are_an_error(value: float) -> None:
    with pytest.raises(UserError, match="logits are not numbers"):
        list(generate(lambda window: torch.tensor([[0.0, value, 1.0]]), [0], steps=1, context=1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": -0.1}, r"temperature is -0\.1"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"top_k": 0}, "top_k is 0; it must be at least 1"),
        ({"top_p": 0.0}, r"top_p is 0\.0; it must be above 0 and at most 1"),
        ({"top_p": 1.1}, r"top_p is 1\.1"),
        ({"steps": -1}, "number of tokens is -1"),
        ({"context": 0}, "context is 0"),
        ({"prompt_ids": []}, "the prompt has no tokens"),
    ],
)
def test_arguments_out_of_range_are_refused_before_the_first_token(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        generate(counting, **({"prompt_ids": [0], "steps": 1, "context": 1} | arguments))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["the cat and the other cat: 고양이 고양이"] * 3, vocab_size=270)


@given(st.text())
def test_streamed_text_is_the_text(tokenizer: Tokenizer, text: str) -> None:
    text = text.encode("utf-8", errors="ignore").decode()
    assert "".join(stream_text(tokenizer, tokenizer.encode(text))) == text


@given(st.lists(st.integers(0, 269), max_size=12))
def test_any_stream_of_tokens_decodes_as_it_does_at_once(tokenizer: Tokenizer, ids: list[int]) -> None:
    assert "".join(stream_text(tokenizer, ids)) == tokenizer.decode(ids)


def test_a_character_of_several_tokens_appears_when_it_is_whole(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("€a")
    assert len(ids) == 4
    assert list(stream_text(tokenizer, ids)) == ["€", "a"]
    assert list(stream_text(tokenizer, ids[:2])) == ["\N{REPLACEMENT CHARACTER}"]


@pytest.fixture
def folder(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    config = ModelConfig(n_layer=1, n_head=2, n_embd=10, context=8, vocab_size=tokenizer.vocab_size)
    model = build_model(config, load_ops("torch"))
    save_model(tmp_path, model.state_dict(), config, tokenizer)
    return tmp_path


def written(folder: Path, **options: object) -> str:
    out = io.StringIO()
    settings = {"prompt": "the cat", "max_tokens": 20, "temperature": 1.0, "top_k": None, "top_p": None, "seed": 3}
    settings |= {"device": "cpu", "backend": "auto", "out": out}
    generate_command(folder, **(settings | options))
    return out.getvalue()


def test_the_command_writes_the_prompt_and_what_follows(folder: Path) -> None:
    text = written(folder)
    assert text.startswith("the cat")
    assert len(text) > len("the cat\n")
    assert text.endswith("\n")
    assert written(folder) == text
    assert written(folder, seed=4) != text


def test_without_a_prompt_the_command_starts_a_document(folder: Path) -> None:
    assert len(written(folder, prompt="")) > 1


def test_samples_are_numbered_and_differ(folder: Path) -> None:
    first, second = written(folder, samples=2).split("--- 2 of 2 ---\n")
    assert first.startswith("--- 1 of 2 ---\nthe cat")
    assert first.removeprefix("--- 1 of 2 ---\n") != second


def test_the_command_writes_to_standard_output(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = written(folder)
    written(folder, out=None)
    assert capsys.readouterr().out == expected


def test_a_model_without_tokenizer_cannot_write(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(UserError, match="the model has no tokenizer"):
        written(folder)


@pytest.mark.parametrize("options", [{"samples": 0}, {"max_tokens": -1}, {"top_p": 2.0}])
def test_arguments_are_checked_before_the_model_is_looked_for(options: dict[str, float]) -> None:
    with pytest.raises(UserError, match=r"samples is 0|number of tokens is -1|top_p is 2\.0"):
        written(Path("nowhere"), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "tpu"}, "^--device: 'tpu' is not known; allowed: auto, cpu, cuda, cuda:N$"),
        ({"device": "cuda:99"}, "^--device: cuda:99 asks for GPU 99"),
        ({"backend": "tritn"}, "^--backend: 'tritn' is not a kernel backend"),
        ({"backend": "fast"}, "^--backend: 'fast' is not a kernel backend.* Set --backend to 'auto'"),
    ],
)
def test_a_device_or_backend_that_is_not_there_is_told_by_its_option(
    folder: Path, options: dict[str, str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        written(folder, **options)
