"""A stage of a bulk job over parts: what has no receipt is done on an engine, and what failed is listed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from bert_ray.lake.journal import Journal
from bert_ray.lake.progress import Progress
from bert_ray.training.corpus.engines import Run
from bert_ray.training.corpus.work import Outcome, Task, Work

# Failures that a summary shows.
_FAILURES_SHOWN = 10


@dataclass(slots=True)
class Ended:
    """How a stage ended.

    Attributes:
        done: the receipts of its tasks.
        failures: each file that could not be read, and why.
        stopped: why it ended before its end, "" where it did not.
    """

    done: set[str] = field(default_factory=set)
    failures: list[str] = field(default_factory=list)
    stopped: str = ""


def do_stage(
    run: Run,
    work: Work,
    tasks: Sequence[Task],
    what: str,
    *,
    stop_at_failure: bool,
    sizes: Sequence[int] | None = None,
    told: Callable[[Outcome], None] | None = None,
) -> Ended:
    """Do the tasks of a stage that have no receipt yet; prints progress.

    Args:
        run: an engine's way to do tasks.
        work: what all tasks have in common.
        tasks: of the stage, done or not.
        what: stands first in the progress's lines.
        stop_at_failure: whether a file that cannot be read stops the others; what nothing could go on from always does.
        sizes: documents of each task; None: as far as files tell.
        told: called with what was done, as it is.
    """
    receipts = Journal(work.output).receipts()
    names = [work.name(task.stage, task.part.id) for task in tasks]
    ended = Ended(done=receipts & set(names))
    rows: Sequence[int | None] = sizes if sizes is not None else [task.part.unit.rows for task in tasks]
    todo = [task for task, name in zip(tasks, names, strict=True) if name not in receipts]
    if not todo:
        return ended
    known = [size for size, name in zip(rows, names, strict=True) if name not in receipts]
    total = None if None in known else sum(size or 0 for size in known)
    left = {task.part.id: task for task in todo}
    with (
        Progress(what=f"{what} on {work.engine}", units=len(todo), rows=total) as progress,
        contextlib.closing(run(work, todo, progress.watch)) as outcomes,
    ):
        for outcome in outcomes:
            failed, task = outcome.state == "failed", left.pop(outcome.part, None)
            if task is None:  # It was told before.
                continue
            progress.ended(outcome.documents, outcome.seconds, failed)
            if not failed:
                ended.done.add(work.name(task.stage, task.part.id))
                if told is not None:
                    told(outcome)
                continue
            if not outcome.lasting:
                ended.failures.append(outcome.error or str(task.part.unit))
            if outcome.lasting or stop_at_failure:
                ended.stopped = outcome.error
                break
    if not ended.stopped:
        ended.failures += [f"{task.part.unit}: the engine has not told what became of it" for task in left.values()]
    return ended


def failure_lines(failures: Sequence[str], stopped: str, *, finished: bool, skippable: bool) -> list[str]:
    """What a summary says of files that could not be read, and how to go on.

    Args:
        failures: each of them, and why.
        stopped: why the run ended before its end, "" where it did not.
        finished: whether what was to be made stands, without them.
        skippable: whether `on_error=skip` would leave them out.
    """
    lines = []
    if failures:
        lines.append(f"  failed      {len(failures):,} files or parts of them")
        lines += [f"              {text}" for text in failures[:_FAILURES_SHOWN]]
    if stopped:
        lines.append(f"  stopped     {stopped}")
    if failures and not finished:
        leave_out = ", or leave them out: on_error=skip" if skippable else ""
        lines.append(f"  to go on    mend the files and give the same command{leave_out}")
    return lines


def reconcile(journal: Journal) -> None:
    """Bring a journal in line with what stands on the disk."""
    journal.sweep()
    for name in journal.receipts():
        note = journal.receipt(name)
        try:
            whole = bool(note) and (journal.output / note["output"]).stat().st_size == note["bytes"]
        except (FileNotFoundError, NotADirectoryError):
            whole = False
        if not whole:
            journal.discard(name)
    for name in journal.failed() | journal.started():
        journal.clear(name)
