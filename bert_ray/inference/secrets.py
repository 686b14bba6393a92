"""Spark's settings that nobody else may read: others see the words of a process, and the journal of a run."""

from __future__ import annotations

import re
from collections.abc import Mapping

# What Spark itself hides in its logs (spark.redaction.regex), and Azure's names.
_SECRET = re.compile(r"secret|password|token|credential|access[.]?key|account[.]key|[.]sas[.]", re.IGNORECASE)


def is_secret(name: str) -> bool:
    """Whether a setting of this name holds a secret: "spark.hadoop.fs.s3a.secret.key"."""
    return _SECRET.search(name) is not None


def without_secrets(settings: Mapping[str, str]) -> dict[str, str | None]:
    """The settings as a journal may have them: None stands for a secret."""
    return {name: None if is_secret(name) else value for name, value in settings.items()}
