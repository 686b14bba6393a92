"""Job files, flags and `key=value` into a job's dataclass.

    load_job(AnnotateJob, ["jobs/annotate.yaml", "--engine", "ray", "ray.address=auto"])

A key is spelt the same everywhere: `ray: {address: auto}` in the file, `--ray.address auto` as a flag,
`ray.address=auto` as key=value, `job.ray.address` in Python. The file comes first, then flags and key=value in the
order given; the last one wins. Relative paths, also those in a job file, are relative to the working directory, as
they are for every other command: a job file can be moved without changing its meaning.

jsonargparse parses values and checks types. What is added here is where a mistake stands: file and line (the marks of
the YAML nodes), the flag as it was typed, and the nearest right key.
"""

from __future__ import annotations

import re
from argparse import ArgumentError
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, fields, is_dataclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from bert_ray.config.files import Dumper, JobFile, peek, read_job_file
from bert_ray.config.flags import DOT, Arguments, is_mapping
from bert_ray.config.keys import (
    Key,
    alternatives,
    contains,
    describe,
    did_you_mean,
    flag,
    is_free,
    list_keys,
    literals,
    nearest,
    show,
    summary,
)
from bert_ray.errors import JobError

__all__ = ["dump_job", "help_text", "load_job", "peek"]

Job = TypeVar("Job")

# What jsonargparse raises for a value that it refuses (with exit_on_error=False).
_REFUSALS = (ArgumentError, KeyError, TypeError, ValueError)

_HOW_TO_SET = """\
A key can stand in the job file, as a flag (--key value) or as key=value; the last one wins.
In a job file and in key=value a key has underscores (batch_tokens); flags take both.
Lists: keep=[a, b] or keep=a,b. Mappings: columns.text=review. Nothing: name=null.
Relative paths are relative to the working directory, also those in a job file."""


def load_job(
    cls: type[Job],
    argv: Sequence[str],
    *,
    command: str = "bert-ray",
    positionals: Sequence[str] = (),
    job_file: bool = True,
    examples: str = "",
) -> Job:
    """Make a job from a job file, flags and key=value.

    Args:
        cls: the job's dataclass; nested dataclasses are groups of keys.
        argv: `[JOB.yaml] [--key value | --key=value | key=value ...]`.
        command: how the command is called, for `--help`.
        positionals: keys whose values may be given by position instead of a job file.
        job_file: whether a job file may be given.
        examples: commands shown under `--help`.

    Raises:
        JobError: an unknown key, a wrong type, a missing key, or a job file that is not one; says where and what to do.
        SystemExit: with status 0 after `--help`.
    """
    keys = list_keys(cls)
    if any(argument in ("-h", "--help") for argument in argv):
        print(help_text(cls, command, positionals, job_file, examples))
        raise SystemExit(0)
    arguments = Arguments(keys, command, positionals, job_file, argv)
    file = read_job_file(arguments.file, keys) if arguments.file else None
    namespace = _check_file(cls, file) if file else None
    job = _parse(cls, arguments, namespace)
    job |= _free_values(cls, file)
    for name, inner, value in arguments.free:
        job[name] = value if inner is None else {**(job[name] or {}), inner: value}
    if missing := [key.name for key in keys if key.default is MISSING and job.get(key.name) is None]:
        where = f"{file.path}: " if file else ""
        flags = ", ".join(name.upper() if name in positionals else f"--{flag(name)}" for name in missing)
        raise JobError(
            f"{where}no {' and no '.join(missing)}; give {flags}{' or set it in the job file' if job_file else ''} "
            f"({command} --help explains every key)"
        )
    built: Job = _build(cls, job, file, arguments.typed)
    return built


def dump_job(job: Any) -> str:
    """A job as the text of a job file that `load_job` reads back to an equal job."""
    return yaml.dump(asdict(job), Dumper=Dumper, sort_keys=False, allow_unicode=True)


def help_text(
    cls: type, command: str, positionals: Sequence[str] = (), job_file: bool = True, examples: str = ""
) -> str:
    """What `--help` prints: every key with its meaning, type and default, and examples."""
    parser = _parser(cls, strict=True, command=command)
    places = [name.upper() for name in positionals] + (["[JOB.yaml]"] if job_file else [])
    parser.usage = " ".join([command, *places, "[--key value | key=value ...]"])
    parser.description = summary(cls)
    notes = [_HOW_TO_SET if job_file else "", f"examples:\n{examples}" if examples else ""]
    parser.epilog = "\n\n".join(filter(None, notes))
    # A flag is shown with dashes, as commands have them; the key itself is spelt with underscores.
    return re.sub(r"^  --[\w.]+", lambda found: flag(found[0]), parser.format_help(), flags=re.MULTILINE)


def _check_file(cls: type, file: JobFile) -> Any:
    """The file's values, their types checked, as jsonargparse's namespace."""
    try:
        free = _free_values(cls, file)
        values = {name: value for name, value in file.values.items() if name not in free}
        return _parser(cls, strict=False).parse_object(_without_empty_groups(cls, values), defaults=False)
    except _REFUSALS as error:
        key = _key_in(error, cls)
        if key is None:
            raise JobError(f"{file.path}: {_first_line(error)}") from error
        value: Any = file.values
        for part in key.name.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        taken = f"{key.name} takes {describe(key.type)}, not {show(value)}{_hint(key, value)}"
        raise JobError(f"{file.place(key.name)}: {taken}") from error


def _free_values(cls: type, file: JobFile | None) -> dict[str, dict[str, Any]]:
    """The file's mappings whose values may be anything, as YAML has them; those that are no such mappings left out."""
    free = [key.name for key in list_keys(cls) if is_free(key.type)]
    found = {name: file.values[name] for name in free if file and name in file.values}
    return {name: dict(value) for name, value in found.items() if is_mapping(value)}


