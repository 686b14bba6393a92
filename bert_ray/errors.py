"""The errors a user can cause and mend. Each message names what, where and the remedy.

The command line prints them as `error: …` and exits with status 2. Every class takes one string, so that an error
raised on a worker pickles its way back to the driver unchanged.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Sequence

# Names that an error lists before it counts the rest.
_MOST_NAMES = 20
# What a terminal obeys: it clears the screen, names the window, goes back over what was said.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_BREAKS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


class BertRayError(Exception):
    """Base of every error that is the caller's to mend."""


class BundleError(BertRayError):
    """A model reference or bundle cannot be used: missing, altered, unsafe or of an unknown architecture."""


class ColumnError(BertRayError):
    """A table lacks a column, has it in the wrong type, or already has the annotation's name."""


class LakeError(BertRayError):
    """A table, a corpus or a directory of checkpoints cannot be read, listed or written."""


class JobError(BertRayError, ValueError):
    """A job file, flag or setting is wrong."""


class EngineError(BertRayError):
    """Ray or Spark gave up in the middle of a run. What is done stays done."""


class Stopped(Exception):
    """A run was asked to stop (SIGTERM) and did, with a checkpoint to go on from; the message says where."""


def why(error: BaseException) -> str:
    """What the operating system says of an error, without a path: the message around it names one that is known."""
    return os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)


def harmless(text: str, lines: bool = True) -> str:
    """Text for a terminal, which may have come from a file's name: control characters stand in hex.

    Args:
        text: to be shown.
        lines: whether it may have several, and tabs.
    """
    return (_CONTROLS if lines else _BREAKS).sub(lambda found: repr(found[0])[1:-1], text)


def meant(name: str, known: Sequence[str]) -> str:
    """What an error says of a name that is not known: those near it, else what there is."""
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if near:
        return f"did you mean {' or '.join(map(repr, near))}?"
    more = f" and {len(known) - _MOST_NAMES} more" if len(known) > _MOST_NAMES else ""
    return f"there are {', '.join(map(repr, known[:_MOST_NAMES]))}{more}." if known else "there are none."
