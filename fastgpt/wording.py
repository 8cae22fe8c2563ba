"""Mistakes in settings, in the user's words: where, what is allowed, and the nearest right spelling."""

from collections.abc import Mapping
from typing import Any

from pydantic_core import ErrorDetails

from fastgpt.errors import did_you_mean
from fastgpt.schema import Key, Schema


class Places:
    """Where each setting was written."""

    def __init__(self, path: str = "", lines: Mapping[Key, str] | None = None) -> None:
        """Name the file, and "file:line" or "command line" of every key."""
        self.path = path
        self._lines = lines or {}

    def of(self, key: Key) -> str:
        """The place of a key; else of the first one in it, of the nearest section around it, or the file."""
        within = (known for known in self._lines if known[: len(key)] == key)
        around = (key[:length] for length in range(len(key) - 1, 0, -1))
        return next((self._lines[known] for known in (key, *within, *around) if known in self._lines), self.path)

    def under(self, section: Key) -> dict[Key, str]:
        """The places of what is in a section, by the keys within it; () where the section itself stands."""
        return {key[len(section) :]: place for key, place in self._lines.items() if key[: len(section)] == section}

    def __contains__(self, key: Key) -> bool:
        return key in self._lines


def line_of(error: ErrorDetails, places: Places, schema: Schema) -> str:
    """One pydantic error in the user's words."""
    key: Key = tuple(str(part) for part in error["loc"])
    context = error.get("ctx", {})
    if error["type"] == "broken_setting":
        key += tuple(context["key"].split("."))
    # keys that pydantic adds for the members of a union are not the user's
    while (
        key and schema.field(key) is None and key not in places and error["type"] not in ("extra_forbidden", "missing")
    ):
        key = key[:-1]
    where = places.of(key)
    name = ".".join(key)
    match error["type"]:
        case "extra_forbidden":
            return f"{where}: {_unknown(key, schema)}"
        case "missing":
            return f"{places.path}: {name} is missing; it must be {schema.expected(key)}"
        case "broken_setting":
            return f"{where}: {name} {context['message']}"
        case _:
            value = error["input"]
            near = did_you_mean(value, schema.literals(key)) if isinstance(value, str) else ""
            if (
                isinstance(value, int | float)
                and not isinstance(value, bool)
                and schema.expected(key).startswith("text")
            ):
                near = f" Write '{value}' in quotes if it is a name."
            return f"{where}: {name} must be {schema.expected(key)}, not {_shown(value)}.{near}"


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _unknown(key: Key, schema: Schema) -> str:
    """What is wrong with a key of the file that is no setting, and what may be meant."""
    written = key[-1]
    if "." not in written:
        return f"{'.'.join(key)} is not a setting.{schema.nearest('.'.join(key))}"
    # on the command line a dot is between section and setting, in a file it is a letter like others
    if written in schema.known():
        section, _, name = written.rpartition(".")
        return f"{written} is written in its section here: '{name}:', indented, under '{section}:'"
    return f"{written} is not a setting.{schema.nearest(written)}"
