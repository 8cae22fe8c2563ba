"""The published layouts of which no file is at hand, in files of a few rows."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from fastgpt.config import TableConfig
from fastgpt.errors import UserError
from fastgpt.tasks import DATA_SETS, Kind, load_examples


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def write_jsonl(path: Path, *rows: dict[str, Any]) -> Path:
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


NLI = {"gold_label": "neutral", "sentence1": "A man sleeps.", "sentence2": "He dreams.", "pairID": "1"}
PARSES = "sentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\tsentence2_parse"

# (data set, name of the file, its text, parts of the first example, targets)
TABLES = [
    (
        "stsb",
        "train.tsv",
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore\n"
        "0\tmain-captions\tMSRvid\t2012test\t0001\tnone\tnone\tA plane is taking off.\tAn air plane.\t5.000\n",
        ("A plane is taking off.", "An air plane."),
        [5.0],
    ),
    (
        "qqp",
        "train.tsv",
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n"
        '1\t3\t4\tWho is "Ann"?\tWho is Ann?\t1\n2\t5\t6\tWhy?\tHow?\t0\n',
        ('Who is "Ann"?', "Who is Ann?"),
        [1, 0],
    ),
    (
        "mnli",
        "dev_matched.tsv",
        f"index\tpromptID\tpairID\tgenre\t{PARSES}\tsentence1\tsentence2\tlabel1\tlabel2\tgold_label\n"
        "0\t1\t1e\tfiction\t()\t()\t()\t()\tThe new rights are nice.\tEveryone benefits.\tneutral\tneutral\tneutral\n"
        "1\t2\t2c\tfiction\t()\t()\t()\t()\tIt rains.\tIt is dry.\tentailment\tneutral\t-\n"
        "2\t3\t3c\tfiction\t()\t()\t()\t()\tIt rains.\tIt is dry.\tneutral\tneutral\tcontradiction\n",
        ("The new rights are nice.", "Everyone benefits."),
        [1, 2],
    ),
    (
        "qnli",
        "train.tsv",
        "index\tquestion\tsentence\tlabel\n0\tWhen was it built?\tIt was built in 1889.\tentailment\n"
        "1\tWho came?\tNobody knows.\tnot_entailment\n",
        ("When was it built?", "It was built in 1889."),
        [0, 1],
    ),
    (
        "snli",
        "snli_1.0_dev.txt",
        f"gold_label\t{PARSES}\tsentence1\tsentence2\tcaptionID\tpairID\tlabel1\tlabel2\tlabel3\tlabel4\tlabel5\n"
        "neutral\t()\t()\t()\t()\tTwo women embrace.\tThe sisters hug.\tc\tp\tneutral\tentailment\t\t\t\n"
        "-\t()\t()\t()\t()\tTwo women embrace.\tThey fight.\tc\tp\tneutral\tentailment\t\t\t\n"
        "entailment\t()\t()\t()\t()\tTwo women embrace.\tTwo women hold each other.\tc\tp\tentailment\t\t\t\t\n",
        ("Two women embrace.", "The sisters hug."),
        [1, 0],
    ),
    (
        "scitail",
        "scitail_1.0_train.tsv",
        "Pluto rotates once on its axis.\tPluto rotates.\tneutral\nA cell divides.\tCells divide.\tentails\n",
        ("Pluto rotates once on its axis.", "Pluto rotates."),
        [1, 0],
    ),
    (
        "sick",
        "SICK_train.txt",
        "pair_ID\tsentence_A\tsentence_B\trelatedness_score\tentailment_judgment\n"
        "1\tA boy plays.\tA child plays.\t4.5\tENTAILMENT\n2\tA boy plays.\tNobody plays.\t3.1\tCONTRADICTION\n",
        ("A boy plays.", "A child plays."),
        [0, 2],
    ),
    (
        "sick",
        "SICK.txt",
        "pair_ID\tsentence_A\tsentence_B\tentailment_label\trelatedness_score\tSemEval_set\n"
        "1\tA boy plays.\tA child runs.\tNEUTRAL\t4.5\tTRAIN\n",
        ("A boy plays.", "A child runs."),
        [1],
    ),
    (
        "storycloze",
        "cloze_test_val.csv",
        "InputStoryid,InputSentence1,InputSentence2,InputSentence3,InputSentence4,"
        "RandomFifthSentenceQuiz1,RandomFifthSentenceQuiz2,AnswerRightEnding\n"
        '138d5bfb,Rick grew up in a troubled household.,"He joined, alas, a gang.",He was shot.,He changed.,'
        "He is happy now.,He joined a gang.,1\n",
        ("Rick grew up in a troubled household. He joined, alas, a gang. He was shot. He changed.",),
        [0],
    ),
    (
        "agnews",
        "train.csv",
        '"3","Wall St. Bears Claw Back","Short-sellers, the ""band"" of cynics."\n"4","Stars","A new star."\n',
        ('Wall St. Bears Claw Back Short-sellers, the "band" of cynics.',),
        [2, 3],
    ),
    (
        "agnews",
        "test.csv",
        'Class Index,Title,Description\n1,Talks,"They talk, again."\n',
        ("Talks They talk, again.",),
        [0],
    ),
    ("imdb", "IMDB Dataset.csv", 'review,sentiment\n"Good,<br />good",positive\n', ("Good,<br />good",), [1]),
    ("trec", "train_5500.label", "ENTY:cremat What film is it ?\n", ("What film is it ?",), [2]),
    ("sst2", "train.tsv", 'sentence\tlabel\n"a "film \t1\n', ('"a "film',), [1]),
]


@pytest.mark.parametrize(("data", "name", "text", "parts", "targets"), TABLES, ids=[f"{t[0]}-{t[1]}" for t in TABLES])
def test_a_table_is_read_in_its_published_layout(
    tmp_path: Path, data: str, name: str, text: str, parts: tuple[str, ...], targets: list[int | float]
) -> None:
    for line_end in ("\n", "\r\n"):
        path = tmp_path / name
        path.write_bytes(text.replace("\n", line_end).encode())
        _, examples = load_examples(path, data)
        assert examples[0].parts == parts
        assert [example.target for example in examples] == targets


@pytest.mark.parametrize("data", ["snli", "mnli"])
def test_the_json_lines_of_snli_and_multinli_are_read(tmp_path: Path, data: str) -> None:
    path = write_jsonl(tmp_path / "dev.jsonl", NLI, NLI | {"gold_label": "-"}, NLI | {"gold_label": "contradiction"})
    _, examples = load_examples(path, data)
    assert [(e.parts, e.target, e.place) for e in examples] == [
        (("A man sleeps.", "He dreams."), 1, f"{path}:1"),
        (("A man sleeps.", "He dreams."), 2, f"{path}:3"),
    ]


def test_scitail_in_the_form_of_snli_is_read(tmp_path: Path) -> None:
    _, examples = load_examples(
        write_jsonl(tmp_path / "scitail_1.0_dev.txt", NLI | {"gold_label": "entailment"}), "scitail"
    )
    assert examples[0].target == 0


@pytest.mark.parametrize(
    ("data", "text", "parts"),
    [
        ("cola", "index\tsentence\n0\tBill whistled past the house.\n", ("Bill whistled past the house.",)),
        ("cola", "gj04\t1\t\tFred watered the plants.\n", ("Fred watered the plants.",)),
        ("sst2", "index\tsentence\n0\tuneasy mishmash of styles .\n", ("uneasy mishmash of styles .",)),
        ("rte", "index\tsentence1\tsentence2\n0\tMr. A came.\tA came.\n", ("Mr. A came.", "A came.")),
        ("mrpc", "index\t#1 ID\t#2 ID\t#1 String\t#2 String\n0\t1\t2\tOne.\tTwo.\n", ("One.", "Two.")),
    ],
)
def test_data_to_predict_needs_no_labels(tmp_path: Path, data: str, text: str, parts: tuple[str, ...]) -> None:
    _, examples = load_examples(write(tmp_path / "test.tsv", text), data, labelled=False)
    assert (examples[0].parts, examples[0].target) == (parts, None)


def test_glues_test_file_is_refused_where_labels_are_needed(tmp_path: Path) -> None:
    path = write(tmp_path / "test.tsv", "index\tsentence\n0\tBill whistled.\n")
    with pytest.raises(UserError, match=r"test.tsv: no column of labels|test.tsv:1: 2 columns; allowed: 4"):
        load_examples(path, "cola")


def test_race_gives_an_example_for_each_question_with_its_passage(tmp_path: Path) -> None:
    passage = {
        "article": "Tom went to sea.\nHe came back.",
        "questions": ["Where did Tom go?", "Tom _ ."],
        "options": [["sea", "sky", "home", "bed"], ["slept", "stayed", "came back", "ran"]],
        "answers": ["A", "C"],
        "id": "high1.txt",
    }
    for name in ("dev/high/1.txt", "dev/middle/2.txt"):
        write(tmp_path / name, json.dumps(passage))
    task, examples = load_examples(tmp_path / "dev", "race")
    assert (task.kind, task.choices, len(examples)) == (Kind.CHOICE, 4, 4)
    assert examples[1].parts == ("Tom went to sea.\nHe came back.", "Tom _ .")
    assert examples[1].choices == ("slept", "stayed", "came back", "ran")
    assert [example.target for example in examples] == [0, 2, 0, 2]
    assert len(load_examples(tmp_path / "dev" / "high" / "1.txt", "race", labelled=False)[1]) == 2


def test_copa_is_read_from_xml_and_from_the_json_lines_of_superglue_alike(tmp_path: Path) -> None:
    xml = write(
        tmp_path / "copa.xml",
        '<?xml version="1.0" encoding="UTF-8"?>\n<!DOCTYPE copa-corpus SYSTEM "copa.dtd">\n<copa-corpus version="1.0">'
        '<item id="1" asks-for="cause" most-plausible-alternative="2">'
        "<p>It rained.</p><a1>One.</a1><a2>Two.</a2></item>"
        '<item id="2" asks-for="effect" most-plausible-alternative="1"><p>He ran.</p><a1>One.</a1><a2>Two.</a2></item>'
        "</copa-corpus>",
    )
    row = {"premise": "It rained.", "choice1": "One.", "choice2": "Two.", "question": "cause", "label": 1, "idx": 0}
    lines = write_jsonl(tmp_path / "val.jsonl", row, row | {"premise": "He ran.", "question": "effect", "label": 0})
    from_xml, from_lines = (load_examples(path, "copa")[1] for path in (xml, lines))
    assert [e[:3] for e in from_xml] == [e[:3] for e in from_lines]
    assert from_xml[0][:3] == (("It rained.", "What was the CAUSE of this?"), ("One.", "Two."), 1)
    assert from_xml[1][:3] == (("He ran.", "What happened as a RESULT?"), ("One.", "Two."), 0)


@pytest.mark.parametrize("encoding", ["utf-16", "euc-kr", "nonsense"])
def test_xml_is_read_as_utf_8_whatever_encoding_it_claims(tmp_path: Path, encoding: str) -> None:
    item = '<item asks-for="cause" most-plausible-alternative="2"><p>Ça va.</p><a1>One.</a1><a2>Two.</a2></item>'
    xml = f'<?xml version="1.0" encoding="{encoding}"?><copa-corpus>{item}</copa-corpus>'
    _, examples = load_examples(write(tmp_path / "copa.xml", xml), "copa")
    assert (examples[0].parts[0], examples[0].place) == ("Ça va.", f"{tmp_path / 'copa.xml'}: item number 1")


def test_hellaswag_is_read_from_json_lines_and_from_lines_alike(tmp_path: Path) -> None:
    endings = ["is here.", "is there.", "runs.", "sits."]
    row = {"ind": 4, "activity_label": "Roof", "ctx_a": "A man.", "ctx": "A man. he", "endings": endings, "label": 3}
    lines = write(tmp_path / "val.txt", "\n".join(["Roof: A man. he", "3", *endings]) + "\n")
    for path in (write_jsonl(tmp_path / "val.jsonl", row), lines):
        _, examples = load_examples(path, "hellaswag")
        assert examples[0][:3] == (("Roof: A man. he",), tuple(endings), 3)


def test_imdb_is_read_from_its_folders(tmp_path: Path) -> None:
    for name, text in {
        "neg/0_2.txt": "Bad.",
        "pos/0_9.txt": "Good.\n",
        "pos/1_9.txt": "Fine.",
        "unsup/0.txt": "?",
    }.items():
        write(tmp_path / name, text)
    _, examples = load_examples(tmp_path, "imdb")
    assert [(e.parts[0], e.target) for e in examples] == [("Bad.", 0), ("Good.", 1), ("Fine.", 1)]
    _, examples = load_examples(tmp_path / "unsup", "imdb", labelled=False)
    assert [(e.parts[0], e.target) for e in examples] == [("?", None)]


def test_a_users_csv_is_read_by_its_columns_and_a_map_of_its_labels(tmp_path: Path) -> None:
    table = TableConfig.model_validate(
        yaml.safe_load("""
            kind: classification
            format: csv
            text: [[title, body]]
            label: stars
            labels: {1: bad, 2: bad, 5: good}
            skip: [3]
        """)
    )
    text = 'id,title,body,stars\n1,Fine,"it\nworks",5\n2,No,never,2\n3,So,so,3\n4,Awful,truly,1\n'
    path = write(tmp_path / "own.csv", text)
    task, examples = load_examples(path, table)
    assert task.labels == ("bad", "good") and task.metrics == ("accuracy",) and task.outputs == 2
    assert [(e.parts[0], e.target, e.place) for e in examples] == [
        ("Fine it\nworks", 1, f"{path}:2"),
        ("No never", 0, f"{path}:4"),
        ("Awful truly", 0, f"{path}:6"),
    ]


def test_a_users_json_lines_with_a_list_of_choices_are_read(tmp_path: Path) -> None:
    table = TableConfig(
        kind="choice",
        format="jsonl",
        text=["q"],
        choices=["answers"],
        n_choices=3,
        label="best",
        labels=["a", "b", "c"],
    )
    path = write_jsonl(tmp_path / "own.jsonl", {"q": "Which?", "answers": ["x", "y", "z"], "best": "c"})
    task, examples = load_examples(path, table)
    assert (task.choices, task.sequences, task.outputs, task.labels) == (3, 3, 1, ())
    assert examples[0][:3] == (("Which?",), ("x", "y", "z"), 2)


def test_labels_that_yaml_takes_for_numbers_are_the_texts_of_the_file(tmp_path: Path) -> None:
    table = TableConfig(kind="classification", format="csv", text=["text"], label="label", labels=[0, 1])
    task, examples = load_examples(write(tmp_path / "own.csv", "text,label\nfine,1\nbad,0\n"), table)
    assert (task.labels, [example.target for example in examples]) == (("0", "1"), [1, 0])


def test_a_users_scores_without_a_header_are_read(tmp_path: Path) -> None:
    table = TableConfig(kind="similarity", format="tsv", header=False, text=[2, 3], label=1, score=[-1.0, 1.0])
    task, examples = load_examples(write(tmp_path / "own.tsv", "0.5\tone\ttwo\n-1\tthree\tfour\n"), table)
    assert (task.sequences, task.outputs, task.metrics) == (2, 1, ("pearson", "spearman"))
    assert [(e.parts, e.target) for e in examples] == [(("one", "two"), 0.5), (("three", "four"), -1.0)]


def test_blank_lines_and_a_byte_order_mark_are_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "train.tsv"
    path.write_bytes(b"\xef\xbb\xbfsentence\tlabel\r\n\r\ngood\t1\r\n\r\n")
    _, examples = load_examples(path, "sst2")
    assert [(e.parts, e.place) for e in examples] == [(("good",), f"{path}:3")]


def test_a_separator_of_unicode_does_not_end_a_line(tmp_path: Path) -> None:
    _, examples = load_examples(write(tmp_path / "t.tsv", "sentence\tlabel\none\u2028two\x0bthree\x85\t0\n"), "sst2")
    assert examples[0].parts == ("one\u2028two\x0bthree",)


def test_the_tasks_of_glue_are_scored_as_glue_scores_them() -> None:
    metrics = {name: DATA_SETS[name].task.metrics for name in ("cola", "mrpc", "stsb", "qqp", "sst2", "rte")}
    assert metrics == {
        "cola": ("matthews", "accuracy"),
        "mrpc": ("f1", "accuracy"),
        "stsb": ("pearson", "spearman"),
        "qqp": ("f1", "accuracy"),
        "sst2": ("accuracy",),
        "rte": ("accuracy",),
    }
