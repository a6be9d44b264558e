"""The ledger's file: begun, opened, appended to and read.

Every suggestion, report, decision and end is a line, on the disk before it is acted on. A last line torn by a kill is
dropped when the file is opened; anything else that is not as it was written is a `LedgerError` with the line number.
"""

import contextlib
import os
import socket
import time
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any
from typing import Self

from tune_topkd.ledger.events import Content
from tune_topkd.ledger.events import Event
from tune_topkd.ledger.events import Header
from tune_topkd.ledger.events import LedgerError
from tune_topkd.ledger.events import decode
from tune_topkd.ledger.events import encode
from tune_topkd.ledger.mirror import Mirror
from tune_topkd.ledger.state import SweepState
from tune_topkd.storage import Lock
from tune_topkd.storage import StoreError
from tune_topkd.storage import lock
from tune_topkd.storage import sync
from tune_topkd.storage import sync_stream

LEDGER_FILE = "ledger.jsonl"
_LOCK_TRIES = 5
_LOCK_PAUSE = 0.02
_LARGEST_CLOCK_STEP = 60.0


class Ledger:
    """The ledger opened for writing, by the one process that drives the sweep.

    **Durability.** `append` returns when its lines are on the disk. **Ownership.** The file is locked while it is open; a
    second process is refused. **Crashes.** After a kill at any instant, opening it again gives every event whose `append`
    returned, and perhaps the one in flight. **Mirror.** With one, `append` returns when its lines are in the store; the file
    is a copy, and opening begins with `Mirror.pull`.
    """

    def __init__(
        self,
        path: Path,
        state: SweepState,
        stream: Any,
        clock: Callable[[], float] = lambda: time.time(),
        is_durable: bool = True,
        mirror: Mirror | None = None,
    ) -> None:
        self.path = path
        self.state = state
        self._stream = stream
        self._clock = clock
        self.mirror = mirror
        """The ledger in a store, if it lies there."""
        self._sync_lines = sync_stream if is_durable and mirror is None else lambda stream: None
        self._unfinished: tuple[Callable[[], None], int] | None = None
        """While events are written: what undoes them in the state, and where the file ended before."""

    @classmethod
    def create(
        cls,
        path: Path,
        header: Header,
        *,
        before: Callable[[], object] = lambda: None,
        may_replace: Callable[[SweepState], bool] = lambda state: False,
        undo: Callable[[], object] = lambda: None,
        clock: Callable[[], float] = lambda: time.time(),
        is_durable: bool = True,
        mirror: Mirror | None = None,
    ) -> Self:
        """Begin a new ledger with its first line. Of several processes that try at once, one succeeds.

        A file without a whole line, which a kill has left, counts as none.

        Args:
            path: the file.
            header: what the first line says.
            before: called once the file is this process's, before its first line is written.
            may_replace: whether a ledger that is there, and that no process drives, may be begun anew.
            undo: called if it cannot be begun after `before` was called, while the file is still this process's.
            clock: the time of each line, in seconds; a simulation has its own.
            is_durable: whether `append` waits for the disk; a simulation, which can be run again, need not.
            mirror: the ledger in a store, just pulled.

        Raises:
            LedgerError: the file exists, or another process is about to begin it.
            StoreError: the store cannot be reached or refuses.
            OSError: the disk refused; a file that was not there before is not left.
        """
        _refuse_begun(path, may_replace)
        stream = _claimed(path)
        was_there = True
        try:
            was_there = _refuse_begun(path, may_replace)
            try:
                before()
                stream.truncate(0)
                stream.seek(0)
                ledger = cls(path, SweepState(), stream, clock, is_durable, mirror)
                if mirror is not None:
                    mirror.begin()
                ledger.append(header)
                sync(path.parent)
            except BaseException:
                undo()
                raise
        except BaseException:
            if not was_there:
                path.unlink(missing_ok=True)
            stream.close()
            raise
        return ledger

    def withdraw(self) -> None:
        """Remove the file of a sweep that has not been prepared, as if it had never begun, and close it."""
        assert not self.state.is_prepared, "what has begun stays"
        if self.mirror is not None:
            with contextlib.suppress(StoreError):  # it may be why; then the next `run` closes it
                self.mirror.close(self.state.last_seq + 1)
        self.path.unlink()
        self.close()

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        clock: Callable[[], float] = lambda: time.time(),
        is_durable: bool = True,
        mirror: Mirror | None = None,
    ) -> Self:
        """Open an existing ledger, dropping a last line that a kill has torn.

        Args:
            path: the file.
            clock: the time of each line, as for `create`.
            is_durable: whether `append` waits for the disk, as for `create`.
            mirror: the ledger in a store, just pulled.

        Raises:
            LedgerError: missing, damaged, of another version, or driven by another process.
        """
        try:
            stream = open(path, "r+b", buffering=0)
        except OSError as error:
            raise LedgerError(f"{path}: cannot be opened: {error.strerror}") from error
        try:
            _lock(stream, path)
            content = stream.read()
            whole = content.rfind(b"\n") + 1
            state = _replay(path, content[:whole])
            if whole < len(content):
                stream.truncate(whole)
                sync_stream(stream)
            stream.seek(0, os.SEEK_END)
        except BaseException:
            stream.close()
            raise
        return cls(path, state, stream, clock, is_durable, mirror)

    def append(self, *contents: Content) -> list[Event]:
        """Write events, in one piece, and return them, as readers see them, when they are on the disk.

        If it raises, for whatever reason and at whatever instant, nothing of these events is kept, neither in the file
        nor in the state, and others can be written.

        Raises:
            OSError: the disk, or the store, refused; with a store the events may be there all the same: then they are
                kept, as the next append or the next opening finds.
            TakenOverError: another process drives the sweep by now.
            LedgerError: the events cannot follow those before them or are not such as can be read again, or the disk will
                not let go of what an earlier append has left.
            TypeError: a value is nothing that JSON can hold.
        """
        if not self._take_back():
            raise LedgerError(f"{self.path}: an earlier write has failed; what was written until then is safe")
        if self.mirror is not None and (kept := self.mirror.settle(self.state.last_seq + 1)):
            self._keep([decode(line, "a line of the store") for line in kept.splitlines()], kept)
        start = self._stream.tell()
        lines = [
            encode(Event(seq, round(self._clock(), 3), content))
            for seq, content in enumerate(contents, start=self.state.last_seq + 1)
        ]
        written = [decode(line[:-1], "a line to be written") for line in lines]
        self._unfinished = self.state.taking_back(written), start
        try:
            first = self.state.last_seq + 1
            for event in written:
                self.state.apply(event)
            if self.mirror is not None:  # first: whoever reads the file sees nothing that may not stay
                self.mirror.put(first, b"".join(lines))
            _write_all(self._stream, b"".join(lines))
            self._sync_lines(self._stream)
        except BaseException as error:
            if isinstance(error, OSError) and error.filename is None:
                error.filename = str(self.path)
            self._take_back()
            raise
        self._unfinished = None
        return written

    def _keep(self, events: list[Event], lines: bytes) -> None:
        """Take events that an append has put into the store though it failed."""
        for event in events:
            self.state.apply(event)
        _write_all(self._stream, lines)

    def _take_back(self) -> bool:
        """Undo the last append if it has not come to its end, and say whether there is nothing left of it.

        An interruption may come here too, so all of it can be done again.
        """
        if self._unfinished is None:
            return True
        take_back, start = self._unfinished
        take_back()
        try:
            self._stream.truncate(start)
            self._stream.seek(start)
        except OSError:  # the torn line, if it stays, is dropped at the next opening
            return False
        self._unfinished = None
        return True

    def close(self) -> None:
        """Let go of the file and its lock."""
        self._stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()


