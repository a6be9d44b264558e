"""The bank of a teacher's logits: each view of an image is shown to the teacher once, whichever trial comes first.

A bank is one file of float16 rows, mapped into the memory of all trials of a node: row `view × images + image` holds the
logits of one view of one image, raw and whole, so that K, scales and weights stay free, and a checksum. Rows are filled as
they are asked for, or ahead. A row that was never written, was torn by a kill, or is another file's does not match its
checksum and counts as empty; writers beside one another write the same. So nothing needs a lock to be right, and filling may
be killed and gone on with at any instant. Locks only spare work: trials of a sweep come to the same batch at about the same
time, and one of them asks while the others wait. A bank that cannot be written, since it is another user's, its disk is
read-only or has no room, is read.

The file's name is a hash of all that the logits depend on: another teacher, normalisation, augmentation, dataset or split
is another file. Beside it lies what was hashed, as JSON. Where an image is shown another view in every epoch, views are
numbered by the epoch: a longer training lengthens the file.
"""

import contextlib
import errno
import hashlib
import json
import logging
import os
import shutil
import time
import warnings
import weakref
from collections.abc import Iterator
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tune_topkd.storage import Lock
from tune_topkd.storage import lock_byte
from tune_topkd.storage import map_file
from tune_topkd.storage import unlock_byte
from tune_topkd.storage import write_text

LARGEST_SHARE_OF_DISK = 0.5
"""Of what is free and what banks have taken: a bank with which all of them would take more is not begun."""

LONGEST_WAIT_FOR_ANOTHER = 60.0
"""Seconds that a training waits for another that asks the same; then it asks by itself."""

BYTES_AT_ONCE = 2**22
"""Of the numbers that checksums are computed with: what reading a bank takes besides the rows that are read."""

