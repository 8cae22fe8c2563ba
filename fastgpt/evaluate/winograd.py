"""Winograd schemas: a sentence with a gap, and the two that it may speak of.

WSC273 (Levesque et al. 2012) in the form of Kocijan et al. 2019, five lines an item:

    The trophy doesn't fit into the suitcase because [MASK] is too small.
    [MASK]
    the suitcase,the trophy
    the suitcase
    (blank)
"""

import re
from pathlib import Path

from fastgpt.errors import UserError, did_you_mean
from fastgpt.tasks import Example
from fastgpt.tasks.rows import read_text
from fastgpt.tasks.table import shown

GAP = "[MASK]"
LINES = 5
REFERENTS = 2

# begin a referent in the file whether or not a sentence begins there
CAPITALISED = re.compile(r"^(?:The|An?|My|Your|His|Her|Its|Our|Their)\b")
SENTENCE_ENDS = (".", "!", "?")


def read_winograd(path: Path) -> list[Example]:
    """The schemas of a file: parts are what stands before and after the gap, choices who may stand in it.

    Runs of white space become one space, and a referent begins with a capital article or possessive only where a
    sentence begins. The file does not tell where a possessive stood ("he moved his bishop"): there too a referent is
    substituted as it is.

    Raises:
        UserError: one line for what cannot be read: file and line, what is wrong, what is allowed.
    """
    lines = read_text(path).split("\n")
    while lines and not lines[-1].strip():
        lines.pop()
    if not lines:
        raise UserError(f"{path}: the file is empty")
    return [schema(lines[start : start + LINES], path, start + 1) for start in range(0, len(lines), LINES)]


def schema(lines: list[str], path: Path, first: int) -> Example:
    """The schema whose lines begin at number `first`."""
    lines = [" ".join(line.split()) for line in lines]
    if len(lines) < LINES - 1:
        raise UserError(
            f"{path}:{first + len(lines)}: the file ends within an item; it has a sentence, {GAP}, two referents and "
            "the right one"
        )
    sentence, gap, referents, answer, *blank = lines
    before, *others = sentence.split(GAP)
    if len(others) != 1:
        raise UserError(f"{path}:{first}: {len(others)} times {GAP} in {shown(sentence)}; a sentence has it once")
    after = others[0].strip()
    if not after:
        raise UserError(f"{path}:{first}: nothing follows {GAP}, so that nothing can be scored")
    if gap != GAP:
        raise UserError(f"{path}:{first + 1}: must be {GAP}, not {shown(gap)}")
    choices = [choice.strip() for choice in referents.split(",")]
    if len(choices) != REFERENTS or not all(choices) or len(set(choices)) < REFERENTS:
        raise UserError(f"{path}:{first + 2}: must be two referents with a comma between, not {shown(referents)}")
    if answer not in choices:
        near = did_you_mean(answer, choices)
        raise UserError(f"{path}:{first + 3}: {shown(answer)} is not one of {', '.join(choices)}.{near}")
    if any(blank):
        raise UserError(f"{path}:{first + 4}: must be blank, as a line is after each item, not {shown(blank[0])}")
    before = before.strip()
    written = tuple(in_place(choice, before) for choice in choices)
    return Example((before, after), written, choices.index(answer), f"{path}:{first}")


def in_place(referent: str, before: str) -> str:
    """A referent as it is written after a text."""
    begins = not before or before.endswith(SENTENCE_ENDS)
    return referent if begins else CAPITALISED.sub(lambda word: word[0].lower(), referent)
