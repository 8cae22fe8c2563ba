"""What settings there are, and what each must be, in words."""

from collections.abc import Iterator, Sequence
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from fastgpt.errors import did_you_mean

Key = tuple[str, ...]

OPEN = "a group of keys and values"


class Schema:
    """The settings of one kind of run."""

    def __init__(self, root: type[BaseModel]) -> None:
        self.root = root

    def known(self) -> list[str]:
        """Every setting, in dotted form, in the order of the documentation."""
        return list(_leaves(self.root, ()))

    def open_groups(self) -> list[str]:
        """The settings that are groups of keys which are not listed here, in dotted form."""
        return [name for name in self.known() if self.expected(tuple(name.split("."))).startswith(OPEN)]

    def field(self, key: Key) -> Any:
        """The pydantic field at `key`, or None."""
        model: Any = self.root
        field = None
        for part in key:
            model = _section(model)
            if model is None or part not in model.model_fields:
                return None
            field = model.model_fields[part]
            model = field.annotation
        return field

    def literals(self, key: Key) -> list[str]:
        """The words that the setting at `key` may be, where it is one of a few."""
        field = self.field(key)
        return [str(a) for a in get_args(field.annotation)] if field and get_origin(field.annotation) is Literal else []

    def expected(self, key: Key) -> str:
        """What the setting at `key` must be, in words."""
        field = self.field(key)
        if field:
            return describe(field.annotation, field.metadata)
        group = self.field(key[:-1])  # of keys that the user names
        values = get_args(group.annotation)[1:] if group and get_origin(group.annotation) is dict else ()
        return "a setting" if values in ((), (Any,)) else describe(values[0], ())

    def nearest(self, name: str) -> str:
        """A question after the setting that is meant by one that is not there; empty where none comes near."""
        known = self.known()
        section, _, last = name.rpartition(".")
        # a slip in the last word is likelier than one in the section, a setting in the wrong section likelier than both
        same_section = [k for k in known if k.rpartition(".")[0] == section]
        elsewhere = [k for k in known if k.rpartition(".")[2] == last]
        if elsewhere:
            return f" Did you mean {elsewhere[0]}?"
        return did_you_mean(name, same_section) or did_you_mean(name, known)


def _section(kind: Any) -> type[BaseModel] | None:
    """The group of settings that an annotation stands for, also where it may be null."""
    return next((a for a in (kind, *get_args(kind)) if isinstance(a, type) and issubclass(a, BaseModel)), None)


def _leaves(model: type[BaseModel], prefix: Key) -> Iterator[str]:
    for name, field in model.model_fields.items():
        inner = _section(field.annotation)
        if inner is not field.annotation:  # a single setting, or a group that may be null
            yield ".".join((*prefix, name))
        if inner is not None:
            yield from _leaves(inner, (*prefix, name))


def describe(kind: Any, limits: Sequence[Any]) -> str:
    """What an annotation with its limits allows, in words."""
    arguments = get_args(kind)
    if get_origin(kind) is Annotated:
        return describe(arguments[0], [m for a in arguments[1:] for m in getattr(a, "metadata", [a])])
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(str(a) for a in arguments)
    if get_origin(kind) in (Union, UnionType):
        members = [describe(a, limits) for a in arguments if a is not type(None)]
        return " or ".join([*dict.fromkeys(members), *(["null"] if type(None) in arguments else [])])
    not_empty = ", not empty" if any(getattr(m, "min_length", None) for m in limits) else ""
    if get_origin(kind) is dict:
        return OPEN + not_empty
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return "a group of settings: " + ", ".join(kind.model_fields)
    pattern = next((p for m in limits if (p := getattr(m, "pattern", None))), None)
    if pattern:
        return "one of auto, cpu, cuda, cuda:N"
    if get_origin(kind) is list:
        return "a list" + not_empty
    if kind is str and not_empty:
        return "text" + not_empty
    words = {int: "an integer", float: "a number", str: "text", bool: "true or false"}[kind]
    for attribute, phrase in (("ge", "at least"), ("gt", "above"), ("le", "at most"), ("lt", "below")):
        values = [v for m in limits if (v := getattr(m, attribute, None)) is not None]
        if values:
            joint = " of " if words in ("an integer", "a number") and phrase.startswith("at") else " "
            words += f"{joint if words.count(' ') == 1 else ' and '}{phrase} {values[0]}"
    return words
