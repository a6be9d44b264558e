"""Files that survive a crash: written whole or not at all, synced, locked, mapped and hashed.

Locks also work, as far as they can, where the file system has none.
"""

import contextlib
import errno
import fcntl
import hashlib
import logging
import mmap
import os
import stat
import uuid
from collections.abc import Callable
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import IO
from typing import Any
from typing import NamedTuple

from tune_topkd.errors import TuneTopKDError

_HAS_NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE}
_ROOM_FOR_ANYTHING = 2**16
_told: set[int] = set()

_log = logging.getLogger(__name__)


class FileError(TuneTopKDError):
    """A file cannot be read: the message names it and says why."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: cannot be read: {self.reason}"


# --- writing --------------------------------------------------------------------------------------------------------


def write_atomically(path: Path, write: Callable[[IO[bytes]], object], *, is_durable: bool = True) -> None:
    """Replace the file at `path` by what `write` writes: in one step, and only once it is on the disk.

    Args:
        path: the file; at any moment it is absent, the old one or the new one.
        write: called with the open stream of a temporary file beside it.
        is_durable: whether to wait for the disk; what need not outlive a power cut does not.

    Raises:
        OSError: the disk refused, also where a library hides that in an error of its own; it names `path`, and what was
            there still is.
        Exception: what `write` raises by itself; what was there still is.
    """
    temporary = _beside(path)
    try:
        with temporary.open("xb") as stream:
            write(stream)
            if is_durable:
                sync_stream(stream)
        temporary.replace(path)
    except Exception as error:
        if (refusal := next(_os_errors(error), None)) is not None:
            raise OSError(refusal.errno, refusal.strerror or str(refusal), str(path)) from error
        raise
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str, *, is_durable: bool = True) -> None:
    """Replace the file at `path` by a text in UTF-8, as `write_atomically` does.

    Raises:
        OSError: the disk refused; it names `path`, and what was there still is.
        UnicodeEncodeError: the text cannot be written in UTF-8; what was there still is.
    """
    content = text.encode()
    write_atomically(path, lambda stream: stream.write(content), is_durable=is_durable)


def write_new(path: Path, content: bytes) -> bool:
    """Write a file that is not there, in one step, and return when it is on the disk.

    Returns:
        Whether this call made it: of several that try at once, one does.

    Raises:
        OSError: the disk refused.
    """
    temporary = _beside(path)
    try:
        with temporary.open("xb") as stream:
            stream.write(content)
            sync_stream(stream)
        os.link(temporary, path)  # not a rename: that would replace another's
    except FileExistsError:
        return False
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    sync(path.parent)
    return True


def sync(path: Path) -> None:
    """Return when a file's content, or a folder's names, are on the disk.

    Raises:
        OSError: the disk refused.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_stream(stream: IO[Any]) -> None:
    """Return when what was written to an open file is on the disk.

    Raises:
        OSError: the disk refused.
    """
    stream.flush()
    os.fsync(stream.fileno())


def rename(path: Path, target: Path) -> None:
    """Give a file or folder another name on the same file system, in one step; a file of that name is replaced.

    Raises:
        OSError: there is no such file, or the disk refused.
    """
    path.rename(target)


def publish(folder: Path, target: Path) -> None:
    """Give a finished folder its name, once all that it holds is on the disk; then the name is on the disk too.

    Args:
        folder: its files are synced; it has no folders.
        target: the name, in the same parent folder, which nothing has.

    Raises:
        OSError: the disk refused.
    """
    for path in [*folder.iterdir(), folder]:
        sync(path)
    rename(folder, target)
    sync(target.parent)


def disk_trouble(error: BaseException, folder: Path) -> str:
    """What is wrong with the disk under `folder`, if that is why `error` came; empty otherwise.

    Libraries hide the disk's error in errors of their own, or lose it: so all its causes are looked at, and then whether a
    small file can be written.
    """
    for refusal in _os_errors(error):
        if refusal.errno in _DISK_ERRORS:
            return f"{refusal.filename or folder}: {refusal.strerror}"
    probe = folder / f".probe-{os.getpid()}"
    try:
        with open(probe, "wb") as stream:
            stream.write(bytes(_ROOM_FOR_ANYTHING))
            sync_stream(stream)
    except OSError as refused:
        return f"{folder}: {refused.strerror}"
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)
    return ""


