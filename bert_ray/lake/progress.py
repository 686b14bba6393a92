"""Progress of a run: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import threading
import time
from types import TracebackType
from typing import Any, TextIO

# How often a terminal's bar is drawn anew, and a log gets a line.
_TERMINAL_SEC, _LOG_SEC = 0.5, 15.0


class Progress:
    """Shows units, rows, rows per second and the time left, from counts that the caller keeps up to date.

    A context manager; it draws from a thread of its own, so that a long unit does not look like a dead run.
    """

    def __init__(self, *, what: str, units: int, rows: int | None, stream: TextIO | None = None) -> None:
        """
        Args:
            what: stands first in each line.
            units: how many there are to do.
            rows: how many they hold, as far as files tell; None: not known.
            stream: default: standard error.
        """
        self.units, self.rows = units, rows
        self.units_done = self.units_failed = self.rows_done = 0
        self._rows_underway = 0
        self._what, self._stream = what, stream or sys.stderr
        self._terminal = self._stream.isatty()
        self._began: float | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._draw_on, name="progress", daemon=True)
        self._bar: Any = None
        self._last = ""

    def __enter__(self) -> Progress:
        if self._terminal:
            from tqdm import tqdm

            self._bar = tqdm(
                total=self.rows, desc=self._what, unit=" rows", file=self._stream, dynamic_ncols=True, leave=False
            )
        self._draw()
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ended.set()
        self._thread.join()
        self._draw()
        if self._bar is not None:
            self._bar.close()

    def watch(self, rows: int) -> None:
        """Rows of the unit under way that are done so far."""
        self._rows_underway = rows
        self._began = self._began or time.monotonic()

    def ended(self, rows: int, seconds: float, failed: bool, lost: int = 0) -> None:
        """A unit ended with this many rows written, after so many seconds; `lost`: rows that it would have had."""
        # Starting an engine is not to count as slow rows, or the time left would be told far too long.
        self._began = self._began or time.monotonic() - seconds
        self._rows_underway = 0
        self.units_done += not failed
        self.units_failed += failed
        self.rows_done += rows
        if self.rows is not None:  # What will not come is no time left.
            self.rows = max(0, self.rows - lost)

    def line(self) -> str:
        """The state in words."""
        rows = self.rows_done + self._rows_underway
        if self._began is None:
            size = "" if self.rows is None else f", {self.rows:,} rows"
            return f"{self._what}: {self.units} units{size} to do; starting"
        rate = rows / max(1e-9, time.monotonic() - self._began)
        parts = [f"{self.units_done + self.units_failed}/{self.units} units", f"{rows:,} rows", f"{rate:,.0f} rows/s"]
        if self.units_failed:
            parts.insert(1, f"{self.units_failed} failed")
        if self.rows and rate and rows < self.rows:
            parts.append(f"about {_duration((self.rows - rows) / rate)} left")
        return f"{self._what}: {', '.join(parts)}"

    def _draw(self) -> None:
        if self._bar is not None:
            self._bar.n, self._bar.total = self.rows_done + self._rows_underway, self.rows
            if self._began is not None:
                self._bar.start_t = time.time() - (time.monotonic() - self._began)
            failed = f", {self.units_failed} failed" if self.units_failed else ""
            self._bar.set_postfix_str(f"units {self.units_done + self.units_failed}/{self.units}{failed}", refresh=True)
        elif (line := self.line()) != self._last:
            self._last = line
            print(line, file=self._stream, flush=True)

    def _draw_on(self) -> None:
        while not self._ended.wait(_TERMINAL_SEC if self._terminal else _LOG_SEC):
            self._draw()


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
