"""The bank of a teacher's logits: each view of an image is shown to the teacher once, whichever trial comes first.

A bank is one file of float16 rows, mapped into the memory of all trials of a node: row `image × views + view` holds the
logits of one view of one image, raw and whole, so that K, scales and weights stay free, and a checksum. Rows are filled as
they are asked for, or ahead. A row that was never written, or was torn by a kill, does not match its checksum and counts as
empty; writers beside one another write the same. So nothing needs a lock to be right, and filling may be killed and gone on
with at any instant. Locks only spare work: trials of a sweep come to the same batch at about the same time, and one of them
asks while the others wait. The file's name is a hash of all that the logits depend on: another teacher, normalisation,
augmentation, dataset or split is another file.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import time
import weakref
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FILL_BATCH = 64
"""Images that the teacher is shown at once, always so many: its rounding may depend on it, and rows must not."""

LARGEST_SHARE_OF_DISK = 0.5
"""Of what is free; a bank that would take more is not begun."""

LONGEST_WAIT_FOR_ANOTHER = 60.0
"""Seconds that a training waits for another that asks the same; then it asks by itself."""

_FORMAT = 1
_ROWS_AT_ONCE = 2**16
_SECONDS_BETWEEN_TRIES = 0.002


@dataclass(frozen=True)
class BankSize:
    """How many rows a bank has, and how long they are."""

    images: int
    views: int
    num_classes: int

    @property
    def bytes(self) -> int:
        """Of the file, which takes its room at once."""
        return self.images * self.views * (self.num_classes + 1) * 2


class LogitBank:
    """The logits of all views of a split's training images under one teacher.

    **Threads and processes.** Any number may read and fill the same file at once. **Determinism.** `logits` gives the
    float16 of the teacher's logits, whether the row was there or has just been filled.
    """

    def __init__(self, path: Path, size: BankSize) -> None:
        """Map the file, which is made, with its room on the disk, if need be.

        Raises:
            OSError: it cannot be made, or the disk has no room for it.
        """
        self.path = path
        self.size = size
        _make(path, size.bytes)
        words = size.images * size.views * (size.num_classes + 1)
        mapped = torch.from_file(str(path), shared=True, size=words, dtype=torch.int16)
        self._rows = mapped.view(-1, size.num_classes + 1)
        generator = torch.Generator().manual_seed(_FORMAT)
        self._locks: int | None = None
        self._odd = 2 * torch.randint(2**15, (size.num_classes,), generator=generator) + 1

    def read(self, images: Tensor, views: Tensor) -> tuple[Tensor, Tensor]:
        """What is there of some views of some images.

        Args:
            images: their indices in the split, `(N,)` int64 on the CPU.
            views: their views' numbers, `(N,)` int64 on the CPU.

        Returns:
            The logits `(N, C)` float16, and which rows of them are there `(N,)` bool.
        """
        rows = self._rows[images * self.size.views + views]
        is_there = torch.cat([self._checksum(part) == part[:, -1] for part in torch.split(rows, _ROWS_AT_ONCE)])
        return rows[:, :-1].contiguous().view(torch.float16), is_there

    def fill(self, images: Tensor, views: Tensor, ask: Callable[[Tensor], Tensor]) -> Tensor:
        """Ask the teacher for some views of some images, and keep what it says.

        Args:
            images: as for `read`.
            views: as for `read`.
            ask: given places in `images`, `(FILL_BATCH,)` int64, gives the teacher's logits `(FILL_BATCH, C)` of these;
                some places come more than once, to make up the number.

        Returns:
            The logits `(N, C)` float16 on the CPU.
        """
        given = torch.empty(len(images), self.size.num_classes, dtype=torch.float16)
        for some in torch.split(torch.arange(len(images)), FILL_BATCH):
            padded = torch.cat([some, some.new_full((FILL_BATCH - len(some),), int(some[0]))])
            given[some] = ask(padded)[: len(some)].to(device="cpu", dtype=torch.float16)
        rows = torch.empty(len(images), self.size.num_classes + 1, dtype=torch.int16)
        rows[:, :-1] = given.view(torch.int16)
        rows[:, -1] = self._checksum(rows)
        self._rows[images * self.size.views + views] = rows
        return given

    @contextlib.contextmanager
    def claimed(self, what: object) -> Iterator[None]:
        """Hold something that others would ask the teacher for as well; the kernel lets go of it if this process dies.

        Waits for another process that holds it, though not for ever. On storage without locks nothing is held.

        Args:
            what: the same for all that would ask the same.
        """
        if self._locks is None:
            self._locks = os.open(self.path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT, 0o666)
            weakref.finalize(self, os.close, self._locks)
        place = int.from_bytes(hashlib.sha256(repr(what).encode()).digest()[:5])
        deadline = time.monotonic() + LONGEST_WAIT_FOR_ANOTHER
        is_held = False
        while not is_held and time.monotonic() < deadline:
            try:
                fcntl.lockf(self._locks, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
                is_held = True
            except (BlockingIOError, PermissionError):  # what POSIX allows for a lock that another holds
                time.sleep(_SECONDS_BETWEEN_TRIES)
            except OSError:
                break
        try:
            yield
        finally:
            if is_held:
                fcntl.lockf(self._locks, fcntl.LOCK_UN, 1, place)

    def filled(self) -> int:
        """How many rows are there."""
        parts = torch.split(self._rows, _ROWS_AT_ONCE)
        return sum(int((self._checksum(part) == part[:, -1]).sum()) for part in parts)

    def _checksum(self, rows: Tensor) -> Tensor:
        """Of each row's logits, `(n,)` int16; never 0, so that a row that was never written has none."""
        words = (rows[:, :-1].to(torch.int32) & 0xFFFF) + 1
        return ((words * self._odd.to(torch.int64)).sum(1) % 65521 + 1).to(torch.int16)


def bank_path(folder: Path, content: Mapping[str, Any]) -> Path:
    """The file of the bank that holds what this describes: the same for the same content only."""
    text = json.dumps({"format": _FORMAT, **content}, sort_keys=True, separators=(",", ":"))
    return folder / f"bank-{hashlib.sha256(text.encode()).hexdigest()[:16]}.f16"


def has_room(path: Path, size: BankSize) -> bool:
    """Whether a bank of this size may be begun at `path`, or is there already."""
    if path.exists():
        return True
    there = next(parent for parent in path.absolute().parents if parent.exists())
    return size.bytes <= LARGEST_SHARE_OF_DISK * shutil.disk_usage(there).free


def _make(path: Path, size: int) -> None:
    with contextlib.suppress(FileNotFoundError):
        if path.stat().st_size == size:
            return
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(beside, "wb") as stream:
            os.posix_fallocate(stream.fileno(), 0, size)  # a mapped file that finds no room kills the process
        with contextlib.suppress(FileExistsError):
            os.link(beside, path)  # not a rename: another process may have begun to fill its own
    finally:
        beside.unlink(missing_ok=True)
