"""Locks that processes share through a file, and file systems that have none."""

from __future__ import annotations

import errno
import fcntl

# What network file systems and sandboxes answer where there are no locks.
NONE = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def lock(descriptor: int, *, wait: bool) -> bool:
    """Lock an open file against other processes until it is closed; False where its file system has no locks.

    Raises:
        BlockingIOError: another process holds it, and ``wait`` is not set.
        OSError: it cannot be locked for another reason.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno in NONE:
            return False
        raise
    return True