def _beside(path: Path) -> Path:
    """The path of a temporary file in the same folder: hidden, and like no other's."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")


def _os_errors(error: BaseException) -> Iterator[OSError]:
    """Those among an error and its causes, from the last to the first."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError):
            yield cause
        cause = cause.__cause__ or cause.__context__


# --- reading --------------------------------------------------------------------------------------------------------


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex.

    Raises:
        FileError: it cannot be read.
    """
    try:
        with open(path, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise FileError(path, error.strerror or str(error)) from error


class MappedFile(NamedTuple):
    """A file in memory, one copy for all processes of a machine that map it."""

    content: mmap.mmap
    refusal: OSError | None
    """Why it can only be read; None if it can be written."""


def map_file(path: Path, size: int) -> MappedFile:
    """Map the first `size` bytes of a file, which is made if it is not there.

    The map can be written if this process may write the file and the disk has room for all of it: a map without room, in
    a hole or past a cut-off end, kills the process.

    Raises:
        OSError: it cannot be made, the disk has no room for a new one, it is not a regular file, or it can only be read and
            is too short.
    """
    if not os.path.lexists(path):
        _make(path, size)
    try:
        return MappedFile(_map(path, size, mmap.ACCESS_WRITE), None)
    except OSError as refusal:
        return MappedFile(_map(path, size, mmap.ACCESS_READ), refusal)


def _map(path: Path, size: int, access: int) -> mmap.mmap:
    is_writable = access == mmap.ACCESS_WRITE
    flags = os.O_RDWR if is_writable else os.O_RDONLY
    descriptor = os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe in its place is not waited for
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(None, "is no file", str(path))
        if is_writable:
            _reserve(descriptor, size)
        elif found.st_size < size:
            raise OSError(None, f"is shorter than {size:,} bytes", str(path))
        return mmap.mmap(descriptor, size, access=access)
    finally:
        os.close(descriptor)  # the map has its own


def _reserve(descriptor: int, size: int) -> None:
    """Give a file all its room."""
    found = os.fstat(descriptor)
    wanted = max(size, found.st_size)
    if found.st_size < size or found.st_blocks * 512 < wanted:
        os.posix_fallocate(descriptor, 0, wanted)


def _make(path: Path, size: int) -> None:
    """Make a file of zeros, with its room on the disk, unless another process has made it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path)
    try:
        with open(temporary, "wb") as stream:
            os.posix_fallocate(stream.fileno(), 0, size)
        with contextlib.suppress(FileExistsError):
            os.link(temporary, path)  # not a rename: another process may have begun to fill its own
    finally:
        temporary.unlink(missing_ok=True)


# --- locking --------------------------------------------------------------------------------------------------------


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


def lock_byte(descriptor: int, place: int) -> Lock:
    """Ask for the lock of one byte of an open file, which need not have that byte: one file holds many locks.

    A process holds such a lock until it calls `unlock_byte`, or closes any descriptor of the file.

    Args:
        descriptor: of the file, open for writing.
        place: of the byte, from 0.

    Raises:
        OSError: the disk's trouble.
    """
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
    except (BlockingIOError, PermissionError):  # what POSIX allows for a lock that another holds
        return Lock.BUSY
    except OSError as error:
        if error.errno not in _HAS_NO_LOCKS:
            raise
        return Lock.NONE
    return Lock.TAKEN


def unlock_byte(descriptor: int, place: int) -> None:
    """Let go of what `lock_byte` has taken.

    Raises:
        OSError: the disk's trouble.
    """
    fcntl.lockf(descriptor, fcntl.LOCK_UN, 1, place)
