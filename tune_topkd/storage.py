"""Locks on files, also where the file system has none."""

import errno
import fcntl
import logging
import os
from enum import StrEnum
from typing import IO
from typing import Any

_HAS_NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}
_told: set[int] = set()

_log = logging.getLogger(__name__)


class Lock(StrEnum):
    """What became of asking for a lock."""

    TAKEN = "taken"
    """This process holds it until the file is closed; the kernel lets go of it if the process dies."""
    BUSY = "busy"
    """Another process holds it."""
    NONE = "none"
    """The file system has no locks (Lustre without `flock`, some NFS and FUSE): nobody can hold one."""


def lock(stream: IO[Any], *, shared: bool = False, waits: bool = False) -> Lock:
    """Ask for the lock of an open file.

    That a file system has no locks is said once for each, in the log.

    Args:
        stream: the file; open for writing, unless `shared`, or NFS refuses.
        shared: others may hold it as well, if they share it too.
        waits: until another process lets go of it.

    Raises:
        OSError: the disk's trouble.
    """
    try:
        fcntl.flock(stream, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if waits else fcntl.LOCK_NB))
    except BlockingIOError:
        return Lock.BUSY
    except OSError as error:
        if error.errno not in _HAS_NO_LOCKS:
            raise
        device = os.fstat(stream.fileno()).st_dev
        if device not in _told:
            _told.add(device)
            what = "files cannot be locked there, so two processes that write the same are not kept apart"
            _log.warning("%s: %s (%s)", os.readlink(f"/proc/self/fd/{stream.fileno()}"), what, error.strerror)
        return Lock.NONE
    return Lock.TAKEN
