"""Each heuristic finds the preference that was planted, by what it is defined to look at and by nothing else."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastgpt.errors import UserError
from fastgpt.evaluate.heuristics import HEURISTICS, evaluate_heuristic, read_trial

RACE = {
    "article": "It rained all day.",
    "questions": ["How was the street?", "How was the roof?"],
    "options": [["dry", "wet", "old", "new"], ["old", "new", "dry", "wet"]],
    "answers": ["B", "D"],
}
STORY = "InputStoryid,InputSentence1,InputSentence2,InputSentence3,InputSentence4,{},{},AnswerRightEnding\n".format(
    "RandomFifthSentenceQuiz1", "RandomFifthSentenceQuiz2"
)


def copa(folder: Path, rows: list[tuple[str, str, str, int]]) -> Path:
    path = folder / "copa.jsonl"
    keys = ("premise", "choice1", "choice2", "label")
    lines = [json.dumps(dict(zip(keys, row, strict=True)) | {"question": "effect"}) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_sst2_asks_after_very_which_sentiment_is_likelier(tmp_path: Path, planted: Any, words: Any) -> None:
    path = tmp_path / "dev.tsv"
    path.write_text("sentence\tlabel\na good film\t1\na dull film\t0\na good joke\t1\na film\t0\na play\t1\n")
    model = planted([("good", "positive", 2.0), ("dull", "negative", 2.0), ("very", "negative", 0.5)])
    found = evaluate_heuristic(model, words, "sst2", path)
    # without a word that tells it is negative after "very"
    expected = {"heuristic": "sst2", "metric": "accuracy", "score": 0.8, "random": 0.5, "ties": 0}
    assert found == expected | {"examples": 5, "cut": 0, "file": str(path)}


def test_a_sentiment_of_several_tokens_counts_by_their_sum(tmp_path: Path, planted: Any, words: Any) -> None:
    def pieces(texts: list[str]) -> list[list[int]]:
        return whole([text.replace("positive", "posi tive") for text in texts])

    whole, words.encode_batch = words.encode_batch, pieces
    path = tmp_path / "dev.tsv"
    path.write_text("sentence\tlabel\na good film\t0\na good joke\t0\n")
    # of 64 tokens "posi" has e^4 / (e^4 + 63 + ...), and "tive" is all but certain after it
    model = planted([("very", "posi", 4.0), ("posi", "tive", 12.0), ("very", "negative", 4.5)], last_only=True)
    # by the mean of its tokens "posi tive" would be likelier
    assert evaluate_heuristic(model, words, "sst2", path)["score"] == 1.0
    model = planted([("very", "posi", 5.0), ("posi", "tive", 12.0), ("very", "negative", 4.5)], last_only=True)
    assert evaluate_heuristic(model, words, "sst2", path)["score"] == 0.0


def test_a_choice_is_the_answer_with_the_highest_mean_after_context_and_question(
    tmp_path: Path, planted: Any, words: Any
) -> None:
    path = tmp_path / "1.txt"
    path.write_text(json.dumps(RACE))
    model = planted([("rained", "wet", 1.5), ("roof", "dry", 0.5)])
    assert evaluate_heuristic(model, words, "race", path)["score"] == 1.0
    model = planted([("rained", "wet", 1.5), ("roof", "dry", 2.0)])
    found = evaluate_heuristic(model, words, "race", tmp_path)
    assert (found["score"], found["random"], found["examples"]) == (0.5, 0.25, 2)


def test_a_longer_answer_is_not_worse_for_being_longer(tmp_path: Path, planted: Any, words: Any) -> None:
    # "soaked through" in two likely steps is likelier by the mean, "mud" by the sum
    model = planted([("?", "soaked", 3.0), ("soaked", "through", 3.0), ("?", "mud", 2.5)], last_only=True)
    path = copa(tmp_path, [("It rained.", "mud", "soaked through", 1)])
    assert evaluate_heuristic(model, words, "copa", path)["score"] == 1.0


def test_storycloze_goes_on_with_the_likelier_ending(tmp_path: Path, planted: Any, words: Any) -> None:
    path = tmp_path / "cloze.csv"
    path.write_text(STORY + "1,It rained.,He ran.,He fell.,He rose.,He was dry.,He was wet.,2\n")
    model = planted([("rained", "wet", 1.0)])
    assert evaluate_heuristic(model, words, "storycloze", path)["score"] == 1.0


def test_hellaswag_takes_the_likeliest_of_four_endings(tmp_path: Path, planted: Any, words: Any) -> None:
    path = tmp_path / "val.txt"
    path.write_text("Roof: It rained.\n2\ndry\nold\nwet\nnew\n")
    found = evaluate_heuristic(planted([("rained", "wet", 1.0)]), words, "hellaswag", path)
    assert (found["score"], found["random"]) == (1.0, 0.25)


def winograd(folder: Path, *lines: str) -> Path:
    path = folder / "wsc.txt"
    path.write_text("\n\n".join(line.replace("|", "\n") for line in lines) + "\n")
    return path


def test_winograd_counts_the_rest_of_the_sentence_alone(tmp_path: Path, planted: Any, words: Any) -> None:
    path = winograd(
        tmp_path,
        "The prize is not in the case because [MASK] is big.|[MASK]|the prize,the case|the prize",
        "The prize is not in the case because [MASK] is small.|[MASK]|the case,the prize|the case",
    )
    # the case itself is far likelier after "the": that must not count
    model = planted([("prize", "big", 1.0), ("case", "small", 1.0), ("the", "case", 9.0)])
    found = evaluate_heuristic(model, words, "winograd", path)
    assert (found["score"], found["random"], found["ties"]) == (1.0, 0.5, 0)
    # and what stands before the gap counts for nothing, however it is written
    without = planted([("the", "case", 9.0), ("because", "prize", 9.0)])
    assert evaluate_heuristic(without, words, "winograd", path)["ties"] == 2


def test_a_mark_after_the_gap_follows_without_a_space(tmp_path: Path) -> None:
    path = winograd(tmp_path, "They saw [MASK] .|[MASK]|the case,the prize|the case", "[MASK] ran.|[MASK]|Tom,Ann|Ann")
    first, second = read_trial("winograd", path).examples
    passages = HEURISTICS["winograd"].passages
    assert [p[:2] for p in passages(first)] == [("They saw the case", "."), ("They saw the prize", ".")]
    assert [p[:2] for p in passages(second)] == [("Tom", " ran."), ("Ann", " ran.")]


def test_of_choices_that_are_exactly_as_likely_none_is_preferred(tmp_path: Path, planted: Any, words: Any) -> None:
    path = copa(tmp_path, [("It rained.", "wet", "dry", 0), ("It rained.", "dry", "wet", 0)])
    found = evaluate_heuristic(planted([]), words, "copa", path)
    assert (found["score"], found["ties"]) == (0.5, 2)


def test_cola_accepts_sentences_whose_mean_is_above_a_threshold_of_other_sentences(
    tmp_path: Path, planted: Any, words: Any
) -> None:
    path = tmp_path / "dev.tsv"
    good, bad = ["the cat sat", "the cat sat on the cat sat", "the cat"], ["cat the sat", "sat the", "sat on cat on"]
    rows = [f"x\t{label}\t\t{text}" for label, texts in ((1, good), (0, bad)) for text in texts for _ in range(12)]
    path.write_text("\n".join(rows) + "\n")
    model = planted([("the", "cat", 3), ("cat", "sat", 3), ("sat", "on", 1), ("on", "the", 3)], last_only=True)
    found = evaluate_heuristic(model, words, "cola", path)
    assert (found["metric"], found["score"], found["random"], found["accuracy"]) == ("matthews", 1.0, 0.0, 1.0)
    # the least likely of the acceptable ones, by the mean of its words: "the" of 64 words, then "cat"
    worst = (-math.log(64) + 3 - math.log(63 + math.e**3)) / 2
    assert found["thresholds"] == pytest.approx([worst, worst])


def test_cola_of_sentences_that_are_all_alike_is_no_better_than_chance(
    tmp_path: Path, planted: Any, words: Any
) -> None:
    path = tmp_path / "dev.tsv"
    path.write_text("".join(f"x\t{row % 2}\t\tthe cat\n" for row in range(10)))
    found = evaluate_heuristic(planted([]), words, "cola", path)
    assert (found["score"], found["accuracy"]) == (0.0, 0.5)


def test_what_the_context_has_no_room_for_is_counted(tmp_path: Path, planted: Any, words: Any) -> None:
    path = copa(tmp_path, [("It rained.", "wet", "dry", 0), ("It rained " + "and rained " * 9, "wet", "dry", 0)])
    model = planted([("rained", "wet", 1.0)], context=16)
    found = evaluate_heuristic(model, words, "copa", path)
    assert (found["score"], found["cut"]) == (1.0, 2)


def test_examples_are_chosen_by_the_seed_and_stay_in_their_order(tmp_path: Path) -> None:
    path = copa(tmp_path, [(f"It rained {row}.", "wet", "dry", 0) for row in range(50)])
    places = lambda seed, count: [e.place for e in read_trial("copa", path, examples=count, seed=seed).examples]  # noqa: E731
    rows = [int(place.rpartition(":")[2]) for place in places(1, 20)]
    assert rows == sorted(set(rows)) and len(rows) == 20
    assert places(1, 20) == places(1, 20) != places(2, 20)
    assert len(places(1, 90)) == 50
    assert set(places(1, 10)) < set(places(1, 20))


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("colla", "'colla' is not a heuristic; known: cola, sst2, .*Did you mean cola"),
        ("sst2", "nothing.tsv: no such file"),
        ("winograd", "nothing.tsv: no such file"),
    ],
)
def test_what_cannot_be_tried_is_one_line(tmp_path: Path, planted: Any, words: Any, name: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        evaluate_heuristic(planted([]), words, name, tmp_path / "nothing.tsv")


def test_one_sentence_has_no_half_to_choose_a_threshold_on(tmp_path: Path) -> None:
    path = tmp_path / "dev.tsv"
    path.write_text("x\t1\t\tthe cat\nx\t0\t\tcat the\n")
    with pytest.raises(UserError, match="cola needs two examples or more"):
        read_trial("cola", path, examples=1)


def test_a_text_that_does_not_fit_is_told_with_its_row(tmp_path: Path, planted: Any, words: Any) -> None:
    path = tmp_path / "dev.tsv"
    path.write_text("x\t1\t\tthe cat\nx\t0\t\tthe cat sat on the cat\n")
    with pytest.raises(UserError, match=f"^{path}:2: 6 tokens to score do not fit the model, whose context is 5$"):
        evaluate_heuristic(planted([], context=5), words, "cola", path)


REAL = {
    "cola": ("glue/cola/in_domain_dev.tsv", 0.0),
    "sst2": ("glue/sst2/dev.tsv", 0.5),
    "copa": ("fewshot/copa/copa-dev.xml", 0.5),
    "hellaswag": ("fewshot/hellaswag/hellaswag_val_full.txt.bz2", 0.25),
    "winograd": ("zeroshot/winograd/wsc273.txt", 0.5),
}


@pytest.mark.parametrize("name", REAL)
def test_real_data_is_read_and_a_model_without_preferences_reaches_what_guessing_does(
    real_data: Path, planted: Callable[..., Any], words: Any, name: str
) -> None:
    file, random = REAL[name]
    model = planted([], context=512)
    words.id = lambda word: 1 + len(word) % 63
    found = evaluate_heuristic(model, words, name, real_data / file, examples=40)
    assert (found["examples"], found["random"], found["cut"]) == (40, random, 0)
    # each token is as likely as any other, and here the choices have as many: their likelihoods are exactly equal
    if name in ("sst2", "winograd"):
        assert (found["score"], found["ties"]) == (random, 40)
