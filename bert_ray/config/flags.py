"""The command line taken apart: the job file, and flags and key=value as tokens that jsonargparse reads."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from bert_ray.config.files import read_value
from bert_ray.config.keys import Key, contains, describe, did_you_mean, flag, is_free, nearest, of_texts
from bert_ray.errors import JobError

# Stands for a dot inside a free key (`--spark.config.spark.executor.memory=4g`), which jsonargparse would split.
DOT = "\u2024"
_KEY_VALUE = re.compile(r"^[A-Za-z_][\w.+-]*=")


class Arguments:
    """The command line taken apart: the job file, and `--key=value` tokens that jsonargparse reads.

    Attributes:
        free: of mappings whose values are anything, or texts, what is to be changed, in order: the mapping's key,
            a name in it and its value; without a name the whole mapping. jsonargparse would read their texts as YAML
            once more.
    """

    def __init__(
        self, keys: list[Key], command: str, positionals: Sequence[str], job_file: bool, argv: Sequence[str]
    ) -> None:
        self.file: str | None = None
        self.tokens: list[str] = []
        self.free: list[tuple[str, str | None, Any]] = []
        self.typed: dict[str, str] = {}  # Dotted key -> how the user wrote it.
        self._keys = {key.name: key for key in keys}
        self._command = command
        free, left = list(positionals), list(argv)
        while left:
            word = left.pop(0)
            if word.startswith("--"):
                name, equals, value = word[2:].partition("=")
                key, rest = self._find(name, f"--{name}")
                if not equals:
                    value = self._value(word, key, left)
                self._add(key, rest, value, word if equals else f"{word} {value}")
            elif _KEY_VALUE.match(word) and not os.path.exists(word):
                name, _, value = word.partition("=")
                key, rest = self._find(name, word)
                self._add(key, rest, value, word)
            elif word.startswith("-"):
                raise JobError(f"{word}: flags have two dashes; {command} --help lists them")
            elif free:
                self._add(self._keys[free.pop(0)], "", word, word)
            elif job_file and self.file is None:
                self.file = word
            else:
                raise JobError(
                    f"{word}: unexpected; "
                    + (
                        f"the job file is {self.file} already"
                        if self.file
                        else f"{command} --help shows what goes here"
                    )
                )

    def _find(self, name: str, typed: str) -> tuple[Key, str]:
        """The key of a flag's name, and what follows it: "+" to append, or a mapping's own key."""
        spelt = name.replace("-", "_")
        if spelt in self._keys:
            return self._keys[spelt], ""
        if spelt.endswith("+") and spelt[:-1] in self._keys:
            return self._keys[spelt[:-1]], "+"
        for key in self._keys.values():
            if spelt.startswith(key.name + ".") and contains(key.type, dict):
                return key, "." + name[len(key.name) + 1 :].replace(".", DOT)
        groups = {key.rpartition(".")[0] for key in self._keys} - {""}
        if spelt in groups:
            inside = ", ".join(f"--{flag(key)}" for key in self._keys if key.startswith(spelt + "."))
            raise JobError(f"{typed}: {spelt} is a group of keys; set one of {inside}")
        dashes = "--" if typed.startswith("--") else ""
        near = [dashes + (flag(key) if dashes else key) for key in nearest(spelt, list(self._keys))]
        raise JobError(f"{typed}: no such key; {did_you_mean(near) or f'{self._command} --help lists the keys'}")

    def _value(self, word: str, key: Key, left: list[str]) -> str:
        """The value after a flag. A lone `--scores` means true."""
        following = left[0] if left else None
        if contains(key.type, bool) and (following is None or following.lower() not in ("true", "false", "null")):
            return "true"
        if following is None or following.startswith("--"):
            raise JobError(f"{word} needs a value: {describe(key.type)}")
        return left.pop(0)

    def _add(self, key: Key, rest: str, value: str, typed: str) -> None:
        if contains(key.type, list) and value.lstrip().startswith("["):
            value = _as_json(value)
        elif contains(key.type, list) and value != "null":
            one = rest == "+" and "'" not in value and '"' not in value
            value = json.dumps([value], ensure_ascii=False) if one else _as_json(_bracketed(value))
        elif contains(key.type, dict) and not rest and not is_free(key.type) and value.lstrip().startswith("{"):
            value = _as_json(value)
        self.typed[key.name] = typed
        inner = rest[1:].replace(DOT, ".") if rest[:1] == "." else ""
        if of_texts(key.type):
            if inner:
                self.free.append((key.name, inner, value))
                return
            self.free = [item for item in self.free if item[0] != key.name]  # The whole mapping comes in their place.
        if is_free(key.type):
            found = read_value(value)
            if inner or (not rest and is_mapping(found)):
                self.free.append((key.name, inner or None, found))
                return
            if rest:
                raise JobError(
                    f"{typed}: {key.name} is a mapping: give {key.name}.NAME=VALUE, or {key.name}={{NAME: VALUE}}"
                )
        self.tokens.append(f"--{key.name}{rest}={value}")


def _as_json(value: str) -> str:
    """A list or mapping in YAML, which jsonargparse would read by another version of YAML, as JSON."""
    found = read_value(value)
    return json.dumps(found, ensure_ascii=False) if isinstance(found, list | Mapping) else value


def is_mapping(value: Any) -> bool:
    """Whether it is a mapping whose keys are text."""
    return isinstance(value, Mapping) and all(isinstance(name, str) for name in value)


def _bracketed(value: str) -> str:
    """keep=a,b for keep=[a, b]. Every list is one of text, so `labels=0,1` and `keep=no,x` are text as well."""
    if "'" in value or '"' in value:  # Quoted as YAML has it: a comma may be part of a word.
        return f"[{value}]"
    return json.dumps([word for part in value.split(",") if (word := part.strip())], ensure_ascii=False)