def read_events(path: Path, offset: int = 0) -> tuple[list[Event], int]:
    """The whole events of a ledger from a byte offset on, and the offset after them; a torn last line is left out.

    For readers beside the driver: call again with the returned offset to follow a sweep.

    Raises:
        LedgerError: missing or damaged; with the line's place.
    """
    try:
        with open(path, "rb") as stream:
            stream.seek(offset)
            content = stream.read()
    except OSError as error:
        raise LedgerError(f"{path}: cannot be read: {error.strerror}") from error
    whole = content[: content.rfind(b"\n") + 1]
    return list(_parse(path, whole, known_before=offset > 0)), offset + len(whole)


def read_state(path: Path) -> SweepState:
    """The state of a sweep, from its ledger, without touching it.

    Raises:
        LedgerError: missing or damaged.
    """
    return _state_of(path, read_events(path)[0])


def read_header(path: Path) -> Header:
    """What the first line of a ledger says; the others are not read.

    Raises:
        OSError: it cannot be read.
        LedgerError: the first line is not there or damaged.
    """
    with open(path, "rb") as stream:
        return header_of(stream.readline())


def header_of(lines: bytes) -> Header:
    """What the first of a ledger's lines says.

    Raises:
        LedgerError: it is not there or damaged.
    """
    content = decode(lines.partition(b"\n")[0], "line 1").content
    if not isinstance(content, Header):
        raise LedgerError(f"line 1 is no `{Header.NAME}` event")
    return content


