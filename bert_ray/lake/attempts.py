"""What a worker notes of a unit that it tries: that it began, who did it, or why it failed."""

from __future__ import annotations

import contextlib
import os
import socket
import traceback
from typing import TYPE_CHECKING, Any, Protocol

from bert_ray.errors import BertRayError, LakeError

if TYPE_CHECKING:
    from bert_ray.lake.journal import Journal
    from bert_ray.lake.units import Unit

# A unit over which this many workers died in one session is given up: it is likely what kills them (memory).
_DEATHS = 3


class Work(Protocol):
    """What all units of a run have in common; here: who works on it.

    Attributes:
        session: names one driver's try at the run.
        engine: on which it runs.
    """

    @property
    def session(self) -> str: ...

    @property
    def engine(self) -> str: ...


def begin(journal: Journal, name: str, work: Work, what: str, remedy: str) -> None:
    """Note that a unit is begun.

    Args:
        journal: of the run.
        name: what the journal calls the unit.
        work: of the run.
        what: what an error calls the unit.
        remedy: what to do where workers die over it.

    Raises:
        LakeError: too many have died over it.
        OutputError: the output cannot be written.
    """
    deaths = journal.start(name, work.session)
    if deaths >= _DEATHS:
        raise LakeError(f"{deaths} workers died over {what}, perhaps for lack of memory: {remedy}")


def signature(work: Work) -> dict[str, Any]:
    """Who did a unit, for its receipt."""
    return {"engine": work.engine, "session": work.session, "host": socket.gethostname(), "pid": os.getpid()}


def fail(journal: Journal, name: str, unit: Unit, work: Work, error: BaseException, **more: Any) -> str:
    """Note why a unit failed, and `more` of it; what the note says of the error."""
    expected = isinstance(error, BertRayError)
    told = str(error) if expected else f"{type(error).__name__}: {' '.join(str(error).split())}"
    note = {
        "file": unit.path,
        "row_groups": unit.row_groups,
        "error": told,
        "engine": work.engine,
        "session": work.session,
        "traceback": "" if expected else "".join(traceback.format_exception(error)),
        **more,
    }
    # On a full disk not even this can be written; the outcome says it.
    with contextlib.suppress(LakeError, OSError):
        journal.fail(name, note)
    return told
