"""Write constraints.txt anew from what is installed in .venv; run it after an upgrade that passed `make lint test`.

    .venv/bin/python scripts/pin.py

Pins of packages that are not installed here (the bench extra, say) stay as they are.
"""

from __future__ import annotations

import re
from importlib.metadata import distributions
from pathlib import Path

CONSTRAINTS = Path(__file__).resolve().parent.parent / "constraints.txt"
HEADER = """\
# Exactly what bert_ray was tested with, on Python 3.11; `make setup` and `make bench` install by it.
# Written by scripts/pin.py. torch has no local version (+cpu, +cu130) here, so that each machine takes its own build.
"""
NOT_PINNED = {"bert-ray", "pip"}


def main() -> None:
    """Merge the installed versions over the pins that are there."""
    pins = {}
    if CONSTRAINTS.exists():
        lines = (line.strip() for line in CONSTRAINTS.read_text("utf-8").splitlines())
        pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    for found in distributions():
        # Normalised as in PEP 503.
        name = re.sub(r"[-_.]+", "-", found.metadata["Name"]).lower()
        if name not in NOT_PINNED:
            pins[name] = found.version.partition("+")[0]
    body = "".join(f"{name}=={pins[name]}\n" for name in sorted(pins))
    CONSTRAINTS.write_text(HEADER + body, "utf-8")


if __name__ == "__main__":
    main()
