"""Which keys of its configuration the installed DeepSpeed knows, found out by letting it read them.

DeepSpeed keeps no list of them: it looks some up one by one, and passes over others in silence; whole sections it hands
to models that refuse what they do not know. So it is given a configuration that remembers what it was asked for.
"""

from collections.abc import Callable, Iterator, KeysView, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from fastgpt.deepspeed_keys import owner
from fastgpt.engine.deepspeed_settings import with_further_keys
from fastgpt.errors import UserError, did_you_mean

Key = tuple[str, ...]
SECTION = ("engine", "deepspeed")


class Asked(dict[str, Any]):
    """A nested dictionary that remembers which keys it was asked for, and which section was last read as a whole."""

    def __init__(self, values: Mapping[str, Any], key: Key = (), root: "Asked | None" = None) -> None:
        self.root: Asked = self if root is None else root
        self.key = key
        self.asked: set[str] = set()
        self.whole = False  # handed on: whoever has it checks its keys
        self.last_whole: Key = ()
        super().__init__(
            {k: Asked(v, (*key, k), self.root) if isinstance(v, Mapping) else v for k, v in values.items()}
        )

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key."""
        self.asked.add(key)
        return super().get(key, default)

    def __iter__(self) -> Iterator[str]:
        self.whole, self.root.last_whole = True, self.key
        return super().__iter__()

    def keys(self) -> KeysView[str]:  # type: ignore[override]
        """The keys, which remember too."""
        return KeysView(self)

    def __copy__(self) -> "Asked":
        return self

    def __deepcopy__(self, memo: Any) -> "Asked":
        return self


def check_further_keys(
    ours: Mapping[str, Any],
    further: Mapping[str, Any],
    parse: Callable[[dict[str, Any]], object],
    place: Callable[[Key], str],
) -> None:
    """Refuse a user's keys that DeepSpeed does not know, or whose values it does not take.

    Args:
        ours: the configuration without them, for one rank.
        further: the user's keys.
        parse: DeepSpeed's class of a configuration.
        place: "file:line" of a setting, by its name in parts.

    Raises:
        UserError: one line, with the place, and the nearest right spelling.
    """
    asked = Asked(with_further_keys(ours, further))
    try:
        parse(asked)
    except ValidationError as problem:
        raise _refused(problem, _section(problem, asked, further), place) from None
    # anything at all: DeepSpeed's older sections meet a value that they cannot use in many ways
    except Exception as problem:
        key = _culprit(ours, further, parse)
        reason = str(problem).strip().partition("\n")[0] or type(problem).__name__
        raise _told(place, key, f"is refused by DeepSpeed: {reason}") from None
    for key, known in _unread(further, asked):
        raise _told(place, key, f"is not a key of DeepSpeed's.{_nearest(key, known)}")


def _culprit(ours: Mapping[str, Any], further: Mapping[str, Any], parse: Callable[[dict[str, Any]], object]) -> Key:
    """The key without which DeepSpeed takes the others; none, where there are several."""
    for name in further:
        others = {key: value for key, value in further.items() if key != name}
        try:
            parse(with_further_keys(ours, others))
        except Exception:
            continue
        return (name,)
    return ()


def _unread(further: Mapping[str, Any], section: Asked) -> Iterator[tuple[Key, set[str]]]:
    """Keys that nobody asked for, each with those of its section that somebody did."""
    if section.whole or not section.asked:
        return  # a model has it, and has checked it
    for name, value in further.items():
        inner = dict.get(section, name)
        if name not in section.asked:
            yield (*section.key, name), section.asked
        elif isinstance(value, Mapping) and isinstance(inner, Asked):
            yield from _unread(value, inner)


def _section(problem: ValidationError, asked: Asked, further: Mapping[str, Any]) -> Key:
    """The section that one of DeepSpeed's models refuses: the one read last, or the whole configuration."""
    inner: Any = further
    for part in (*asked.last_whole, *problem.errors()[0]["loc"]):
        if not isinstance(inner, Mapping) or part not in inner:
            return ()
        inner = inner[str(part)]
    return asked.last_whole


def _refused(problem: ValidationError, section: Key, place: Callable[[Key], str]) -> UserError:
    """What one of DeepSpeed's models has against a section."""
    error = problem.errors()[0]
    inside = tuple(str(part) for part in error["loc"])
    key = (*section, *inside)
    if error["type"] == "extra_forbidden":
        names = _fields(problem.title, inside[:-1])
        return _told(place, key, f"is not a key of DeepSpeed's.{_nearest(key, names)}")
    return _told(place, key, f"is {error['input']!r}, which DeepSpeed refuses: {error['msg']}")


def _fields(title: str, inside: Key) -> set[str]:
    """Every name that a model takes, or one that is the value of its field."""
    model = next((one for one in _models(BaseModel) if one.__name__ == title), None)
    for name in inside:
        kinds = _kinds(model.model_fields[_field(model, name)].annotation) if model and _field(model, name) else []
        model = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
    if model is None:
        return set()
    return {name for field, info in model.model_fields.items() for name in (info.alias or field,)}


def _field(model: type[BaseModel], name: str) -> str:
    """The field that goes by a name or an alias, or the empty string."""
    return next((field for field, info in model.model_fields.items() if name in (field, info.alias)), "")


def _kinds(annotation: Any) -> list[Any]:
    """A type and what it is made of: `Optional[X]` is X too."""
    return [annotation, *getattr(annotation, "__args__", ())]


def _models(base: type[BaseModel]) -> Iterator[type[BaseModel]]:
    for model in base.__subclasses__():
        yield model
        yield from _models(model)


def _nearest(key: Key, known: set[str]) -> str:
    """The nearest spelling, and what to use instead where that key is ours."""
    names = {".".join((*SECTION, *key[:-1], name)): owner(".".join((*key[:-1], name))) for name in known}
    near = did_you_mean(".".join((*SECTION, *key)), sorted(names))
    advice = names.get(near.removeprefix(" Did you mean ").removesuffix("?"))
    return f"{near} That is not set there: {advice}" if advice else near


def _told(place: Callable[[Key], str], key: Key, message: str) -> UserError:
    name = (*SECTION, *key)
    where = place(name)
    return UserError(f"{where}: {'.'.join(name)} {message}" if where else f"{'.'.join(name)} {message}")
