"""One process at a time."""

from __future__ import annotations

import sys


def lock(handle: int) -> bool:
    """Whether this process has an open file for itself, until it closes it or ends.

    Args:
        handle: the file's descriptor, open for writing.
    """
    if sys.platform == "win32":
        import msvcrt

        try:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True
    import fcntl

    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True
