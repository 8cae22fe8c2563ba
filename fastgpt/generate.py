"""Text from a model: sampling token by token, and `fastgpt generate`.

What is kept between two tokens is the business of who gives the logits: `cached_logits` of `fastgpt.model.cache`.
"""

import codecs
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from os import PathLike
from typing import TYPE_CHECKING, TextIO

import torch
from torch import Tensor

from fastgpt.errors import UserError
from fastgpt.model.seeds import fold
from fastgpt.tokenizer import Tokenizer

if TYPE_CHECKING:
    from fastgpt_kernels import Backend


def generate(
    model_logits: Callable[[Tensor], Tensor],
    prompt_ids: Sequence[int],
    *,
    steps: int,
    context: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop: int | None = None,
) -> Iterator[int]:
    """Sample up to `steps` tokens after the prompt, each yielded as soon as it is drawn.

    Args:
        model_logits: tokens (1, T) int64 on the CPU, T <= context, to the logits (1, V) after the last of them.
        prompt_ids: at least one token.
        steps: how many tokens to draw.
        context: the longest window; of a longer text its last `context` tokens are read.
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: choose among the k likeliest tokens (Fan et al. 2018, section 5.4); None among all.
        top_p: choose among the likeliest tokens whose joint probability, after the top-k cut, first reaches p (Holtzman
            et al. 2020, section 3.1); None among all.
        seed: of this text's own generator, on the CPU; the global generators are neither read nor moved.
        stop: a token that ends the text and is not yielded.

    Raises:
        UserError: an argument is out of its range; or, while sampling, the logits are not numbers.
    """
    _check(prompt_ids, steps, context, temperature, top_k, top_p)
    return _tokens(model_logits, list(prompt_ids), steps, context, temperature, top_k, top_p, seed, stop)


def next_token_probabilities(
    logits: Tensor, *, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """The distribution (V,) float64, on the CPU, that the next token is drawn from; logits (V,) in any dtype."""
    logits = logits.detach().cpu().double()
    logits = logits - logits.max()
    if not bool(torch.isfinite(logits).any()):
        raise UserError("the model's logits are not numbers: its weights are damaged, or its training diverged")
    if temperature == 0:
        return torch.zeros_like(logits).index_fill_(0, logits.argmax(), 1.0)
    ranked, order = torch.sort(logits / temperature, descending=True, stable=True)
    if top_k is not None:
        ranked[top_k:] = -math.inf
    probabilities = ranked.softmax(-1)
    if top_p is not None and top_p < 1:
        before = probabilities.cumsum(-1) - probabilities  # the mass of likelier tokens
        probabilities = torch.where(before < top_p, probabilities, 0.0)
        probabilities /= probabilities.sum()
    return torch.empty_like(probabilities).scatter_(0, order, probabilities)


def stream_text(tokenizer: Tokenizer, ids: Iterable[int]) -> Iterator[str]:
    """The text of tokens as they come; a character spread over several tokens appears when it is whole."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for index in ids:
        if text := decoder.decode(tokenizer.decode_bytes([index])):
            yield text
    if text := decoder.decode(b"", final=True):
        yield text


def generate_command(
    folder: str | PathLike[str],
    *,
    prompt: str,
    max_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int,
    device: str,
    backend: "Backend",
    samples: int = 1,
    out: TextIO | None = None,
) -> None:
    """`fastgpt generate`: load a model and write texts to `out` (standard output), token by token.

    An empty prompt starts a new document. A text ends at end-of-text or after `max_tokens` tokens.

    Raises:
        UserError: the folder has no model, or none with a tokenizer, or an argument is out of its range.
    """
    # before the model, which takes longer
    _check([0], max_tokens, 1, temperature, top_k, top_p)
    if samples < 1:
        raise UserError(f"samples is {samples}; it must be at least 1")

    from fastgpt.engine.backend import ops_for
    from fastgpt.engine.precision import resolve_device
    from fastgpt.load import read_model
    from fastgpt.model.cache import cached_logits

    place = resolve_device(device, setting="--device")
    model, tokenizer = read_model(folder, ops_for(backend, place, setting="--backend"), place)
    if tokenizer is None:
        raise UserError(f"{folder}: the model has no tokenizer, so there is no text to go from or to")
    table = model.token_embedding.weight
    logits = cached_logits(model, model.config, dtype=table.dtype, device=table.device)
    out = out or sys.stdout
    for sample in range(samples):
        tokens = generate(
            logits,
            tokenizer.encode(prompt) or [tokenizer.end_of_text],
            steps=max_tokens,
            context=model.config.context,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=fold(seed, sample),
            stop=tokenizer.end_of_text,
        )
        if samples > 1:
            out.write(f"--- {sample + 1} of {samples} ---\n")
        out.write(prompt)
        for text in stream_text(tokenizer, tokens):
            out.write(text)
            out.flush()
        out.write("\n")
    out.flush()


def _check(
    prompt_ids: Sequence[int],
    steps: int,
    context: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
) -> None:
    if not prompt_ids:
        raise UserError("the prompt has no tokens; start from the tokenizer's end_of_text")
    if steps < 0:
        raise UserError(f"the number of tokens is {steps}; it must be at least 0")
    if context < 1:
        raise UserError(f"context is {context}; it must be at least 1")
    if not (temperature >= 0 and math.isfinite(temperature)):
        raise UserError(f"temperature is {temperature}; it must be a number of at least 0")
    if top_k is not None and top_k < 1:
        raise UserError(f"top_k is {top_k}; it must be at least 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"top_p is {top_p}; it must be above 0 and at most 1")


def _tokens(
    model_logits: Callable[[Tensor], Tensor],
    ids: list[int],
    steps: int,
    context: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int,
    stop: int | None,
) -> Iterator[int]:
    generator = torch.Generator().manual_seed(fold(seed))
    for _ in range(steps):
        # not around the yield: the caller's code must keep its gradients
        with torch.no_grad():
            logits = model_logits(torch.tensor([ids[-context:]]))
        probabilities = next_token_probabilities(logits[0], temperature=temperature, top_k=top_k, top_p=top_p)
        token = int(torch.multinomial(probabilities, 1, generator=generator))
        if token == stop:
            return
        ids.append(token)
        yield token
