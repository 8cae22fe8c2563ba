"""Settings from a YAML file and `key.sub=value` words, with errors that name the line and the right spelling."""

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from fastgpt.config import Config
from fastgpt.errors import UserError, did_you_mean

Key = tuple[str, ...]


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, reading `3e-4` as the number it is in YAML 1.2 (YAML 1.1 takes it for text)."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """The settings of a run.

    Args:
        path: a YAML file.
        overrides: words `key.sub=value`; a value that is not text is read as YAML.

    Raises:
        UserError: one line for every mistake, with file and line (or "command line"), what is allowed, and the
            nearest right spelling.
    """
    tree, places = _read_file(Path(path))
    for word in overrides:
        _override(tree, places, word)
    try:
        return Config.model_validate(tree)
    except ValidationError as problem:
        lines = dict.fromkeys(_line(error, places, str(path)) for error in problem.errors())
        raise UserError("\n".join(lines)) from None


def dump_config(config: Config) -> str:
    """The settings as YAML that `load_config` reads back."""
    return yaml.safe_dump(config.model_dump(), sort_keys=False, allow_unicode=True)


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


def _read_file(path: Path) -> tuple[dict[str, Any], dict[Key, str]]:
    """The file's tree, and where each key stands ("file:line")."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        folder = path.parent if path.parent.is_dir() else Path()
        near = did_you_mean(str(path), (str(p) for p in [*folder.glob("*.yaml"), *Path("configs").glob("*.yaml")]))
        raise UserError(f"{path}: no such file.{near}") from None
    except UnicodeDecodeError as problem:
        raise UserError(f"{path}: not UTF-8 text (byte {problem.start})") from None
    except OSError as problem:
        raise UserError(f"{path}: cannot be read: {problem.strerror}") from None
    try:
        root = yaml.compose(text, Loader=_Loader)
        places: dict[Key, str] = {}
        if root is None:
            raise UserError(f"{path}: the file is empty; it must hold settings such as 'out: runs/name'")
        if not isinstance(root, yaml.MappingNode):
            raise UserError(f"{path}:{root.start_mark.line + 1}: the file must hold 'key: value' settings")
        _places(root, (), path, places)
        tree = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as problem:
        mark = getattr(problem, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        reason = getattr(problem, "problem", None) or str(problem).splitlines()[0]
        raise UserError(f"{where}: not valid YAML: {reason}") from None
    except UserError:
        raise
    except (ValueError, AttributeError, KeyError, TypeError) as problem:
        # what PyYAML's constructors raise for a value that does not fit its tag
        raise UserError(f"{path}: not valid YAML: {problem}") from None
    except RecursionError:
        raise UserError(f"{path}: nested too deeply to be settings") from None
    return tree, places


def _places(node: yaml.MappingNode, prefix: Key, path: Path, places: dict[Key, str]) -> None:
    for key_node, value_node in node.value:
        where = f"{path}:{key_node.start_mark.line + 1}"
        if not isinstance(key_node, yaml.ScalarNode):
            raise UserError(f"{where}: a setting's name must be a word")
        if key_node.tag == "tag:yaml.org,2002:merge":
            raise UserError(f"{where}: YAML merge keys are not read here; write the settings out")
        key = (*prefix, key_node.value)
        if key in places:
            raise UserError(f"{where}: {'.'.join(key)} is set twice (first at {places[key]})")
        places[key] = where
        if isinstance(value_node, yaml.MappingNode):
            _places(value_node, key, path, places)


def _override(tree: dict[str, Any], places: dict[Key, str], word: str) -> None:
    dotted, equals, text = word.partition("=")
    if not equals:
        near = did_you_mean(word, known_settings())
        raise UserError(f"command line: '{word}' is not a setting of the form key.sub=value.{near}")
    if dotted not in known_settings():
        raise UserError(f"command line: {dotted} is not a setting.{did_you_mean(dotted, known_settings())}")
    *sections, name = key = tuple(dotted.split("."))
    value = _value(key, text)
    for section in sections:
        inner = tree.get(section)
        if not isinstance(inner, dict):
            # a section that is missing or empty in the file; anything else there stays for the validation to report
            if inner is not None:
                return
            inner = tree[section] = {}
        tree = inner
    tree[name] = value
    places[key] = "command line"


def _value(key: Key, text: str) -> Any:
    """A word's value as YAML; a text setting takes the word as it stands, so that a prompt needs no second quotes."""
    if expected(key).startswith("text") and not text.startswith(("'", '"')):
        return None if text == "null" and expected(key).endswith("or null") else text
    try:
        return yaml.load(text, Loader=_Loader) if text else ""
    except (yaml.YAMLError, ValueError, AttributeError, KeyError, TypeError):
        raise UserError(f"command line: {'.'.join(key)} cannot be read from '{text}'") from None


def _line(error: ErrorDetails, places: dict[Key, str], path: str) -> str:
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
