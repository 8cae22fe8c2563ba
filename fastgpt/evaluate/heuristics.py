"""GPT-1's zero-shot heuristics: tasks done by a language model that was not trained to.

As in Radford et al. 2018, section 5, "Zero-shot Behaviors":

    cola        a sentence is acceptable where its mean token log-probability reaches a threshold
    sst2        after the text and " very", whether " positive" or " negative" is likelier: the log-probabilities of a
                word's tokens are added, however many the tokenizer makes of it
    race        the answer with the highest mean token log-probability after document and question
    winograd    each referent in the place of the pronoun: the one after which the rest of the sentence has the highest
                mean token log-probability

The paper leaves CoLA's threshold open. Ours is the one with the highest Matthews correlation on one half of the
examples, by which the other half is told, and the other way round. `copa`, `storycloze` and `hellaswag`, of which the
paper says nothing, are done as `race` is. Context and question are those of the readers in `fastgpt.tasks`, a space
between: COPA's question is the sentence that its authors put to people.

The paper's Winograd schemas are those of Rahman and Ng 2012; `winograd` reads WSC273.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastgpt.data.sampler import Sampler
from fastgpt.errors import UserError, did_you_mean
from fastgpt.evaluate.likelihood import LanguageModel, Likelihood, Passage, encode_passages, likelihoods
from fastgpt.evaluate.threshold import cross_fitted, matthews_of
from fastgpt.evaluate.winograd import read_winograd
from fastgpt.model.seeds import fold
from fastgpt.tasks import Example, load_examples
from fastgpt.tokenizer import Tokenizer

SENTIMENTS = (" negative", " positive")  # by the class
CHOICE, HALVES = 0, 1  # what the seed is folded with

Found = Sequence[Sequence[Likelihood]]  # of each example, those of its passages


class Heuristic(NamedTuple):
    """How a data set is read, what of an example is scored, and what follows from it."""

    read: Callable[[Path], list[Example]]
    passages: Callable[[Example], list[Passage]]
    judge: Callable[[Found, list[int], int], dict[str, Any]]  # of targets and a seed


@dataclass(frozen=True)
class Trial:
    """A heuristic and the examples that it is tried on."""

    name: str
    path: Path
    examples: list[Example]
    seed: int

    def run(self, model: LanguageModel, tokenizer: Tokenizer, batch_size: int = 32) -> dict[str, Any]:
        """What the model reaches; see `evaluate_heuristic`."""
        heuristic = HEURISTICS[self.name]
        passages = [heuristic.passages(example) for example in self.examples]
        spans = encode_passages(tokenizer, [passage for several in passages for passage in several])
        flat = likelihoods(model, spans, batch_size=batch_size)
        each = iter(flat)
        found = [list(islice(each, len(several))) for several in passages]
        targets = [int(example.target) for example in self.examples if example.target is not None]
        return {
            "heuristic": self.name,
            **heuristic.judge(found, targets, self.seed),
            "examples": len(self.examples),
            "cut": sum(likelihood.cut for likelihood in flat),
            "file": str(self.path),
        }


def evaluate_heuristic(
    model: LanguageModel,
    tokenizer: Tokenizer,
    name: str,
    path: str | Path,
    *,
    examples: int | None = None,
    seed: int = 0,
    batch_size: int = 32,
) -> dict[str, Any]:
    """Try a heuristic on a file.

    Args:
        model: what `load_model` gives, or any model with its `hidden` and `logits`.
        tokenizer: the model's.
        name: one of `HEURISTICS`.
        path: the data, of which every example is labelled.
        examples: at most so many, chosen by the seed, the same for every model; None takes all.
        seed: of the choice, and of the halves of `cola`.
        batch_size: passages that are computed together.

    Returns:
        `heuristic`; `metric` ("accuracy" or "matthews"), `score` and `random`, both in that metric: what guessing
        reaches; `examples`, how many; `cut`, the passages whose beginning the context had no room for; `file`. With
        "accuracy" `ties`, the examples whose best choices are exactly as likely, a right one among t of which counts
        1/t; with "matthews" `accuracy` and the two `thresholds`, in nats a token.

    Raises:
        UserError: the name, the file or a row, or a text that is longer than the context.
    """
    return read_trial(name, path, examples=examples, seed=seed).run(model, tokenizer, batch_size)


def read_trial(name: str, path: str | Path, *, examples: int | None = None, seed: int = 0) -> Trial:
    """A heuristic and its examples, without a model; arguments and errors as for `evaluate_heuristic`."""
    path = Path(path)
    found = heuristic_named(name).read(path)
    if examples is not None and examples < len(found):
        order = Sampler(len(found), fold(seed, CHOICE)).index(np.arange(examples))
        found = [found[index] for index in sorted(order)]
    if name == "cola" and len(found) < 2:
        raise UserError(f"{path}: cola needs two examples or more: one half chooses the threshold of the other")
    return Trial(name, path, found, seed)


def heuristic_named(name: str) -> Heuristic:
    """The heuristic of this name. Raises UserError with the nearest where there is none."""
    if name not in HEURISTICS:
        near = did_you_mean(name, HEURISTICS)
        raise UserError(f"{name!r} is not a heuristic; known: {', '.join(HEURISTICS)}.{near}")
    return HEURISTICS[name]


def examples_of(data: str) -> Callable[[Path], list[Example]]:
    """Reads the labelled examples of a data set."""
    return lambda path: load_examples(path, data)[1]


def sentence(example: Example) -> list[Passage]:
    """The text itself, as a document."""
    return [Passage("", example.parts[0], example.place)]


def sentiment(example: Example) -> list[Passage]:
    """Each sentiment after the text and "very"."""
    return [Passage(f"{example.parts[0]} very", word, example.place) for word in SENTIMENTS]


def answers(example: Example) -> list[Passage]:
    """Each choice after context and question."""
    return [Passage(" ".join(example.parts), f" {choice}", example.place) for choice in example.choices]


def rest_of_sentence(example: Example) -> list[Passage]:
    """What follows the pronoun, after each referent in its place."""
    before, after = example.parts
    scored = after if after[0] in ",.;:!?" else f" {after}"
    return [Passage(f"{before} {choice}".lstrip(), scored, example.place) for choice in example.choices]


def likeliest(worth: Callable[[Likelihood], float]) -> Callable[[Found, list[int], int], dict[str, Any]]:
    """Predicts the passage that is worth most."""

    def judge(found: Found, targets: list[int], seed: int) -> dict[str, Any]:
        values = [[worth(likelihood) for likelihood in several] for several in found]
        best = [several.count(max(several)) for several in values]
        right = [
            (several[target] == max(several)) / count
            for several, target, count in zip(values, targets, best, strict=True)
        ]
        return {
            "metric": "accuracy",
            "score": float(np.mean(right)),
            "random": float(np.mean([1 / len(several) for several in values])),
            "ties": sum(count > 1 for count in best),
        }

    return judge


def likely_enough(found: Found, targets: list[int], seed: int) -> dict[str, Any]:
    """Predicts class 1 where the one passage is likely enough."""
    scores, classes = np.array([several[0].mean for several in found]), np.array(targets)
    predictions, thresholds = cross_fitted(scores, classes, fold(seed, HALVES))
    return {
        "metric": "matthews",
        "score": matthews_of(predictions, classes),
        "random": 0.0,
        "accuracy": float((predictions == classes).mean()),
        "thresholds": thresholds,
    }


BY_MEAN = likeliest(attrgetter("mean"))

HEURISTICS: dict[str, Heuristic] = {
    "cola": Heuristic(examples_of("cola"), sentence, likely_enough),
    "sst2": Heuristic(examples_of("sst2"), sentiment, likeliest(attrgetter("total"))),
    **{name: Heuristic(examples_of(name), answers, BY_MEAN) for name in ("race", "storycloze", "copa", "hellaswag")},
    "winograd": Heuristic(read_winograd, rest_of_sentence, BY_MEAN),
}
