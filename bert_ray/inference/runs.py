"""What a bulk run has done and could not do, and going on with it: `bert-ray runs status|failures|resume OUT`."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Any, NamedTuple

from bert_ray.errors import JobError
from bert_ray.inference.bulk import run
from bert_ray.inference.job import AnnotateJob, SparkOptions
from bert_ray.lake.files import printable
from bert_ray.lake.journal import Journal
from bert_ray.lake.tables import local_target
from bert_ray.options import RayOptions


class Report(NamedTuple):
    """Text to print, and the exit status that goes with it."""

    text: str
    exit_status: int


def status(output: str | os.PathLike[str]) -> Report:
    """How far a run is. Exit status 0: all its units are done; 1: some failed or are still to do.

    Raises:
        JobError: there is no run.
    """
    journal, plan = _open(output)
    done = journal.receipts()
    failed = journal.failed() - done  # A kill right after the receipt leaves the note of an earlier failure.
    rows = sum(journal.receipt(unit_id).get("rows", 0) for unit_id in done)
    left = max(0, plan["units"] - len(done) - len(failed))
    sessions, where = plan["sessions"], printable(journal.output)
    lines = [
        where,
        f"  input    {printable(plan['settings']['input'])}",
        f"  model    {plan['job']['model']} ({plan['task']}, fingerprint {_fingerprint(plan)[:12]})",
        f"  units    {plan['units']:,}: {len(done):,} done, {len(failed):,} failed, {left:,} to do",
        f"  rows     {rows:,} of {plan['rows']:,} written",
        f"  sessions {len(sessions)}, the last on {sessions[-1]['engine']} at {sessions[-1]['began']}",
    ]
    if begun := journal.started() - done:
        lines.append(f"  begun    {len(begun):,} units are under way, or were cut off")
    if failed:
        lines.append(f"  why      bert-ray runs failures {shlex.quote(where)}")
    if failed or left:
        lines.append(f"  go on    bert-ray runs resume {shlex.quote(where)}")
    return Report("\n".join(lines), int(bool(failed or left)))


def failures(output: str | os.PathLike[str]) -> Report:
    """Which units failed and why. Exit status 0: none; 1: some.

    Raises:
        JobError: there is no run.
    """
    journal, _ = _open(output)
    where = printable(journal.output)
    notes = [note for note in journal.failures() if not journal.has_receipt(note["unit"])]
    if not notes:
        return Report(f"{where}: no unit has failed", 0)
    lines = [f"{where}: {len(notes):,} units failed"]
    for note in notes:
        groups = note.get("row_groups")
        which = f", row groups {groups[0]} to {groups[1] - 1}" if groups else ""
        lines += [f"  {printable(note.get('file', ''))}{which}", f"    {note.get('error')}"]
    lines.append(f"mend the files and go on: bert-ray runs resume {shlex.quote(where)}")
    return Report("\n".join(lines), 1)


def resume(output: str | os.PathLike[str], **changes: Any) -> Report:
    """Go on with a run as it was begun, or with other settings for where and how fast it runs.

    Args:
        output: the run's output directory.
        **changes: fields of `AnnotateJob` to change: `engine`, `workers`, `threads`, `batch_tokens`, `on_error`, …
            Settings that the table's content hangs on cannot change; None leaves a field as it is. What `spark` does
            not say stays, each setting of its `config` by itself.

    Raises:
        JobError: there is no run; a change would make it another job; it ran on a cluster that is not named now; or
            where it runs is not taken from the run's journal, for it was a secret or another user wrote it.
    """
    journal, plan = _open(output)
    told = dict(plan["job"])
    # The directory may have been moved since: where it is now counts.
    told["output"] = str(local_target(output))
    told.update({key: value for key, value in changes.items() if value is not None})
    ray, spark = changes.get("ray") or RayOptions(), changes.get("spark") or SparkOptions()
    told["ray"], told["spark"] = _session(journal, plan["job"], ray, spark, told["engine"])
    job = AnnotateJob(**told)
    _same_cluster(journal, plan["sessions"][-1], job)
    summary = run(job)
    return Report("", summary.exit_status)  # `run` has printed its summary.


def _session(
    journal: Journal, noted: dict[str, Any], ray: RayOptions, spark: SparkOptions, engine: str
) -> tuple[RayOptions, SparkOptions]:
    """Where the engine runs: as the journal says, with what is told now over it.

    Of another user's journal nothing is taken: a master, an address and some of Spark's settings start programs.
    """
    foreign = (journal.root / "run.json").stat().st_uid not in (0, os.getuid())
    address, master, config = noted["ray"]["address"], noted["spark"]["master"], noted["spark"]["config"]
    asked: list[str] = []
    if engine == "ray" and foreign and address and not ray.address:
        asked = ["ray.address"]
    elif engine == "spark":
        asked = ["spark.master"] if foreign and master and not spark.master else []
        missing = (name for name in config.keys() - spark.config.keys() if foreign or config[name] is None)
        asked += sorted(f"spark.config.{name}" for name in missing)
    if asked:
        reason = "stands in a journal that another user wrote" if foreign else "is a secret, which is not noted"
        raise JobError(f"{', '.join(asked)} {reason}: give it again (--{asked[0]} VALUE), or run the job's own file")
    if foreign:
        return ray, spark
    known = {name: value or "" for name, value in config.items()} | spark.config
    return RayOptions(address=ray.address or address), SparkOptions(master=spark.master or master, config=known)


def _same_cluster(journal: Journal, last: dict[str, Any], job: AnnotateJob) -> None:
    """Refuse to do on this machine, unasked, what was a cluster's to do."""
    cluster = last.get("cluster")
    if not cluster or last["engine"] != job.engine or job.cluster():
        return
    name, here, named = {
        "ray": ("ray.address", "local", job.ray.address),
        "spark": ("spark.master", "local[*]", job.spark.master),
    }[job.engine]
    if not named:
        raise JobError(
            f"{printable(journal.output)}: the run was on a cluster ({cluster}), this command would go on with it on "
            f"this machine alone: submit its job again (bert-ray submit), name the cluster with --{name}, or this "
            f"machine with --{name} '{here}'"
        )


def _open(output: str | os.PathLike[str]) -> tuple[Journal, dict[str, Any]]:
    journal = Journal(Path(local_target(output)))
    plan = journal.read_run()
    if not plan:
        raise JobError(f"{output} holds no run: name the output directory of a `bert-ray annotate`")
    if plan.get("kind") == "corpus":
        raise JobError(
            f"{output} is a corpus: `bert-ray corpus` with its job tells how far it is, and goes on with it; "
            "corpus.json says what a finished one holds"
        )
    if plan.get("kind") == "vocabulary":
        raise JobError(f"{output} holds the counts of a vocabulary: `bert-ray vocabulary` with its job goes on with it")
    return journal, plan


def _fingerprint(plan: dict[str, Any]) -> str:
    return plan["settings"]["model's fingerprint"]
