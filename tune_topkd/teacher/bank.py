"""The bank: a cache on the disk of a teacher's logits, which the trials of a node share.

Each view of an image is shown to the teacher once, by whichever trial comes to it first. A bank is one file of float16
rows, mapped into the memory of all trials: row `view × images + image` holds the logits of one view of one image,
unscaled and of all classes, so that K, scales and weights stay free, and a checksum. Rows are filled when they are
needed, or ahead of a sweep.

A row that was never written, that a kill tore, or that belongs to another file does not match its checksum and counts
as empty; processes that write the same row write the same bytes. So correctness needs no lock, and filling may be
killed and continued at any instant. Locks only save work: trials of a sweep come to the same batch at about the same
time, and one of them runs the teacher while the others wait. A bank that cannot be written, because it is another
user's or its disk is read-only or full, is read.

The file's name is a hash of everything that the logits depend on: another teacher, normalisation, augmentation, dataset
or split is another file. Beside it lies, as JSON, what was hashed. Where an image has another view in every epoch,
views are numbered by the epoch: a longer training lengthens the file.
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
"""Fraction of the disk space that is free or taken by banks: a bank with which all banks would exceed it is not
begun."""

LONGEST_WAIT_FOR_ANOTHER = 60.0
"""Seconds that a training waits for another one that computes the same logits; then it computes them itself."""

BYTES_AT_ONCE = 2**22
"""Memory for computing checksums: what reading takes besides the rows that are read."""

_FORMAT = 2
_CHECKSUM = 2
"""Words of the checksum of a row: one row of noise in four thousand million passes for a row of the bank."""
_MODULUS = 65521
_SECONDS_BETWEEN_TRIES = 0.002
_EXPECTED_REFUSALS = {errno.EACCES, errno.EPERM, errno.EROFS}
"""Reasons for which a bank is meant to be read only: it is another user's, or its disk is read-only."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BankSize:
    """The number of rows of a bank, images × views, and their length."""

    images: int
    views: int
    num_classes: int

    @property
    def bytes(self) -> int:
        """Size of the file, which is allocated when it is made."""
        return self.images * self.views * (self.num_classes + _CHECKSUM) * 2


class LogitBank:
    """The logits of one teacher for all views of the training images.

    **Threads and processes.** Any number may read and write the same file at once. **Memory.** Reading takes the size
    of the rows that are read, and `BYTES_AT_ONCE`.
    """

    def __init__(self, path: Path, size: BankSize) -> None:
        """Map the file; if it is not there, make it with all its disk space.

        Raises:
            OSError: it cannot be made, the disk has no room for it, or what is there cannot be read as a bank.
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
        """Read the logits of some views of some images.

        Args:
            images: indices in the split, `(N,)` int64 on the CPU.
            views: the number of the view of each image, `(N,)` int64 on the CPU.

        Returns:
            The logits `(N, C)` float16, and which of their rows are filled, `(N,)` bool.
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

    def write(self, images: Tensor, views: Tensor, logits: Tensor) -> None:
        """Write the logits of some views of some images; does nothing if the bank is read-only.

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
        """Claim a piece of work, such as the logits of a batch, that other trials would do as well.

        Waits while another process has claimed it, `LONGEST_WAIT_FOR_ANOTHER` at most; the kernel releases the claim of
        a process that dies. Where files cannot be locked, or the bank is read-only, nothing is claimed.

        Args:
            what: names the work, the same in all processes.
        """
        place = int.from_bytes(hashlib.sha256(repr(what).encode()).digest()[:5])
        locks = self._lock_file()
        is_held = locks is not None and _claim(locks, place)
        try:
            yield
        finally:
            if is_held and locks is not None:
                unlock_byte(locks, place)

    def filled(self) -> int:
        """The number of rows that are filled."""
        return sum(int(self._is_whole(self._rows[part]).sum()) for part in self._parts(len(self._rows)))

    def _lock_file(self) -> int | None:
        """The file whose locks are the claims; None where there can be none."""
        if self._locks is None and self.is_writable:
            try:
                self._locks = os.open(self.path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            except OSError as error:  # another user's: the work is done twice, the results are the same
                _log.info("trials at the same batch each run the teacher: %s", error)
                return None
            weakref.finalize(self, os.close, self._locks)
        return self._locks

    def _places(self, images: Tensor, views: Tensor) -> Tensor:
        return views * self.size.images + images

    def _parts(self, count: int) -> Iterator[slice]:
        """So many rows in parts that are processed at once."""
        at_once = max(BYTES_AT_ONCE // (8 * self.size.num_classes), 1)
        return (slice(start, start + at_once) for start in range(0, count, at_once))

    def _is_whole(self, rows: Tensor) -> Tensor:
        return (self._checksum(rows[:, :-_CHECKSUM]) == rows[:, -_CHECKSUM:]).all(1)

    def _checksum(self, words: Tensor) -> Tensor:
        """The checksums of rows of logits, `(n, _CHECKSUM)` int16; never 0, so that a row of zeros has none.

        The sums are whole numbers below 2^53, which float64 holds exactly in whatever order they are added up.
        """
        sums = words.view(torch.uint16).double() @ self._odd + self._odd.sum(0)
        return (sums.long() % _MODULUS + 1).to(torch.int16)


def _claim(locks: int, place: int) -> bool:
    """Claim a place, waiting while another process holds it; whether it is claimed in the end."""
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
    """The file of the bank with this content, everything that its logits depend on: another content is another file."""
    text = json.dumps({"format": _FORMAT, **content}, sort_keys=True, separators=(",", ":"))
    return folder / f"bank-{hashlib.sha256(text.encode()).hexdigest()[:16]}.f16"


def describe(path: Path, content: Mapping[str, Any]) -> None:
    """Write beside a bank, as JSON, everything that its logits depend on; a description that is there stays."""
    beside = path.with_suffix(".json")
    if beside.exists():
        return
    try:
        write_text(beside, json.dumps({"format": _FORMAT, **content}, indent=2) + "\n")
    except OSError as error:
        _log.info("%s is not described beside it: %s", path, error)


@dataclass(frozen=True)
class StoredBank:
    """A bank on the disk."""

    path: Path
    bytes: int
    """What it takes of the disk."""
    content: Mapping[str, Any]
    """What its logits depend on, as `describe` wrote it; empty where that is not there."""

    def remove(self) -> None:
        """Remove it and the files beside it; trainings that have mapped it keep what they mapped.

        Raises:
            OSError: it cannot be removed.
        """
        self.path.unlink(missing_ok=True)
        for suffix in (".json", ".lock"):
            self.path.with_suffix(suffix).unlink(missing_ok=True)


def stored_banks(root: Path) -> list[StoredBank]:
    """All banks below the folder of all teachers, unfinished ones of killed processes included."""
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
    """Whether the bank at `path`, in a teacher's folder, is there with this size or may be given it."""
    there = path.stat().st_size if path.exists() else 0
    if there >= size.bytes:
        return True
    taken = sum(bank.bytes for bank in stored_banks(path.absolute().parent.parent))
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    usable = shutil.disk_usage(folder).free + taken
    return taken + size.bytes - there <= LARGEST_SHARE_OF_DISK * usable