_FORMAT = 2
_CHECKSUM = 2
"""Words of a row: of noise, one row in four thousand million passes for one of the bank's."""
_MODULUS = 65521
_SECONDS_BETWEEN_TRIES = 0.002
_EXPECTED_REFUSALS = {errno.EACCES, errno.EPERM, errno.EROFS}
"""Of a bank that is another user's, or lies on a read-only disk: it is meant to be read only."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BankSize:
    """How many rows a bank has, and how long they are."""

    images: int
    views: int
    num_classes: int

    @property
    def bytes(self) -> int:
        """Of the file, which takes its room at once."""
        return self.images * self.views * (self.num_classes + _CHECKSUM) * 2


class LogitBank:
    """The logits of all views of a split's training images under one teacher.

    **Threads and processes.** Any number may read and fill the same file at once. **Memory.** Reading rows takes their own
    size and `BYTES_AT_ONCE`, whatever their number.
    """

    def __init__(self, path: Path, size: BankSize) -> None:
        """Map the file, which is made, with its room on the disk, if need be.

        Raises:
            OSError: it cannot be made, the disk has no room for it, or what lies there cannot be read as a bank.
        """
        self.path = path
        self.size = size
        mapped, refusal = map_file(path, size.bytes)
        self.is_writable = refusal is None
        if refusal is not None:
            level = logging.INFO if refusal.errno in _EXPECTED_REFUSALS else logging.WARNING
            _log.log(level, "the bank of the teacher's logits is only read: %s: %s", path, refusal.strerror)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a tensor over read-only memory, which we do not write to
            self._rows = torch.frombuffer(mapped, dtype=torch.int16).view(-1, size.num_classes + _CHECKSUM)
        self._locks: int | None = None
        generator = torch.Generator().manual_seed(int(hashlib.sha256(path.name.encode()).hexdigest()[:12], 16))
        self._odd = (2 * torch.randint(2**15, (size.num_classes, _CHECKSUM), generator=generator) + 1).double()

    def read(self, images: Tensor, views: Tensor) -> tuple[Tensor, Tensor]:
        """What is there of some views of some images.

        Args:
            images: their indices in the split, `(N,)` int64 on the CPU.
            views: their views' numbers, `(N,)` int64 on the CPU.

        Returns:
            The logits `(N, C)` float16, and which rows of them are there `(N,)` bool.
        """
        places = self._places(images, views)
        given = torch.empty(len(places), self.size.num_classes, dtype=torch.float16)
        is_there = torch.empty(len(places), dtype=torch.bool)
        words = given.view(torch.int16)
        for part in self._parts(len(places)):
            rows = self._rows[places[part]]
            is_there[part] = self._is_whole(rows)
            words[part] = rows[:, :-_CHECKSUM]
        return given, is_there

    def keep(self, images: Tensor, views: Tensor, logits: Tensor) -> None:
        """Write what the teacher says of some views of some images; nothing if the bank can only be read.

        Args:
            images: as for `read`.
            views: as for `read`.
            logits: `(N, C)` float16 on the CPU.
        """
        if not self.is_writable:
            return
        places = self._places(images, views)
        for part in self._parts(len(places)):
            words = logits[part].contiguous().view(torch.int16)
            self._rows[places[part]] = torch.cat([words, self._checksum(words)], 1)

    @contextlib.contextmanager
    def claimed(self, what: object) -> Iterator[None]:
        """Hold something that others would ask the teacher for as well; the kernel lets go of it if this process dies.

        Waits for another process that holds it, though not for ever. On storage without locks, and where nothing could be
        kept for the others, nothing is held.

        Args:
            what: the same for all that would ask the same.
        """
        place = int.from_bytes(hashlib.sha256(repr(what).encode()).digest()[:5])
        locks = self._lock_file()
        is_held = locks is not None and _is_claimed(locks, place)
        try:
            yield
        finally:
            if is_held and locks is not None:
                unlock_byte(locks, place)

    def filled(self) -> int:
        """How many rows are there."""
        return sum(int(self._is_whole(self._rows[part]).sum()) for part in self._parts(len(self._rows)))

    def _lock_file(self) -> int | None:
        """The file that claims are locks of; None where there can be none."""
        if self._locks is None and self.is_writable:
            try:
                self._locks = os.open(self.path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            except OSError as error:  # another user's: the work is done twice, the results are the same
                _log.info("trials beside one another ask the teacher each by itself: %s", error)
                return None
            weakref.finalize(self, os.close, self._locks)
        return self._locks

    def _places(self, images: Tensor, views: Tensor) -> Tensor:
        return views * self.size.images + images

    def _parts(self, count: int) -> Iterator[slice]:
        """Of so many rows, those that are looked at at once."""
        at_once = max(BYTES_AT_ONCE // (8 * self.size.num_classes), 1)
        return (slice(start, start + at_once) for start in range(0, count, at_once))

    def _is_whole(self, rows: Tensor) -> Tensor:
        return (self._checksum(rows[:, :-_CHECKSUM]) == rows[:, -_CHECKSUM:]).all(1)

    def _checksum(self, words: Tensor) -> Tensor:
        """Of each row's logits, `(n, _CHECKSUM)` int16; never 0, so that a row that was never written has none.

        The sums are whole numbers below 2^53, which float64 holds exactly in whatever order they are added up.
        """
        sums = words.view(torch.uint16).double() @ self._odd + self._odd.sum(0)
        return (sums.long() % _MODULUS + 1).to(torch.int16)


def _is_claimed(locks: int, place: int) -> bool:
    """Claim a place, waiting for who holds it; whether it is ours."""
    deadline = time.monotonic() + LONGEST_WAIT_FOR_ANOTHER
    while time.monotonic() < deadline:
        try:
            got = lock_byte(locks, place)
        except OSError:
            return False
        if got is not Lock.BUSY:
            return got is Lock.TAKEN
        time.sleep(_SECONDS_BETWEEN_TRIES)
    return False


def bank_path(folder: Path, content: Mapping[str, Any]) -> Path:
    """The file of the bank that holds what this describes: the same for the same content only."""
    text = json.dumps({"format": _FORMAT, **content}, sort_keys=True, separators=(",", ":"))
    return folder / f"bank-{hashlib.sha256(text.encode()).hexdigest()[:16]}.f16"


def describe(path: Path, content: Mapping[str, Any]) -> None:
    """Write beside a bank what it holds, if that is not there."""
    beside = path.with_suffix(".json")
    if beside.exists():
        return
    try:
        write_text(beside, json.dumps({"format": _FORMAT, **content}, indent=2) + "\n")
    except OSError as error:
        _log.info("%s is not described beside it: %s", path, error)


@dataclass(frozen=True)
class StoredBank:
    """A bank on the disk: its file, the bytes that it takes there, and what it holds, if that is known."""

    path: Path
    bytes: int
    content: Mapping[str, Any]

    def remove(self) -> None:
        """Unlink it and what lies beside it; trainings that have mapped it go on with it.

        Raises:
            OSError: it cannot be removed.
        """
        self.path.unlink(missing_ok=True)
        for suffix in (".json", ".lock"):
            self.path.with_suffix(suffix).unlink(missing_ok=True)


def stored_banks(root: Path) -> list[StoredBank]:
    """All banks below the folder of all teachers, also what killed processes have left of one they began."""
    found = []
    for path in sorted([*root.glob("*/bank-*.f16"), *root.glob("*/.bank-*.f16.*")]):
        with contextlib.suppress(FileNotFoundError):  # another process has just removed it
            found.append(StoredBank(path, path.lstat().st_blocks * 512, _described(path)))
    return found


def _described(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.with_suffix(".json").read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) and content.get("format") == _FORMAT else {}


def has_room(path: Path, size: BankSize) -> bool:
    """Whether a bank of this size may be begun at `path`, in a teacher's folder, or is there already."""
    there = path.stat().st_size if path.exists() else 0
    if there >= size.bytes:
        return True
    taken = sum(bank.bytes for bank in stored_banks(path.absolute().parent.parent))
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    usable = shutil.disk_usage(folder).free + taken
    return taken + size.bytes - there <= LARGEST_SHARE_OF_DISK * usable
