"""A sweep's ledger in a store: the truth of a sweep whose runs lie there; the file beside the driver is a copy.

Each append is an object of its own, a *segment*, named by the number of its first line. A segment is put only where there is
none of its name: if another process has put one there, that process drives the sweep now, and this one is refused. A ledger
that is begun anew, since its sweep was never prepared, is another *generation*; the one before is closed by a last segment,
so whoever still drives it is refused as well.
"""

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tune_topkd.ledger.events import LedgerError
from tune_topkd.storage import Lock
from tune_topkd.storage import NoObjectError
from tune_topkd.storage import Store
from tune_topkd.storage import lock

CLOSED = b"closed\n"
"""The segment after the last one of a generation that is over."""

_SEGMENT = re.compile(r"([0-9]{4})-([0-9]{10})\.jsonl")
_AT_ONCE = 16
_FOLDER = "ledger"
_INDEX = ".sweeps/"  # an object for each sweep: else their names would be found by listing every checkpoint


class TakenOverError(LedgerError):
    """Another process drives the sweep now; what this one has written until then is safe."""


class Mirror:
    """One sweep's ledger in a store.

    **Threads.** Not thread-safe: one thread calls it.
    """

    def __init__(self, store: Store, sweep: str) -> None:
        """Nothing is asked for yet.

        Args:
            store: where the sweeps lie.
            sweep: its name.
        """
        self._store = store
        self._folder = f"{sweep}/{_FOLDER}/"
        self._sweep = sweep
        self.is_pulled = False
        """Whether `pull` has read the store; not if a process of this machine held the file."""
        self._generation = -1
        self._next_seq = 0
        self._is_open = False
        self._tried: dict[int, bytes] = {}
        """By their first line's number: what was to be put, where it is not known whether it was."""

    @staticmethod
    def sweeps(store: Store) -> list[str]:
        """The names of the sweeps whose ledger lies in a store, or once has.

        Raises:
            StoreError: the store cannot be read.
        """
        return [name.removeprefix(_INDEX) for name in store.list(_INDEX)]

    @property
    def first_segment(self) -> str:
        """The name of the object that has the ledger's first line."""
        return self._name(0)

    def pull(self, path: Path) -> bool:
        """Make the file at `path` what the store has; lines that only the file has were never acted on, and are cut off.

        A file that a process of this machine drives is left alone: that process keeps it up to date.

        Returns:
            Whether there is such a ledger, in the store or driven by this machine.

        Raises:
            LedgerError: the file is of a sweep of which the store knows nothing.
            StoreError: the store cannot be read.
            OSError: the disk refused.
        """
        if not path.exists() and not self._segments():
            self.is_pulled = True
            return False
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a+b") as stream:
            if lock(stream) is Lock.BUSY:
                return True
            found = self._segments()  # with the lock: what a driver of this machine has put is seen
            stream.seek(0)
            local = stream.read()
            local = local[: local.rfind(b"\n") + 1]
            if not found and local:
                lines = local.count(b"\n")
                raise LedgerError(
                    f"{self._store.at(self._sweep)}: has no ledger, but this machine's copy has {lines} lines; "
                    f"if that sweep is to be forgotten, remove {path.parent}"
                )
            content = self._content(found, local)
            self.is_pulled = True
            _rewrite(stream, content)
            if not content:
                path.unlink(missing_ok=True)
        return bool(content)

    def begin(self) -> None:
        """Make room for a first line: what is there is closed, and whoever drives it is refused from now on.

        Raises:
            TakenOverError: another process goes on with it at this moment.
            StoreError: the store refuses.
        """
        self._check_pulled()
        if self._is_open and not self.close(self._next_seq):
            raise TakenOverError(f"{self._store.at(self._sweep)}: another process goes on with this sweep")
        self._store.put(_INDEX + self._sweep, b"")
        self._generation += 1
        self._is_open = True

    def close(self, seq: int) -> bool:
        """End this generation before the line of this number, as if the sweep had never begun.

        Returns:
            Whether it is ended; not if another process has written that line.

        Raises:
            StoreError: the store refuses.
        """
        self._is_open = False
        return self._store.put_new(self._name(seq), CLOSED)

    def put(self, seq: int, lines: bytes) -> None:
        """Return when lines, of which the first has this number, are in the store.

        Raises:
            TakenOverError: another process has written these lines.
            StoreError: the store cannot be reached, or refuses; the lines may be there nevertheless, as `settle` finds out.
        """
        self._check_pulled()
        before = self._tried.get(seq)
        self._tried[seq] = lines
        if not self._store.put_new(self._name(seq), lines):
            what = f"line {seq + 1} of its ledger is there already"
            if before is not None and self._store.get(self._name(seq)) == before:
                raise LedgerError(f"{self._store.at(self._sweep)}: {what}: it had been sent before; `resume` goes on")
            raise TakenOverError(
                f"{self._store.at(self._sweep)}: another driver has taken over this sweep ({what}); this one lets go"
            )
        self._tried.clear()

    def settle(self, seq: int) -> bytes:
        """Lines that an earlier `put` of this number left in doubt and that are in the store; else nothing.

        Raises:
            StoreError: the store cannot be read.
        """
        if seq not in self._tried:
            return b""
        try:
            found = self._store.get(self._name(seq))
        except NoObjectError:
            return b""
        return self._tried.pop(seq) if found == self._tried[seq] else b""

    def _check_pulled(self) -> None:
        if not self.is_pulled:
            raise LedgerError(
                f"{self._store.at(self._sweep)}: another process of this machine held the copy; try again"
            )

    def _segments(self) -> list[tuple[int, int]]:
        """Generation and first line's number of all segments, in order."""
        names = [name.removeprefix(self._folder) for name in self._store.list(self._folder)]
        return sorted((int(m[1]), int(m[2])) for name in names if (m := _SEGMENT.fullmatch(name)))

    def _content(self, found: list[tuple[int, int]], local: bytes) -> bytes:
        """The lines of the newest generation; of those that `local` has only the first and the last segment are read."""
        if not found:
            self._generation, self._next_seq, self._is_open = -1, 0, False
            return b""
        self._generation = found[-1][0]
        starts = [seq for generation, seq in found if generation == self._generation]
        known = local.count(b"\n")
        if known:
            last_known = max((seq for seq in starts if seq < known), default=0)
            first, last = self._read([0, last_known])
            is_alike = local.startswith(first) and local.endswith(last)
            if not is_alike or known != last_known + last.count(b"\n"):
                local, known = b"", 0
        segments = self._read([seq for seq in starts if seq >= known])
        self._is_open = CLOSED not in segments
        content = b"" if not self._is_open else local + b"".join(segments)
        self._next_seq = content.count(b"\n")
        return content

    def _read(self, starts: list[int]) -> list[bytes]:
        names = [self._name(seq) for seq in starts]
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            return list(pool.map(self._store.get, names))

    def _name(self, seq: int) -> str:
        return f"{self._folder}{self._generation:04d}-{seq:010d}.jsonl"


def _rewrite(stream: Any, content: bytes) -> None:
    """Make an open file have this content; what is there already is not written again."""
    stream.seek(0)
    before = stream.read()
    common = len(before) if content.startswith(before) else 0
    if common == 0:
        stream.truncate(0)
    stream.write(content[common:])  # at the end: the file was opened so
    stream.flush()
