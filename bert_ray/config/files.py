"""Job files: YAML read with the line of every key, so that a mistake is named where it stands."""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from bert_ray.config.keys import Key, did_you_mean, kind_of, nearest
from bert_ray.errors import JobError


class _Loader(yaml.SafeLoader):
    """YAML with the scalars of version 1.2: `no` and `on` are text, `1e-5` is a number, `010` is ten, `1:30` text."""

    close = yaml.SafeLoader.dispose


class Dumper(yaml.SafeDumper):
    """The way back: puts in quotes what `_Loader` would take for something else than text."""


_OF_VERSION_1_1 = ("bool", "float", "int", "timestamp")
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in known if tag.rpartition(":")[2] not in _OF_VERSION_1_1]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), "tTfF")
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9]+(?:_[0-9]+)*$"), "-+0123456789")
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^(?:[-+]?(?:\d+\.\d*|\.\d+|\d+)(?:[eE][-+]?\d+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"),
    "-+0123456789.",
)
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))
Dumper.yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


@dataclass(kw_only=True)
class JobFile:
    """A job file as read: nested values, and the line of each dotted key."""

    path: str
    values: dict[str, Any]
    lines: dict[str, int]

    def place(self, key: str) -> str:
        """`file:line` of a dotted key, or of the nearest group around it."""
        while key not in self.lines and "." in key:
            key = key.rpartition(".")[0]
        return f"{self.path}:{self.lines[key]}" if key in self.lines else self.path


def read_value(text: str) -> Any:
    """A value as it would stand in a job file; what is no YAML is text."""
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, RecursionError, ValueError):
        return text


def read_job_file(path: str, keys: list[Key]) -> JobFile:
    """Read a job file and check its keys against the job's."""
    node, values = _load_yaml(path)
    known = {key.name: key for key in keys}
    lines: dict[str, int] = {}
    _walk(path, node, "", known, lines)
    return JobFile(path=path, values=values, lines=lines)


def _load_yaml(path: str) -> tuple[yaml.MappingNode, dict[str, Any]]:
    file = Path(path)
    try:
        text = file.read_text("utf-8")
    except FileNotFoundError:
        near = nearest(file.name, [other.name for other in file.parent.glob("*")])
        hint = did_you_mean([str(file.parent / name) for name in near]) or "check the path"
        raise JobError(f"no job file {path} (working directory {Path.cwd()}); {hint}") from None
    except IsADirectoryError:
        raise JobError(f"{path} is a directory, not a job file; give data with --input") from None
    except (OSError, UnicodeDecodeError) as error:
        raise JobError(f"{path} cannot be read as a job file: {error}") from error
    try:
        with contextlib.closing(_Loader(text)) as loader:
            node = loader.get_single_node()
            values = loader.construct_document(node) if node is not None else None
    except yaml.reader.ReaderError as error:
        place = f"{path}:{text[: error.position].count(chr(10)) + 1}"
        raise JobError(f"{place}: not YAML: it holds the character {error.character:#04x}, which is no text") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}:{mark.line + 1}" if mark else path
        raise JobError(f"{place}: not YAML: {getattr(error, 'problem', None) or error}") from error
    except RecursionError as error:
        raise JobError(f"{path} has values in values in values, deeper than can be read") from error
    except ValueError as error:  # A number of thousands of digits, say.
        raise JobError(f"{path} has a value that cannot be read: {error}") from error
    if values is None:
        raise JobError(f"{path} is empty; a job file is YAML with one `key: value` a line (see the jobs/ directory)")
    if not isinstance(node, yaml.MappingNode):
        raise JobError(f"{path} holds {kind_of(values)}, not keys; a job file is YAML with one `key: value` a line")
    return node, values


def _walk(path: str, node: yaml.MappingNode, prefix: str, known: dict[str, Key], lines: dict[str, int]) -> None:
    """Note each key's line; refuse unknown and repeated keys, and groups that are no mappings."""
    deeper = [name for name in known if name.startswith(prefix) and "." in name[len(prefix) :]]
    groups = {name[: name.index(".", len(prefix))] for name in deeper}
    for key_node, value in node.value:
        line, name = key_node.start_mark.line + 1, f"{prefix}{key_node.value}"
        if key_node.tag == "tag:yaml.org,2002:merge":
            continue  # `<<: *anchor`: its keys were checked where the anchor stands, or are checked by jsonargparse.
        if name in lines:
            raise JobError(f"{path}:{line}: {name} stands twice, first in line {lines[name]}; remove one")
        lines[name] = line
        if name in groups and isinstance(value, yaml.MappingNode):
            _walk(path, value, name + ".", known, lines)
        elif name in groups and value.tag != "tag:yaml.org,2002:null":
            inside = ", ".join(key[len(name) + 1 :] for key in known if key.startswith(name + "."))
            raise JobError(f"{path}:{line}: {name} is a group of keys ({inside}): put them indented under it")
        elif name not in known and name not in groups:
            raise JobError(f"{path}:{line}: unknown key {name!r}; {_hint(name, prefix, known, groups)}")
        elif isinstance(value, yaml.MappingNode):
            free = [inner.value for inner, _ in value.value]
            if twice := sorted({str(word) for word in free if free.count(word) > 1}):
                raise JobError(f"{path}:{line}: {name} has {twice[0]!r} twice; remove one")


def _hint(name: str, prefix: str, known: dict[str, Key], groups: set[str]) -> str:
    siblings = [key for key in known if key.startswith(prefix) and "." not in key[len(prefix) :]] + sorted(groups)
    last = name.rpartition(".")[2].replace("-", "_")
    # A right key in the wrong place (`train:` at the top for `data.train`) is as near as a misspelt one.
    elsewhere = [key for key in known if key == name or key.rpartition(".")[2] == last]
    near = nearest(name.replace("-", "_"), siblings) or elsewhere or nearest(name, list(known))
    return did_you_mean(near) or f"the keys here are {', '.join(key[len(prefix) :] for key in siblings)}"


def peek(path: str) -> list[str]:
    """The top-level keys of a job file, which tell what kind of job it is.

    Raises:
        JobError: the file is missing, empty, not YAML or not a mapping.
    """
    return list(_load_yaml(path)[1])
