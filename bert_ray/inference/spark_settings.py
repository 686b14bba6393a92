"""Spark's settings where others might read them: in the words of a process, and in the journal of a run."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

# What Spark itself hides in its logs (spark.redaction.regex), and Azure's names; not what merely says where to look.
_SECRET = re.compile(r"secret|password|token|credential|access[.]?key|account[.]key|[.]sas[.]", re.IGNORECASE)
_NO_SECRET = re.compile(r"(provider|enabled|class|path|file|impl|type)s?$", re.IGNORECASE)


def is_secret(name: str) -> bool:
    """Whether a setting of this name holds a secret: "spark.hadoop.fs.s3a.secret.key"."""
    return _SECRET.search(name) is not None and _NO_SECRET.search(name) is None


def without_secrets(settings: Mapping[str, str]) -> dict[str, str | None]:
    """The settings as a journal may have them: None stands for a secret."""
    return {name: None if is_secret(name) else value for name, value in settings.items()}


def write_properties(path: Path, settings: Mapping[str, str]) -> Path:
    """The settings as a properties file, for its owner alone; for spark-submit's --properties-file."""
    path.touch(mode=0o600)
    with path.open("w", encoding="utf-8") as file:
        for key, value in settings.items():
            name = re.sub(r"([\\\s:=#!])", r"\\\1", key)
            text = value.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r")
            file.write(f"{name}={text}\n")
    return path
