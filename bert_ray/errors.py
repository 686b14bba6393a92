"""The errors a user can cause and mend. Each message names what, where and the remedy.

The command line prints them as `error: …` and exits with status 2. Every class takes one string, so that an error
raised on a worker pickles its way back to the driver unchanged.
"""


class BertRayError(Exception):
    """Base of every error that is the caller's to mend."""


class BundleError(BertRayError):
    """A model reference or bundle cannot be used: missing, altered, unsafe or of an unknown architecture."""


class ColumnError(BertRayError):
    """A table lacks a column, has it in the wrong type, or already has the annotation's name."""


class LakeError(BertRayError):
    """An input or output table cannot be read, listed or written."""


class JobError(BertRayError, ValueError):
    """A job file, flag or setting is wrong."""


class EngineError(BertRayError):
    """Ray or Spark gave up in the middle of a run. What is done stays done."""


class Stopped(Exception):
    """A run was asked to stop (SIGTERM) and did, with a checkpoint to go on from; the message says where."""
