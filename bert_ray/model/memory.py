"""Memory that a batch or a training step gives back is kept for the next one.

By default glibc returns large blocks to the system at once, so that every batch faults in its activations page by page:
a few per cent of a forward pass on a CPU, a quarter of a small training step. The price: the process holds on to the
most it ever used.
"""

from __future__ import annotations

import contextlib
import ctypes

# Parameters of mallopt(3), from glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> None:
    """Tell this process's allocator to keep freed memory; does nothing where the allocator is not glibc's."""
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_MAX, 0)  # No block gets a mapping of its own, which freeing it would undo.
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
