"""Progress of a run: told by rank 0, shown by the process that the user started.

With Ray, rank 0 is another process, maybe on another machine: it appends to a file in the run's directory, and the
user's process follows that file.
"""

from __future__ import annotations

import contextlib
import json
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PROGRESS_FILE = "progress.jsonl"

_LOOK_EVERY_SEC = 0.5


def show(event: dict[str, Any]) -> None:
    """Print one event of the loop as a line on standard error."""
    print(line(event), file=sys.stderr, flush=True)


def line(event: dict[str, Any]) -> str:
    """One event as a line to read."""
    what = event["what"]
    if what == "note":
        return str(event["text"])
    where = f"epoch {event['epoch']}/{event['epochs']}  step {event['step']}/{event['steps']}"
    if what == "resumed":
        workers = f"{event['workers']} worker{'s' if event['workers'] > 1 else ''}"
        return "\n".join([*event["skipped"], f"{where}  resumed from the checkpoint on {workers}"])
    if what == "progress":
        share = f"{event['utilisation']:.0%} of peak  " if "utilisation" in event else ""
        return (
            f"{where}  loss {event['loss']:.4f}  {event['tokens_per_second']:,.0f} tokens/s  {share}"
            f"{duration(event['seconds_left'])} left"
        )
    known = {"what", "epoch", "epochs", "step", "steps", "train_loss", "learning_rate", "tokens_per_second"}
    more = "".join(f"  {name} {value:.4f}" for name, value in event.items() if name not in known)
    return f"{where}  done  train_loss {event['train_loss']:.4f}{more}  {event['tokens_per_second']:,.0f} tokens/s"


def duration(seconds: float) -> str:
    """Seconds as `1 h 05 min`, `3 min 20 s` or `12 s`."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 60} min {whole % 60:02d} s" if whole >= 60 else f"{whole} s"


def writer(directory: Path) -> Callable[[dict[str, Any]], None]:
    """For rank 0: append each event to the run's progress file."""

    def tell(event: dict[str, Any]) -> None:
        with (directory / PROGRESS_FILE).open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(event) + "\n")

    return tell


@contextmanager
def following(directory: Path, tell: Callable[[dict[str, Any]], None]) -> Iterator[None]:
    """While open, pass on what is newly written to the run's progress file."""
    path = directory / PROGRESS_FILE
    path.touch()
    ended = threading.Event()

    def follow() -> None:
        with path.open(encoding="utf-8") as handle:
            handle.seek(0, 2)
            started.set()
            rest = ""
            while True:
                last = ended.wait(_LOOK_EVERY_SEC)
                rest += handle.read()
                *lines, rest = rest.split("\n")
                for text in lines:
                    # A line cut short by a full disk, or a screen that is gone, does not end what follows.
                    with contextlib.suppress(ValueError, OSError):
                        tell(json.loads(text))
                if last:
                    return

    started = threading.Event()
    thread = threading.Thread(target=follow, name="training progress", daemon=True)
    thread.start()
    started.wait()
    try:
        yield
    finally:
        ended.set()
        thread.join()
