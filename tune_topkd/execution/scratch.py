"""A folder for what lives no longer than a sweep: Ray's sockets, logs and experiment folder, and the private Ray's token."""

import contextlib
import logging
import os
import shutil
import socket
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tune_topkd.errors import TuneTopKDError
from tune_topkd.storage import Lock
from tune_topkd.storage import lock
from tune_topkd.storage import rename

CHOSEN_BY_USER = ("RAY_TMPDIR", "TMPDIR", "TEMP", "TMP")
"""The variables that may say where, the first one first."""
OTHERWISE = ("/tmp", "/var/tmp", "/dev/shm")  # noqa: S108 (a folder of mode 0700 is made there, under a random name)

_LONGEST = 41
"""Bytes of the folder's path: Ray's sockets lie 66 bytes deeper, and the path of one has at most 107."""
_ROOM = 2**20
_PREFIX = "ttk-"
_OWNER_FILE = "owner"

_told: set[str] = set()
_log = logging.getLogger(__name__)


class NoScratchError(TuneTopKDError):
    """There is no folder for temporary files that can be used."""


@contextmanager
def scratch_folder() -> Iterator[str]:
    """A folder for as long as this lasts, for this user alone; those that killed processes left beside it are removed.

    Raises:
        NoScratchError: nowhere can one be made.
    """
    folder = _made()
    _remove_left(folder.parent)
    try:
        with open(folder / "claim", "xb") as owner:
            lock(owner)  # held until this process is gone
            rename(folder / "claim", folder / _OWNER_FILE)  # nobody sees it unlocked
            yield str(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _made() -> Path:
    """A new folder, in the first place where one can be used as Ray will use it."""
    wanted = {name: os.environ[name] for name in CHOSEN_BY_USER if os.environ.get(name)}
    refused = []
    for base in dict.fromkeys([*wanted.values(), *OTHERWISE]):
        try:
            return _made_in(base)
        except OSError as error:
            refused.append(f"{base}: {error.strerror or error}")
            if base in wanted.values() and refused[-1] not in _told:
                _told.add(refused[-1])
                name = next(name for name, value in wanted.items() if value == base)
                _log.warning("%s is not used for temporary files: %s", name, refused[-1])
    raise NoScratchError(f"no folder for temporary files: {'; '.join(refused)}; RAY_TMPDIR names another")


def _made_in(base: str) -> Path:
    """A new folder in `base`.

    Raises:
        OSError: it cannot be made, has no room, its path is too long for sockets, or they cannot be there.
    """
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=os.path.abspath(base)))
    try:
        if len(os.fsencode(folder)) > _LONGEST:
            most = _LONGEST - len(folder.name) - 1
            raise OSError(f"its path has more than the {most} bytes that leave room for the names of sockets")
        with socket.socket(socket.AF_UNIX) as probe:
            probe.bind(str(folder / "probe"))
        (folder / "probe").unlink()
        (folder / "probe").write_bytes(bytes(_ROOM))
        (folder / "probe").unlink()
    except OSError:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return folder


def _remove_left(base: Path) -> None:
    """Remove this user's folders in `base` whose process is gone. Anybody may have put anything there under such a name."""
    try:
        names = [entry.name for entry in os.scandir(base) if entry.name.startswith(_PREFIX)]
    except OSError:  # may be written to, but not listed
        return
    for name in names:
        with contextlib.suppress(OSError):  # another user's, or one just removed
            if _is_left(base / name):
                shutil.rmtree(base / name, ignore_errors=True)


def _is_left(folder: Path) -> bool:
    """Whether a folder is this user's, and its owner file a plain one that no process holds."""
    with _opened(folder, os.O_RDONLY | os.O_DIRECTORY) as within:
        if os.fstat(within).st_uid != os.geteuid():
            return False
        with _opened(_OWNER_FILE, os.O_RDWR | os.O_NONBLOCK, within) as file:  # a pipe would keep this waiting
            found = os.fstat(file)
            if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
                return False
            with open(file, "r+b", buffering=0, closefd=False) as stream:
                return lock(stream) is Lock.TAKEN


@contextmanager
def _opened(path: Path | str, flags: int, within: int | None = None) -> Iterator[int]:
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=within)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
