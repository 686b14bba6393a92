"""The keys of a job: its dataclass' fields, nested dataclasses flattened to dotted names, and types in words."""

from __future__ import annotations

import difflib
import types
from collections.abc import Sequence
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

_SCALARS = {str: "text", int: "an integer", float: "a number", bool: "true or false"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Key:
    """One settable key of a job.

    Attributes:
        name: dotted name, `ray.address`.
        type: the field's type.
        default: its default; MISSING where the key is required.
        help: what the dataclass' docstring says of it.
    """

    name: str
    type: Any
    default: Any
    help: str


def list_keys(cls: Any, prefix: str = "") -> list[Key]:
    """The keys of a job's dataclass, in its order, nested dataclasses flattened to dotted names."""
    hints, texts, keys = get_type_hints(cls), documentation(cls), []
    for item in fields(cls):
        kind, name = hints[item.name], prefix + item.name
        if is_dataclass(kind):
            keys += list_keys(kind, name + ".")
        else:
            keys.append(Key(name=name, type=kind, default=_default(item), help=texts.get(item.name, "")))
    return keys


def summary(cls: type) -> str:
    """What the class docstring says before its list of attributes."""
    from docstring_parser import parse

    found = parse(cls.__doc__ or "")
    return "\n\n".join(filter(None, [found.short_description, found.long_description]))


def documentation(cls: type) -> dict[str, str]:
    """Field -> its entry under `Attributes:` or `Args:` in the class docstring."""
    from docstring_parser import parse

    return {item.arg_name: " ".join((item.description or "").split()) for item in parse(cls.__doc__ or "").params}


def describe(kind: Any) -> str:
    """A type in words: `one of local, ray, spark`, `a list of text`."""
    if kind in _SCALARS:
        return _SCALARS[kind]
    if kind is type(None):
        return "null"
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, get_args(kind)))
    if get_origin(kind) is list:
        return f"a list of {describe(get_args(kind)[0])} ([a, b])"
    if get_origin(kind) is dict:
        inner = " to ".join(describe(inner) for inner in get_args(kind))
        return f"a mapping of {inner} ({{key: value}})"
    if len(options := alternatives(kind)) > 1:
        return " or ".join(describe(option) for option in options)
    return getattr(kind, "__name__", str(kind))


def kind_of(value: Any) -> str:
    """A value's YAML kind in words."""
    names = {bool: "a boolean", int: "an integer", float: "a number", str: "text", list: "a list", dict: "a mapping"}
    return names.get(type(value), type(value).__name__)


def show(value: Any) -> str:
    """A value as YAML has it, shortened, and its kind."""
    if value is None:
        return "null"
    text = ("true" if value else "false") if isinstance(value, bool) else repr(value)
    return f"{text[:60]}{'…' if len(text) > 60 else ''} ({kind_of(value)})"


def contains(kind: Any, wanted: type) -> bool:
    """Whether a type is, or one of its alternatives is, `wanted` or a generic of it."""
    return any(option is wanted or get_origin(option) is wanted for option in alternatives(kind))


def is_free(kind: Any) -> bool:
    """Whether a type is a mapping of names to values of any kind, which only who uses them can check."""
    return get_origin(kind) is dict and get_args(kind)[1] is Any


def of_texts(kind: Any) -> bool:
    """Whether a type is, or may be, a mapping of names to texts."""
    return any(get_origin(option) is dict and get_args(option)[1] is str for option in alternatives(kind))


def alternatives(kind: Any) -> tuple[Any, ...]:
    """The members of a union; else the type alone."""
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def literals(kind: Any) -> list[Any]:
    """The values that a Literal allows."""
    return [word for option in alternatives(kind) if get_origin(option) is Literal for word in get_args(option)]


def flag(name: str) -> str:
    """A key as its flag is spelt: dashes for underscores."""
    return name.replace("_", "-")


def nearest(word: str, words: list[str]) -> list[str]:
    """The word that `word` may have been meant for; two where both are about as near."""
    near = difflib.get_close_matches(word, words, n=2, cutoff=0.6)
    likeness = [difflib.SequenceMatcher(None, found, word).ratio() for found in near]
    return near[:1] if len(near) == 2 and likeness[1] < likeness[0] - 0.05 else near


def did_you_mean(words: Sequence[str]) -> str:
    """The question, or nothing where there is no near word."""
    return f"did you mean {' or '.join(words)}?" if words else ""


def _default(item: Field[Any]) -> Any:
    return item.default_factory() if item.default_factory is not MISSING else item.default
