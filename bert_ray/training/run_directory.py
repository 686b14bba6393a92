"""A run's directory, `<output>.run`: entered by one run, gone on with by an equal one, and gone when it has ended.

It holds run.json (what was asked), checkpoints/, best/ (the best bundle so far), progress.jsonl and, of a pretraining,
shards.json (which shards were found whole, so that a resume need not read a corpus to its end first). Where
`checkpoint.directory` says so, checkpoints lie elsewhere, with a run.json of their own; place.json says where.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bert_ray.errors import BundleError, JobError, LakeError, why
from bert_ray.lake.files import put_in_place, write_json

if TYPE_CHECKING:
    from bert_ray.model.card import Card
    from bert_ray.training.job import TrainJob
    from bert_ray.training.position import Position

# What a run was asked: in its own directory, and beside checkpoints that lie elsewhere.
RUN_FILE = "run.json"
# In a run's directory: where its checkpoints lie.
_PLACE_FILE = "place.json"
# In a run's directory: what each of a corpus's shards whose hash was right is known by.
_SHARDS_FILE = "shards.json"
# In a run's directory: the bundle of the best epoch so far.
BEST = "best"


def enter(job: TrainJob, directory: Path, identity: dict[str, Any]) -> None:
    """Begin a run, or go on with one of equal settings; its checkpoints are not another run's, nor elsewhere."""
    begun = begun_in(directory)
    if begun is not None and not same_run(begun, identity):
        where = "that directory" + (f" and {job.checkpoint.directory}" if job.checkpoint.directory else "")
        raise JobError(
            f"{directory} holds an unfinished run with other settings ({_difference(begun, identity)}): restore "
            f"them to go on with it, delete {where} to start anew, or choose another output"
        )
    # What a kill has left of writing run.json is no more than that.
    if begun is None and directory.exists() and any(path.name != f".{RUN_FILE}.new" for path in directory.iterdir()):
        raise JobError(f"{directory} is not empty and holds no run: choose another output")
    if begun is not None:
        _leave_place(job, directory, identity)
    if job.checkpoint.directory:
        _enter_checkpoints(job, directory, identity)
    try:
        if begun is None:
            directory.mkdir(parents=True, exist_ok=True)
            write_json(directory / RUN_FILE, identity)
        write_json(directory / _PLACE_FILE, {"directory": job.checkpoint.directory})
    except OSError as error:
        raise LakeError(f"{directory} cannot be written: {why(error)}. When that is mended, run it again") from error


