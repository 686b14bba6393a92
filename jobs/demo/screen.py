"""What the demo shows: headings, steps with their seconds, tables, and nothing that libraries say of themselves."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

MARGIN = " " * 5


class Indented:
    """A stream whose lines are set in, so that each step's output stands under its heading."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._at_start = True

    def write(self, text: str) -> int:
        """Write; each line, also one that is written over on a terminal, is set in."""
        for piece in re.split(r"([\r\n])", text):
            if piece in ("\r", "\n"):
                self._at_start = True
                self._stream.write(piece)
            elif piece:
                self._stream.write(f"{MARGIN}{piece}" if self._at_start else piece)
                self._at_start = False
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def heading(text: str) -> None:
    """Print a line that stands out."""
    bold, plain = ("\033[1m", "\033[0m") if sys.stdout.isatty() else ("", "")
    print(f"\n{bold}{text}{plain}", flush=True)


@contextlib.contextmanager
def step(text: str) -> Iterator[None]:
    """A step of the demo: a heading, what the step prints set in under it, its seconds at the end."""
    heading(text)
    began = time.monotonic()
    with contextlib.redirect_stdout(Indented(sys.stdout)), contextlib.redirect_stderr(Indented(sys.stderr)):
        yield
        print(f"took {time.monotonic() - began:.1f} s", flush=True)


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """Print rows as a table, numbers to the right."""
    names = list(rows[0])
    cells = [names, *([str(row[name]) for name in names] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    right = [isinstance(rows[0][name], int) for name in names]
    for line in cells:
        print("  ".join(t.rjust(w) if r else t.ljust(w) for t, w, r in zip(line, widths, right, strict=True)))


@contextlib.contextmanager
def stderr_to(log: Path) -> Iterator[None]:
    """Send standard error to a file: this process's while this lasts, that of processes begun here for good."""
    sys.stderr.flush()
    screen = os.dup(2)
    try:
        with log.open("ab") as file:
            os.dup2(file.fileno(), 2)
        yield
    finally:
        os.dup2(screen, 2)
        os.close(screen)


def shown(path: str | Path) -> str:
    """A path as a user in the working directory would type it."""
    return os.path.relpath(path) if Path(path).absolute().is_relative_to(Path.cwd()) else str(path)
