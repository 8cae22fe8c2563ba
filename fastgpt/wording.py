"""Mistakes in settings, in the user's words: where, what is allowed, and the nearest right spelling."""

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from fastgpt.config import Config
from fastgpt.errors import did_you_mean

Key = tuple[str, ...]


def known_settings() -> list[str]:
    """Every setting, in dotted form, in the order of the documentation."""
    return list(_leaves(Config, ()))


def _leaves(model: type[BaseModel], prefix: Key) -> Iterator[str]:
    for name, field in model.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from _leaves(inner, (*prefix, name))
        else:
            yield ".".join((*prefix, name))


def line_of(error: ErrorDetails, places: dict[Key, str], path: str) -> str:
    """One pydantic error in the user's words."""
    key: Key = tuple(str(part) for part in error["loc"])
    context = error.get("ctx", {})
    if error["type"] == "broken_setting":
        key += tuple(context["key"].split("."))
    # keys that pydantic adds for the members of a union are not the user's
    while (
        key and not _is_setting(key) and places.get(key) is None and error["type"] not in ("extra_forbidden", "missing")
    ):
        key = key[:-1]
    where = next((places[key[:n]] for n in range(len(key), 0, -1) if key[:n] in places), path)
    name = ".".join(key)
    match error["type"]:
        case "extra_forbidden":
            return f"{where}: {_unknown(key)}"
        case "missing":
            return f"{path}: {name} is missing; it must be {expected(key)}"
        case "broken_setting":
            return f"{where}: {name} {context['message']}"
        case _:
            value = error["input"]
            near = did_you_mean(value, _literals(key)) if isinstance(value, str) else ""
            if isinstance(value, int | float) and not isinstance(value, bool) and expected(key).startswith("text"):
                near = f" Write '{value}' in quotes if it is a name."
            return f"{where}: {name} must be {expected(key)}, not {_shown(value)}.{near}"


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _unknown(key: Key) -> str:
    """What is wrong with a key of the file that is no setting, and what may be meant."""
    written = key[-1]
    if "." not in written:
        return f"{'.'.join(key)} is not a setting.{_nearest('.'.join(key))}"
    # on the command line a dot is between section and setting, in a file it is a letter like others
    if written in known_settings():
        section, _, name = written.rpartition(".")
        return f"{written} is written in its section here: '{name}:', indented, under '{section}:'"
    return f"{written} is not a setting.{_nearest(written)}"


def _nearest(name: str) -> str:
    known = known_settings()
    section, _, last = name.rpartition(".")
    # a slip in the last word is likelier than one in the section, a setting in the wrong section likelier than both
    same_section = [k for k in known if k.rpartition(".")[0] == section]
    elsewhere = [k for k in known if k.rpartition(".")[2] == last]
    if elsewhere:
        return f" Did you mean {elsewhere[0]}?"
    return did_you_mean(name, same_section) or did_you_mean(name, known)


def _field(key: Key) -> Any:
    """The pydantic field at `key`, or None."""
    model: Any = Config
    field = None
    for part in key:
        if not (isinstance(model, type) and issubclass(model, BaseModel)) or part not in model.model_fields:
            return None
        field = model.model_fields[part]
        model = field.annotation
    return field


def _is_setting(key: Key) -> bool:
    return _field(key) is not None


def _literals(key: Key) -> list[str]:
    field = _field(key)
    return [str(a) for a in get_args(field.annotation)] if field and get_origin(field.annotation) is Literal else []


def expected(key: Key) -> str:
    """What the setting at `key` must be, in words."""
    field = _field(key)
    return _describe(field.annotation, field.metadata) if field else "a setting"


def _describe(kind: Any, limits: Sequence[Any]) -> str:
    arguments = get_args(kind)
    if get_origin(kind) is Annotated:
        return _describe(arguments[0], [m for a in arguments[1:] for m in getattr(a, "metadata", [a])])
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(str(a) for a in arguments)
    if arguments and type(None) in arguments:
        inner = next(a for a in arguments if a is not type(None))
        return _describe(inner, limits) + " or null"
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return "a group of settings: " + ", ".join(kind.model_fields)
    pattern = next((p for m in limits if (p := getattr(m, "pattern", None))), None)
    if pattern:
        return "one of auto, cpu, cuda, cuda:N"
    if kind is str and any(getattr(m, "min_length", None) for m in limits):
        return "text, not empty"
    words = {int: "an integer", float: "a number", str: "text", bool: "true or false"}[kind]
    for attribute, phrase in (("ge", "at least"), ("gt", "above"), ("le", "at most"), ("lt", "below")):
        values = [v for m in limits if (v := getattr(m, attribute, None)) is not None]
        if values:
            joint = " of " if words in ("an integer", "a number") and phrase.startswith("at") else " "
            words += f"{joint if words.count(' ') == 1 else ' and '}{phrase} {values[0]}"
    return words