def seen_shards(directory: Path) -> dict[str, list[Any]]:
    """The shards that the run in `directory` has found whole, as `Documents.verify` takes them."""
    try:
        return dict(json.loads((directory / _SHARDS_FILE).read_text("utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def note_shards(directory: Path, seen: dict[str, list[Any]]) -> None:
    """Note them for the next session; where that cannot be written they are read again."""
    if seen and seen != seen_shards(directory):
        with contextlib.suppress(OSError):
            write_json(directory / _SHARDS_FILE, seen)


# What earlier versions did not note of a run.
_NEWER = ("labels found", "validation_truth", "vocabulary", "augmentation's model")


def same_run(begun: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether what a run was asked when it began is what is asked now."""
    return {name: now[name] for name in _NEWER if name in now} | begun == now


def begun_in(directory: Path) -> dict[str, Any] | None:
    """What the run in `directory` was asked; {} where that is no JSON, None where there is no run.

    Raises:
        JobError: a file is where the directory belongs.
        LakeError: the system does not let it be read.
    """
    try:
        return dict(json.loads((directory / RUN_FILE).read_text("utf-8")))
    except FileNotFoundError:
        return None
    except NotADirectoryError:
        raise JobError(f"{directory}, where the run's checkpoints belong, is a file: choose another output") from None
    except OSError as error:
        raise LakeError(f"{directory / RUN_FILE} cannot be read: {why(error)}") from error
    except ValueError:
        return {}


def _leave_place(job: TrainJob, directory: Path, identity: dict[str, Any]) -> None:
    """Refuse to look for a run's checkpoints elsewhere than where they lie: it would begin anew without a word."""
    from bert_ray.training.checkpoints import checkpoints_of

    try:
        before = json.loads((directory / _PLACE_FILE).read_text("utf-8"))["directory"]
    except FileNotFoundError:  # Killed before it was written.
        return
    if before == job.checkpoint.directory:
        return
    old = checkpoints_of(replace(job, checkpoint=replace(job.checkpoint, directory=before)), directory)
    try:
        there = old.names()
    except OSError as error:
        raise LakeError(f"the checkpoints in {old.where} cannot be listed: {error}") from error
    own = before is None or same_run(old.begun() or {}, _owner(job, identity))
    if there and (own or not old.begun()):
        again = "leave checkpoint.directory out" if before is None else f"give checkpoint.directory={before}"
        raise JobError(f"this run's checkpoints lie in {old.where}: {again} to go on with it, or delete them")
    if before and own:
        old.remove()


def _enter_checkpoints(job: TrainJob, directory: Path, identity: dict[str, Any]) -> None:
    """Take `checkpoint.directory` for this run, where it is not another's: its weights would be gone on with."""
    from bert_ray.training.checkpoints import checkpoints_of

    checkpoints, run = checkpoints_of(job, directory), _owner(job, identity)
    for taken, what in ((Path(job.output), "where the bundle is to come"), (directory, "the run's own directory")):
        if taken in (checkpoints.directory, *checkpoints.directory.parents):
            raise JobError(
                f"checkpoint.directory {checkpoints.where} is in {taken}, {what}: choose another, or leave it out"
            )
    begun = checkpoints.begun()
    if begun is None:
        checkpoints.begin(run)
    elif not same_run(begun, run):
        what = _difference(begun, run) if begun else "it is not said of which"
        raise JobError(
            f"checkpoint.directory {checkpoints.where} holds the checkpoints of another run ({what}): choose another "
            f"one, restore these settings to go on with that run, or delete it and {directory} to start anew"
        )


def _owner(job: TrainJob, identity: dict[str, Any]) -> dict[str, Any]:
    """Whose checkpoints a directory holds: two runs of equal settings have each their own best bundle."""
    return identity | {"output": job.output}


def ended(output: Path, identity: dict[str, Any]) -> Card:
    """The card of the bundle that an equal run has left in `output`.

    Raises:
        JobError: something else is there.
    """
    from bert_ray.model.bundle import load_bundle

    try:
        card = load_bundle(output).card
    except BundleError as error:
        raise JobError(f"output {output} exists and holds no bundle: choose another ({error})") from error
    begun = card.provenance.get("job", {})
    if not same_run(begun, identity):
        what = _difference(begun, identity) if begun else "it was not trained here"
        raise JobError(f"output {output} holds another bundle ({what}): choose another output, or delete it first")
    return card


def _difference(begun: dict[str, Any], now: dict[str, Any]) -> str:
    before, after = _flat(begun), _flat(now)
    changed = [
        f"{name} {before.get(name)!r}, now {after.get(name)!r}"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name) and not (name in _NEWER and name not in before)
    ]
    return "; ".join(changed[:5])


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, item in value.items():
        flat |= _flat(item, f"{prefix}{name}.") if isinstance(item, dict) else {f"{prefix}{name}": item}
    return flat


def publish(
    job: TrainJob, directory: Path, output: Path, identity: dict[str, Any], position: Position, seconds: float
) -> None:
    """The best bundle, with the whole history on its card, becomes the output; the run's directory goes."""
    from bert_ray.model.bundle import load_bundle
    from bert_ray.model.card import save_card

    best = directory / BEST
    card = load_bundle(best).card
    card.provenance |= {
        "history": position.history,
        "best_epoch": position.best_epoch,
        "curve": position.curve,
        "tokens_per_second": position.tokens / max(1e-9, position.seconds),
        "seconds": round(seconds, 1),
    }
    save_card(best, card)
    try:
        # The checkpoints go next: what takes their place outlives a power cut.
        put_in_place(best, output)
    except OSError as error:
        raise LakeError(
            f"{best} cannot be brought to {output}: {why(error)}. When that is mended, the same command does it"
        ) from error
    clear(job, directory, identity)


def clear(job: TrainJob, directory: Path, identity: dict[str, Any]) -> None:
    """Drop all that a run goes on from. What says whose it is goes last: a kill in between can be made good."""
    from bert_ray.training.checkpoints import checkpoints_of

    checkpoints = checkpoints_of(job, directory)
    # Long after a kill its place may have become another run's.
    if job.checkpoint.directory and same_run(checkpoints.begun() or {}, _owner(job, identity)):
        checkpoints.remove()
    for path in directory.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != RUN_FILE:
            path.unlink()
    shutil.rmtree(directory)
