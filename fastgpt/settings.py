"""Settings from a YAML file and `key.sub=value` words, with errors that name the line (`fastgpt.wording`)."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from fastgpt.config import Config, Section
from fastgpt.errors import UserError, did_you_mean
from fastgpt.schema import Key, Schema
from fastgpt.wording import Places, line_of

C = TypeVar("C", bound=Section)


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, reading `3e-4` as the number it is in YAML 1.2 (YAML 1.1 takes it for text)."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """The settings of a training run, from a YAML file and words `key.sub=value`: see `read_settings`."""
    return read_settings(Config, path, overrides)[0]


def read_settings(kind: type[C], path: str | Path, overrides: Iterable[str] = ()) -> tuple[C, Places]:
    """The settings of a kind of run, and where each was written, for what can be checked only later.

    Args:
        kind: `Config`, or another root of settings.
        path: a YAML file.
        overrides: words `key.sub=value`; a value that is not text is read as YAML.

    Raises:
        UserError: one line for every mistake, with file and line (or "command line"), what is allowed, and the
            nearest right spelling.
    """
    schema = Schema(kind)
    tree, lines = _read_file(Path(path))
    for word in overrides:
        _override(tree, lines, word, schema)
    places = Places(str(path), lines)
    return validated(kind, tree, places), places


def validated(kind: type[C], tree: dict[str, Any], places: Places) -> C:
    """The settings of a kind of run from a tree whose keys were written at `places`.

    Raises:
        UserError: as for `read_settings`.
    """
    try:
        return kind.model_validate(tree)
    except ValidationError as problem:
        schema = Schema(kind)
        found = dict.fromkeys(line_of(error, places, schema) for error in problem.errors())
        raise UserError("\n".join(found)) from None


def dump_config(config: Section) -> str:
    """The settings as YAML that `load_config` reads back."""
    return yaml.safe_dump(config.model_dump(), sort_keys=False, allow_unicode=True)


def known_settings() -> list[str]:
    """Every setting of `fastgpt train`, in dotted form, in the order of the documentation."""
    return Schema(Config).known()


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


def _override(tree: dict[str, Any], places: dict[Key, str], word: str, schema: Schema) -> None:
    dotted, equals, text = word.partition("=")
    if not equals:
        near = did_you_mean(word, schema.known())
        raise UserError(f"command line: '{word}' is not a setting of the form key.sub=value.{near}")
    if dotted not in schema.known() and not dotted.startswith(tuple(f"{group}." for group in schema.open_groups())):
        raise UserError(f"command line: {dotted} is not a setting.{did_you_mean(dotted, schema.known())}")
    *sections, name = key = _key(dotted, tree)
    value = _value(key, text, schema)
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


def _key(dotted: str, tree: Any) -> Key:
    """The parts of a dotted name; what is in the file under a name that has dots itself is one of them."""
    known = tree if isinstance(tree, dict) else {}
    names = [name for name in known if isinstance(name, str) and f"{dotted}.".startswith(f"{name}.")]
    part = max(names, key=len, default=dotted.partition(".")[0])
    return (part,) if part == dotted else (part, *_key(dotted[len(part) + 1 :], known.get(part)))


def _value(key: Key, text: str, schema: Schema) -> Any:
    """A word's value as YAML; a text setting takes the word as it stands, so that a prompt needs no second quotes."""
    if schema.expected(key).startswith("text") and not text.startswith(("'", '"')):
        return None if text == "null" and schema.expected(key).endswith("or null") else text
    try:
        return yaml.load(text, Loader=_Loader) if text else ""
    except (yaml.YAMLError, ValueError, AttributeError, KeyError, TypeError):
        raise UserError(f"command line: {'.'.join(key)} cannot be read from '{text}'") from None