def is_driven(path: Path) -> bool:
    """Whether a process holds the ledger open for writing at this moment.

    Where files cannot be locked: whether the process of this machine that the ledger names is alive.
    """
    with open(path, "rb") as stream:
        got = lock(stream, shared=True)
    if got is Lock.NONE:
        with contextlib.suppress(LedgerError):  # damaged: whoever reads it is told
            return _has_living_driver(read_state(path))
    return got is Lock.BUSY


def _lock(stream: Any, path: Path) -> None:
    """Lock the ledger's file; where files cannot be locked, refuse it if the driver it names is alive on this machine."""
    for _ in range(_LOCK_TRIES):
        if (got := lock(stream)) is not Lock.BUSY:
            break
        time.sleep(_LOCK_PAUSE)  # who only looks whether it is driven holds the lock for an instant
    if got is Lock.TAKEN or (got is Lock.NONE and not is_driven(path)):
        return
    who = "another process"
    with contextlib.suppress(LedgerError):
        state = read_state(path)
        if state.last_driver is not None and not state.stop_reason:
            who = f"process {state.last_driver.pid} on {state.last_driver.host}"
    raise LedgerError(f"{path}: the sweep is being driven by {who}")


def _refuse_begun(path: Path, may_replace: Callable[[SweepState], bool]) -> bool:
    """Whether there is a ledger with a whole line, which must be one that may be replaced."""
    content = path.read_bytes() if path.exists() else b""
    whole = content[: content.rfind(b"\n") + 1]
    if whole and not may_replace(_replay(path, whole)):
        raise LedgerError(f"{path}: exists already")
    return bool(whole)


def _claimed(path: Path) -> Any:
    """The file, made if need be, locked by this process; never one that its last owner has just removed."""
    while True:
        stream = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0)
        try:
            _lock(stream, path)
            if os.path.exists(path) and os.path.samestat(os.fstat(stream.fileno()), os.stat(path)):
                return stream
        except BaseException:
            stream.close()
            raise
        stream.close()


def _has_living_driver(state: SweepState) -> bool:
    """Whether the ledger names another process of this machine as its driver, and that one is alive."""
    driver = state.last_driver
    if driver is None or state.stop_reason or driver.host != socket.gethostname() or driver.pid == os.getpid():
        return False
    try:
        ticks = int(Path(f"/proc/{driver.pid}/stat").read_text().rpartition(")")[2].split()[19])
        since_boot = float(Path("/proc/uptime").read_text().split()[0])
    except OSError:
        return False
    began = time.time() - since_boot + ticks / os.sysconf("SC_CLK_TCK")
    return began <= state.driver_since + _LARGEST_CLOCK_STEP  # else a later process has been given the number


def _replay(path: Path, content: bytes) -> SweepState:
    return _state_of(path, _parse(path, content, known_before=False))


def _state_of(path: Path, events: Iterable[Event]) -> SweepState:
    state = SweepState()
    for event in events:
        try:
            state.apply(event)
        except LedgerError as error:
            raise LedgerError(f"{path}: {error}") from error
    if not state.has_begun:
        raise LedgerError(f"{path}: has no `sweep` event; the sweep never began")
    return state


def _parse(path: Path, content: bytes, *, known_before: bool) -> Iterator[Event]:
    for number, line in enumerate(content.split(b"\n")[:-1], start=1):
        try:
            yield decode(line, "a line read later" if known_before else f"line {number}")
        except LedgerError as error:
            raise LedgerError(f"{path}: {error}") from error


def _write_all(stream: Any, content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[stream.write(view) :]
