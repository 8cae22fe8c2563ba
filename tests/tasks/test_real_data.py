"""Every real file of a data set that is there: as many examples as its publisher says, and the classes they have."""

import logging
from collections import Counter
from pathlib import Path

import pytest

from fastgpt.tasks import Example, Task, load_examples

# file -> (data set, examples, how many of each class or choice)
FILES: dict[str, tuple[str, int, dict[int, int] | None]] = {
    "glue/cola/in_domain_train.tsv": ("cola", 8551, {0: 2528, 1: 6023}),
    "glue/cola/in_domain_dev.tsv": ("cola", 527, {0: 162, 1: 365}),
    "glue/cola/out_of_domain_dev.tsv": ("cola", 516, {0: 162, 1: 354}),
    "glue/sst2/train_full.tsv": ("sst2", 67349, {0: 29780, 1: 37569}),
    "glue/sst2/dev.tsv": ("sst2", 872, {0: 428, 1: 444}),
    "glue/sst2/test-labeled.tsv": ("sst2", 1821, None),
    "glue/mrpc/msr_paraphrase_train.txt": ("mrpc", 4076, {0: 1323, 1: 2753}),
    "glue/mrpc/msr_paraphrase_test.txt": ("mrpc", 1725, {0: 578, 1: 1147}),
    "glue/stsb/sts-train.csv": ("stsb", 5749, None),
    "glue/stsb/sts-dev.csv": ("stsb", 1500, None),
    "glue/stsb/sts-test.csv": ("stsb", 1379, None),
    "glue/rte/train.tsv": ("rte", 2490, {0: 1249, 1: 1241}),
    "glue/rte/dev.tsv": ("rte", 277, {0: 146, 1: 131}),
    "glue/sick/sick_train.csv": ("sick", 9500, {0: 2709, 1: 5412, 2: 1379}),
    "glue/sick/sick_dev.csv": ("sick", 500, {0: 143, 1: 286, 2: 71}),
    "transfer/imdb_sample/imdb_sample.csv": ("imdb", 1000, {0: 512, 1: 488}),
    "transfer/trec6/TREC.train": ("trec", 5452, {0: 86, 1: 1162, 2: 1250, 3: 1223, 4: 835, 5: 896}),
    "transfer/trec6/TREC.test": ("trec", 500, {0: 9, 1: 138, 2: 94, 3: 65, 4: 81, 5: 113}),
    "korean/kornli/xnli.dev.ko.tsv": ("kornli", 2490, {0: 830, 1: 830, 2: 830}),
    "korean/kornli/xnli.test.ko.tsv": ("kornli", 5010, {0: 1670, 1: 1670, 2: 1670}),
    "korean/korsts/sts-train.tsv": ("korsts", 5749, None),
    "korean/korsts/sts-dev.tsv": ("korsts", 1500, None),
    "korean/korsts/sts-test.tsv": ("korsts", 1379, None),
    "fewshot/copa/copa-dev.xml": ("copa", 500, {0: 250, 1: 250}),
    "fewshot/copa/copa-test.xml": ("copa", 500, {0: 250, 1: 250}),
    "fewshot/hellaswag/hellaswag_val_full.txt.bz2": ("hellaswag", 10042, {0: 2515, 1: 2485, 2: 2584, 3: 2458}),
}


@pytest.mark.parametrize("name", FILES)
def test_a_published_file_gives_all_its_examples_and_their_classes(real_data: Path, name: str) -> None:
    data, count, classes = FILES[name]
    task, examples = load_examples(real_data / name, data)
    assert len(examples) == count
    if classes is not None:
        assert dict(Counter(example.target for example in examples)) == classes
    check(task, examples)


def test_nsmc_is_read_but_for_the_reviews_without_a_word(real_data: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        task, examples = load_examples(real_data / "korean/nsmc/ratings_test.txt", "nsmc")
    assert len(examples) == 50_000 - 3
    assert "3 rows without a text" in caplog.text
    check(task, examples)


def check(task: Task, examples: list[Example]) -> None:
    """Whatever the data set, its examples are of the form that its task says."""
    assert len({example.place for example in examples}) == len(examples)
    for example in examples:
        assert all(text and text == text.strip() for text in (*example.parts, *example.choices))
        assert len(example.choices) == task.choices
        assert example.target is not None
        if task.score is None:
            assert isinstance(example.target, int) and 0 <= example.target < (task.choices or task.outputs)
        else:
            assert isinstance(example.target, float) and task.score[0] <= example.target <= task.score[1]


def test_quotation_marks_of_a_tsv_are_characters_of_its_text(real_data: Path) -> None:
    _, examples = load_examples(real_data / "glue/mrpc/msr_paraphrase_train.txt", "mrpc")
    assert examples[0].parts[0] == (
        'Amrozi accused his brother, whom he called "the witness", of deliberately distorting his evidence.'
    )
    _, examples = load_examples(real_data / "korean/kornli/xnli.dev.ko.tsv", "kornli")
    assert examples[0].parts[0] == '그리고 그가 말했다, "엄마, 저 왔어요."'


def test_text_in_latin_1_is_read_as_such(real_data: Path) -> None:
    _, examples = load_examples(real_data / "transfer/trec6/TREC.train", "trec")
    assert any("ð" in example.parts[0] for example in examples)  # byte 0xf0, which is not UTF-8


def test_the_quoted_cells_of_a_csv_lose_their_quotation_marks_and_its_text_keeps_them(real_data: Path) -> None:
    _, examples = load_examples(real_data / "transfer/imdb_sample/imdb_sample.csv", "imdb")
    assert examples[0].parts[0].startswith("There is no relation at all between Fortier and Profiler")
    assert '"clairvoyance"' in examples[0].parts[0]
