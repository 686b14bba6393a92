from __future__ import annotations

import io
import time

import pytest

from bert_ray.lake import progress
from bert_ray.lake.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_gets_lines() -> None:
    stream = io.StringIO()
    with Progress(what="annotate on ray", units=3, rows=300, stream=stream) as shown:
        shown.ended(100, 2.0, failed=False)
        shown.ended(0, 0.0, failed=True)
        assert "2/3 units, 1 failed, 100 rows, 50 rows/s, about 4 s left" in shown.line()
        shown.ended(200, 2.0, failed=False)
    first, *_, last = stream.getvalue().splitlines()
    assert first == "annotate on ray: 3 units, 300 rows to do; starting"
    assert last.startswith("annotate on ray: 3/3 units, 1 failed, 300 rows")


def test_rows_under_way_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_LOG_SEC", 0.05)
    stream = io.StringIO()
    with Progress(what="x", units=1, rows=10, stream=stream) as shown:
        shown.watch(4)
        deadline = time.monotonic() + 30
        while ", 4 rows," not in stream.getvalue() and time.monotonic() < deadline:
            time.sleep(0.02)
        shown.ended(10, 0.3, failed=False)
    assert ", 4 rows," in stream.getvalue()
    assert ", 10 rows," in stream.getvalue().splitlines()[-1]


def test_a_terminal_gets_a_bar() -> None:
    stream = Terminal()
    with Progress(what="annotate", units=2, rows=20, stream=stream) as shown:
        shown.ended(10, 0.1, failed=False)
    assert "annotate" in stream.getvalue()
    assert "units 1/2" in stream.getvalue()
    assert "10/20" in stream.getvalue()


def test_rows_of_units_that_failed_are_no_time_left() -> None:
    stream = Terminal()
    with Progress(what="annotate", units=2, rows=20, stream=stream) as shown:
        time.sleep(0.3)  # An engine that starts.
        shown.ended(0, 0.0, failed=True, lost=10)
        shown.ended(10, 0.1, failed=False)
        assert "left" not in shown.line()
        shown._draw()
        rate = shown._bar.format_dict["n"] / shown._bar.format_dict["elapsed"]
    assert "10/10" in stream.getvalue()
    assert rate > 50, "the time before the first unit counts as slow rows"
