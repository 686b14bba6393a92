"""One run at a time in one place: a lock that ends with the process that holds it, however that ends."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from bert_ray.errors import LakeError, why

# What flock says where a file system has no locks: a FUSE mount, Lustre without its option, NFS 3 without its daemon.
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)


@contextlib.contextmanager
def exclusive(path: Path, what: str) -> Iterator[None]:
    """Hold the lock file `path`, which is made here and goes at the end; what a killed process left is no obstacle.

    The lock is the kernel's (flock): on a file system that several machines share it holds among them where that file
    system passes such locks on (NFS 4 does). Where a file system has none, nothing is held: that no second run comes is
    the user's to see to then.

    Args:
        path: of the lock file; its directory exists.
        what: is worked on, for the message.

    Raises:
        LakeError: another process holds it; the message says which. Or it cannot be written.
    """
    handle = _take(path, what)
    try:
        if handle is not None:
            who = f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%F %T')}"
            with contextlib.suppress(OSError):  # On a full disk it is held without saying by whom.
                os.ftruncate(handle, 0)
                os.write(handle, who.encode())
        yield
    finally:
        if handle is not None:
            path.unlink(missing_ok=True)
            os.close(handle)


def _take(path: Path, what: str) -> int | None:
    """The open lock file, locked; None where the file system has no locks."""
    while True:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise LakeError(f"cannot write {path}: {why(error)}; choose another output") from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(handle, 1000).decode("utf-8", "replace").strip()
            os.close(handle)
            if error.errno in _NO_LOCKS:
                path.unlink(missing_ok=True)
                return None
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise LakeError(f"cannot lock {path}: {why(error)}") from error
            raise LakeError(
                f"another process works on {what} ({holder or 'it has not said which'}): wait for it, stop it, or "
                "choose another output"
            ) from None
        with contextlib.suppress(FileNotFoundError):
            # The one that held it before may have removed the file after it was opened here.
            if os.fstat(handle).st_ino == path.stat().st_ino:
                return handle
        os.close(handle)