def _without_empty_groups(cls: Any, values: dict[str, Any]) -> dict[str, Any]:
    """`ray:` with nothing under it means the group's defaults."""
    groups = {name: kind for name, kind in get_type_hints(cls).items() if is_dataclass(kind)}
    return {
        name: _without_empty_groups(groups[name], value) if name in groups else value
        for name, value in values.items()
        if not (name in groups and value is None)
    }


def _parse(cls: type, arguments: Arguments, namespace: Any) -> dict[str, Any]:
    """Flags over the file's values over the defaults, as a flat mapping of dotted keys."""
    try:
        parsed = _parser(cls, strict=False).parse_args(arguments.tokens, namespace=namespace)
    except _REFUSALS as error:
        key = _key_in(error, cls)
        if key is None:
            raise JobError(_first_line(error)) from error
        typed = arguments.typed.get(key.name, key.name)
        near = nearest(typed.rpartition("=")[2].rpartition(" ")[2], [str(word) for word in literals(key.type)])
        hint = f"; {did_you_mean(near)}" if near else ""
        raise JobError(f"{typed}: {key.name} takes {describe(key.type)}{hint}") from error
    return {key.name: _dots(parsed[key.name]) for key in list_keys(cls)}


def _build(
    cls: Any, values: Mapping[str, Any], file: JobFile | None, typed: Mapping[str, str], prefix: str = ""
) -> Any:
    """The dataclass of parsed values; what its own checks refuse becomes a JobError with a place."""
    hints, given = get_type_hints(cls), {}
    for item in fields(cls):
        name, kind = prefix + item.name, hints[item.name]
        given[item.name] = _build(kind, values, file, typed, name + ".") if is_dataclass(kind) else values[name]
    try:
        return cls(**given)
    except (ValueError, JobError) as error:
        # Such a message begins with the key ("epochs is 0; …"), so the first known word in it tells the place.
        words = [word.rstrip(".") for word in re.findall(r"[\w.]+", str(error))]
        key = next((name for word in words for name in (word, prefix + word) if name in values), "")
        place = f"{file.place(key)}: " if file and key not in typed else ""
        raise JobError(f"{place}{error}") from error


def _parser(cls: type, strict: bool, command: str = "bert-ray") -> Any:
    """A jsonargparse parser of the job's keys; `strict` marks required keys (for help)."""
    from jsonargparse import ArgumentParser, DefaultHelpFormatter

    keys = {key.name: key for key in list_keys(cls)}

    class Formatter(DefaultHelpFormatter):
        """Keeps the line breaks of description and examples, and says default or required in one word."""

        def _fill_text(self, text: str, width: int, indent: str) -> str:
            return "".join(indent + line for line in text.splitlines(keepends=True))

        def _get_help_string(self, action: Any) -> str:
            if action.dest not in keys:
                return str(action.help)
            key = keys[action.dest]
            meaning = re.sub(r"\bNone\b", "null", key.help)
            if key.default is MISSING:
                return f"{meaning} (required)".strip()
            # Where nothing is the default, the meaning says what then happens; "default: null" would not.
            return meaning if key.default is None else f"{meaning} (default: {_as_yaml(key.default)})".strip()

    parser = ArgumentParser(prog=command, exit_on_error=False, formatter_class=Formatter)
    groups: dict[str, Any] = {}
    hints = get_type_hints(cls)
    for key in keys.values():
        group, _, _ = key.name.rpartition(".")
        if group and group not in groups:
            groups[group] = parser.add_argument_group(group, summary(hints[group]) if group in hints else None)
        required = key.default is MISSING
        options: dict[str, Any] = {"required": True} if required and strict else {}
        if not options:
            options["default"] = None if required else key.default
        kind = Union[key.type, None] if required and not strict else key.type  # noqa: UP007 - a type made at run time
        target = groups[group] if group else parser
        target.add_argument(f"--{key.name}", type=kind, help=key.help or " ", metavar=_metavar(key), **options)
    return parser


def _metavar(key: Key) -> str:
    kind = next(kind for kind in alternatives(key.type) if kind is not type(None))
    if get_origin(kind) is Literal:
        return "|".join(map(str, get_args(kind)))
    if get_origin(kind) in (list, dict):
        return "[A, B]" if get_origin(kind) is list else "{A: B}"
    return {str: "TEXT", int: "N", float: "X", bool: "true|false"}.get(kind, "VALUE")


def _as_yaml(value: Any) -> str:
    """A default as it would stand in a job file."""
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("...\n").strip()


def _hint(key: Key, value: Any) -> str:
    """The remedy for a value of the wrong type in a job file."""
    if contains(key.type, str) and isinstance(value, bool | int | float):
        return ": put it in quotes"
    if contains(key.type, list):
        return ": put each in quotes" if isinstance(value, list) else f": write [{value}]"
    near = nearest(value, [str(word) for word in literals(key.type)]) if isinstance(value, str) else []
    return f"; {did_you_mean(near)}" if near else ""


def _key_in(error: Exception, cls: type) -> Key | None:
    """The key that a jsonargparse error is about: it names it in double quotes."""
    keys = {key.name: key for key in list_keys(cls)}
    for quoted in re.findall(r'"([^"\s]+)"', str(error)):
        name = quoted.removeprefix("--").split(DOT)[0].rstrip("+")
        while name and name not in keys:
            name = name.rpartition(".")[0]
        if name:
            return keys[name]
    return None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _dots(value: Any) -> Any:
    """Free keys with their dots put back."""
    if not isinstance(value, Mapping):
        return value
    return {str(name).replace(DOT, "."): inner for name, inner in value.items()}
