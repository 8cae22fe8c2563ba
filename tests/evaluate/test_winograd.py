import re
from pathlib import Path

import pytest

from fastgpt.errors import UserError
from fastgpt.evaluate.winograd import read_winograd

SPACED = [
    "The  trophy doesn't fit because  [MASK]  is too small. ",
    "[MASK]",
    "The suitcase ,the trophy ",
    "The suitcase ",
]
ITEM = "\n".join([*SPACED, "", ""])


def written(folder: Path, text: str) -> Path:
    path = folder / "wsc.txt"
    path.write_text(text)
    return path


def test_a_schema_is_what_stands_around_the_gap_and_who_may_stand_in_it(tmp_path: Path) -> None:
    items = ITEM + "It ended.\t[MASK] was over.\n[MASK]\nA film,The play\nThe play\n"
    first, second = read_winograd(written(tmp_path, items))
    assert first.parts == ("The trophy doesn't fit because", "is too small.")
    assert first.choices == ("the suitcase", "the trophy")
    assert (first.target, first.place) == (0, f"{tmp_path / 'wsc.txt'}:1")
    assert second.parts == ("It ended.", "was over.")
    assert second.choices == ("A film", "The play")
    assert (second.target, second.place) == (1, f"{tmp_path / 'wsc.txt'}:6")


def test_names_keep_their_capitals(tmp_path: Path) -> None:
    (item,) = read_winograd(written(tmp_path, "He and [MASK] left.\n[MASK]\nTheo,Ann\nAnn\n"))
    assert item.choices == ("Theo", "Ann")


@pytest.mark.parametrize(
    ("line", "text", "told"),
    [
        (1, "No gap here.", "1: 0 times [MASK] in 'No gap here.'; a sentence has it once"),
        (1, "[MASK] and [MASK] ran.", "1: 2 times [MASK] in '[MASK] and [MASK] ran.'; a sentence has it once"),
        (1, "They saw [MASK]", "1: nothing follows [MASK], so that nothing can be scored"),
        (2, "it", "2: must be [MASK], not 'it'"),
        (3, "the trophy", "3: must be two referents with a comma between, not 'the trophy'"),
        (3, "a,b,c", "3: must be two referents with a comma between, not 'a,b,c'"),
        (3, "a,a", "3: must be two referents with a comma between, not 'a,a'"),
        (4, "The suitcas", "4: 'The suitcas' is not one of The suitcase, the trophy. Did you mean The suitcase?"),
        (5, "Next.", "5: must be blank, as a line is after each item, not 'Next.'"),
    ],
)
def test_what_is_wrong_is_told_with_its_line(tmp_path: Path, line: int, text: str, told: str) -> None:
    lines = ITEM.split("\n")
    lines[line - 1] = text
    path = written(tmp_path, "\n".join(lines))
    with pytest.raises(UserError, match=f"^{re.escape(f'{path}:{told}')}$"):
        read_winograd(path)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", ": the file is empty"),
        ("\n \n", ": the file is empty"),
        (ITEM + "Half an item with a [MASK] in it.\n[MASK]\n", ":8: the file ends within an item"),
    ],
)
def test_a_file_that_is_not_whole_is_told(tmp_path: Path, text: str, told: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(UserError, match=f"^{re.escape(f'{path}{told}')}"):
        read_winograd(path)


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    written(tmp_path, ITEM)
    with pytest.raises(UserError, match=r"no such file\. Did you mean wsc\.txt"):
        read_winograd(tmp_path / "wcs.txt")


def test_the_published_file_gives_its_273_schemas(real_data: Path) -> None:
    items = read_winograd(real_data / "zeroshot/winograd/wsc273.txt")
    assert len(items) == 273
    assert items[0].parts == (
        "The city councilmen refused the demonstrators a permit because",
        "feared violence.",
    )
    assert items[0].choices == ("the city councilmen", "the demonstrators")
    assert items[1].choices == ("the demonstrators", "the city councilmen")
    assert {item.target for item in items} == {0}  # this file names the right referent first
    assert {item.place.rpartition(":")[2] for item in items} == {str(line) for line in range(1, 1365, 5)}
    assert all("  " not in text and text == text.strip() for item in items for text in (*item.parts, *item.choices))
