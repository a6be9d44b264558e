"""Trials and the ledger: the append-only file that is the truth about a sweep.

Every suggestion, report, decision and end is one line of `ledger.jsonl`, flushed to the disk before it is acted on.
All else (Optuna's study, ASHA's rungs, the MLflow runs, the tables) is a view that can be rebuilt from it.

A line is a JSON object: `seq` (its line number, from 0), `time` (seconds since 1970), `event`, the event's own keys, and
`crc`, the CRC-32 of the line without it. A last line torn by a kill is dropped when the file is opened; anything else
that is not as it was written is a `LedgerError` with the line number. The events, in the order they come:

| event | keys | meaning |
|---|---|---|
| `sweep` | `version`, `sweep`, `id`, `seed`, `trials`, `baselines`, `epochs`, `metric`, `digest`, … | first line, once |
| `driver` | `host`, `pid`, `trials`, … | a process began to drive the sweep, towards this number of trials |
| `prepared` | `teacher_file`, `identities`, `share` | what all trials share is there; once, before the first trial |
| `suggest` | `arm`, `number`, `proposal`, `params` | a trial was made: what the sampler chose, what the trial is given |
| `start` | `arm`, `number`, `attempt` | a worker began it, or went on from its checkpoint |
| `report` | `arm`, `number`, `epoch`, `metrics`, `decision` | one epoch's metrics and what was decided on them |
| `retry` | `arm`, `number`, `reason`, `error`, `share` | its worker was lost; it is to go on from its checkpoint |
| `end` | `arm`, `number`, `status`, `reason`, `epoch`, `value` | the trial is over |
| `stop` | `reason`, `error` | the driver let go: `finished`, `interrupted`, `time_budget`, `failed` or `trouble` |

`identities` names by content what the results depend on besides the config: data, weights, a user's code. `places` of a
`driver` event are config keys whose files have moved, with where they are. A ledger of version 2 has no `prepared`: its
`teacher_file` stands in the `sweep` event, and it has no identities.

A `retry` has the reason `crash`, `oom` or `node`; its `share` is the [CPUs, GPUs] of the next attempt where they are
other than the sweep's.

An `arm` is what a trial belongs to: `search`, or the method of a baseline (`ce`, `kd`). Trials are numbered from 0 in
each arm; the search's are the sweep's trials.
"""

import bisect
import contextlib
import enum
import json
import math
import os
import socket
import time
import zlib
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import field
from pathlib import Path
from types import TracebackType
from typing import Any
from typing import NamedTuple
from typing import Protocol
from typing import Self

from tune_topkd.config import Scalar
from tune_topkd.errors import TuneTopKDError
from tune_topkd.storage import Lock
from tune_topkd.storage import lock
from tune_topkd.storage import sync
from tune_topkd.storage import sync_stream

LEDGER_VERSION = 3
_READABLE_VERSIONS = (1, 2, 3)  # 1 has no `retry`, 1 and 2 have no `prepared`
_FIRST_WITH_PREPARED = 3
LEDGER_FILE = "ledger.jsonl"
SEARCH = "search"
_LOCK_TRIES = 5
_LOCK_PAUSE = 0.02
_LARGEST_CLOCK_STEP = 60.0


class LedgerError(TuneTopKDError):
    """A ledger that cannot be used: damaged, of another version, or driven by another process."""


class TrialStatus(enum.StrEnum):
    """What became of a trial."""

    RUNNING = "running"
    COMPLETED = "completed"
    """Reached the full budget of epochs."""
    PRUNED = "pruned"
    """Stopped early by ASHA."""
    FAILED = "failed"
    """Ended without an answer; the reason says why."""

    @property
    def is_end(self) -> bool:
        """Whether the trial is over."""
        return self is not TrialStatus.RUNNING


class Decision(enum.StrEnum):
    """What was decided on a report."""

    CONTINUE = "continue"
    COMPLETE = "complete"
    """The full budget is reached."""
    PRUNE = "prune"
    DIVERGED = "diverged"
    """A metric is NaN or infinite."""


class Share(NamedTuple):
    """What a trial gets of a node."""

    cpus: float
    gpus: float


class TrialKey(NamedTuple):
    """A trial's identity within its sweep."""

    arm: str
    number: int

    def __str__(self) -> str:
        return f"{self.number:04d}" if self.arm == SEARCH else f"{self.arm}-{self.number:04d}"


@dataclass(frozen=True)
class Event:
    """One line of a ledger."""

    seq: int
    time: float
    name: str
    data: Mapping[str, Any]

    @property
    def key(self) -> TrialKey:
        """The trial that the event is about; only for events that have one."""
        return TrialKey(self.data["arm"], self.data["number"])


@dataclass
class TrialRecord:
    """All that the ledger tells of one trial."""

    key: TrialKey
    params: dict[str, Scalar]
    proposal: dict[str, Scalar]
    status: TrialStatus = TrialStatus.RUNNING
    reason: str = ""
    error: str = ""
    value: float | None = None
    """The metric at the last epoch; none for a failed trial."""
    reports: dict[int, dict[str, float]] = field(default_factory=dict)
    """Metrics by epoch, from 1."""
    decision: Decision | None = None
    """The last report's."""
    attempts: int = 0
    retries: list[str] = field(default_factory=list)
    """The reason of each `retry`."""
    nodes_lost: int = 0
    """Nodes that it has lost since its last report."""
    share: Share | None = None
    """What it is to get of a node, where that is other than the sweep's."""
    suggested_at: float = 0.0
    ended_at: float | None = None

    @property
    def epoch(self) -> int:
        """The last epoch reported; 0 before the first."""
        return max(self.reports, default=0)


class Tracker(Protocol):
    """Something that watches a sweep: an MLflow logger, a progress display.

    **Threads.** `notify` is called on the sweep's own thread, once for each event, in order, after the event is on disk;
    it must return at once. **Failures.** A tracker that raises is reported once and not called again in this run: it
    never ends or slows a sweep. What it missed is in the ledger.
    """

    def notify(self, event: Event) -> None:
        """An event has been written."""

    def close(self) -> None:
        """The sweep's run is over; called once."""


class SweepState:
    """A sweep as its ledger tells it so far; `apply` takes the events in order."""

    def __init__(self) -> None:
        self.header: Mapping[str, Any] = {}
        self.started_at = 0.0
        self.trials: dict[TrialKey, TrialRecord] = {}
        self._by_arm: dict[str, list[TrialRecord]] = {}
        self.ended: list[TrialRecord] = []
        """The trials of all arms that are over, in the order of their ends."""
        self.forgiven = 0
        """How many of `ended` lie before a driver that went on where the one before had `failed`."""
        self.target = 0
        """How many trials the search is to have."""
        self.stop_reason = ""
        """Why the last driver let go; empty while one is at work, or when it was killed."""
        self.stop_error = ""
        """What the last driver's `stop` said of it, in one line."""
        self.last_driver: Mapping[str, Any] = {}
        self.prepared: Mapping[str, Any] = {}
        """What all trials share, as the `prepared` event has it; empty before it."""
        self.places: dict[str, str] = {}
        """Where files that have moved are now, by config key."""
        self.driver_since = 0.0
        self.last_seq = -1

    @property
    def is_prepared(self) -> bool:
        """Whether what all trials share is there; before that no trial can have begun."""
        return bool(self.prepared) or bool(self.trials) or self.header["version"] < _FIRST_WITH_PREPARED

    @property
    def teacher_file(self) -> Mapping[str, Any]:
        """The teacher's key and validation top-1; empty without a teacher, or before it is there."""
        found: Mapping[str, Any] = self.prepared.get("teacher_file") or self.header.get("teacher_file") or {}
        return found

    def apply(self, event: Event) -> None:
        """Take the next event into account.

        Raises:
            LedgerError: if the event cannot follow the ones before it.
        """
        if event.seq != self.last_seq + 1:
            raise LedgerError(
                f"line {event.seq + 1}: follows line {self.last_seq + 1}, so lines are missing or doubled"
            )
        match event.name:
            case "sweep":
                self._apply_header(event)
            case "driver":
                self.forgiven = len(self.ended) if self.stop_reason == "failed" else self.forgiven
                self.last_driver, self.stop_reason, self.target = event.data, "", event.data["trials"]
                self.places |= event.data.get("places", {})
                self.driver_since = event.time
            case "prepared":
                self._apply_prepared(event)
            case "stop":
                self.stop_reason, self.stop_error = event.data["reason"], event.data.get("error", "")
            case "suggest":
                self._apply_suggest(event)
            case "start" | "report" | "retry" | "end":
                self._apply_to_trial(event)
            case _:
                raise LedgerError(f"line {event.seq + 1}: unknown event {event.name!r}")
        self.last_seq = event.seq

    def taking_back(self, events: Iterable[Event]) -> Callable[[], None]:
        """What undoes the next events, however many of them have been applied, even one in part; may be called again."""
        keys = {event.key for event in events if "number" in event.data}
        values, places, ended = dict(vars(self)), dict(self.places), len(self.ended)
        records = {key: vars(self.trials[key]).copy() for key in keys if key in self.trials}
        reports = {key: dict(self.trials[key].reports) for key in records}

        def take_back() -> None:
            for key in keys:
                if key in records:
                    vars(self.trials[key]).update(records[key] | {"reports": reports[key]})
                else:
                    self.trials.pop(key, None)
                    self._by_arm[key.arm] = [r for r in self._by_arm.get(key.arm, []) if r.key != key]
            del self.ended[ended:]
            for arm in [arm for arm, trials in self._by_arm.items() if not trials]:
                del self._by_arm[arm]
            vars(self).update(values | {"places": places})

        return take_back

    def arm(self, arm: str) -> list[TrialRecord]:
        """The trials of one arm by number."""
        return list(self._by_arm.get(arm, []))

    def size(self, arm: str = SEARCH) -> int:
        """How many trials the arm has."""
        return len(self._by_arm.get(arm, ()))

    def running(self) -> list[TrialRecord]:
        """The trials without an end, in the order they were suggested."""
        return [record for record in self.trials.values() if not record.status.is_end]

    def counts(self, arm: str = SEARCH) -> dict[str, int]:
        """How many trials of the arm have each status."""
        counts = {status.value: 0 for status in TrialStatus}
        for record in self.arm(arm):
            counts[record.status.value] += 1
        return counts

    def ranked(self, arm: str = SEARCH) -> list[TrialRecord]:
        """The arm's trials that reached the full budget, best first; of equals the earlier one first."""
        done = [r for r in self.arm(arm) if r.status is TrialStatus.COMPLETED and r.value is not None]
        return sorted(done, key=lambda r: (-(r.value or 0.0), r.key.number))

    def best(self, arm: str = SEARCH) -> TrialRecord | None:
        """The best trial that reached the full budget, if any did."""
        return next(iter(self.ranked(arm)), None)

    def _apply_header(self, event: Event) -> None:
        if event.seq != 0:
            raise LedgerError(f"line {event.seq + 1}: a second `sweep` event")
        if event.data["version"] not in _READABLE_VERSIONS:
            known = f"{', '.join(map(str, _READABLE_VERSIONS[:-1]))} and {_READABLE_VERSIONS[-1]}"
            rule = f"this is ledger version {event.data['version']!r}; this program reads versions {known}"
            raise LedgerError(f"line 1: {rule}")
        self.header, self.started_at, self.target = event.data, event.time, event.data["trials"]

    def _apply_prepared(self, event: Event) -> None:
        if self.prepared:
            raise LedgerError(f"line {event.seq + 1}: a second `prepared` event")
        self.prepared = event.data

    def _apply_suggest(self, event: Event) -> None:
        key = event.key
        if key in self.trials:
            raise LedgerError(f"line {event.seq + 1}: trial {key} is suggested a second time")
        data = event.data
        record = TrialRecord(key, dict(data["params"]), dict(data["proposal"]), suggested_at=event.time)
        self.trials[key] = record
        bisect.insort(self._by_arm.setdefault(key.arm, []), record, key=lambda r: r.key.number)

    def _apply_to_trial(self, event: Event) -> None:
        record = self.trials.get(event.key)
        if record is None or record.status.is_end:
            what = "was never suggested" if record is None else f"is already {record.status}"
            raise LedgerError(f"line {event.seq + 1}: `{event.name}` for trial {event.key}, which {what}")
        data = event.data
        if event.name == "start":
            record.attempts = data["attempt"]
        elif event.name == "report":
            if data["epoch"] in record.reports:
                raise LedgerError(f"line {event.seq + 1}: trial {event.key} reports epoch {data['epoch']} again")
            metrics, decision = _decoded(data["metrics"]), Decision(data["decision"])
            record.reports[data["epoch"]], record.decision, record.nodes_lost = metrics, decision, 0
        elif event.name == "retry":
            share = None if data["share"] is None else Share(*data["share"])
            record.retries, record.share = [*record.retries, data["reason"]], share
            record.nodes_lost += data["reason"] == "node"
        else:
            value = None if data["value"] is None else float(data["value"])
            record.status, record.reason, record.value = TrialStatus(data["status"]), data["reason"], value
            record.error, record.ended_at = data.get("error", ""), event.time
            self.ended.append(record)


class Ledger:
    """The ledger opened for writing, by the one process that drives the sweep.

    **Durability.** `append` returns when its lines are on the disk. **Ownership.** The file is locked while it is open; a
    second process is refused. **Crashes.** After a kill at any instant, opening it again gives every event whose `append`
    returned, and perhaps the one in flight.
    """

    def __init__(self, path: Path, state: SweepState, stream: Any) -> None:
        self.path = path
        self.state = state
        self._stream = stream
        self._unfinished: tuple[Callable[[], None], int] | None = None
        """While events are written: what undoes them in the state, and where the file ended before."""

    @classmethod
    def create(
        cls,
        path: Path,
        before: Callable[[], object] = lambda: None,
        may_replace: Callable[[SweepState], bool] = lambda state: False,
        undo: Callable[[], object] = lambda: None,
        /,
        **header: Any,
    ) -> Self:
        """Start a new ledger with its `sweep` event. Of several processes that try at once, one succeeds.

        A file without a whole line, which a kill has left, counts as none.

        Args:
            path: the file.
            before: called once the file is this process's, before its first line is written.
            may_replace: whether a ledger that is there, and that no process drives, may be begun anew.
            undo: called if it cannot be begun after `before` was called, while the file is still this process's.
            header: of the `sweep` event.

        Raises:
            LedgerError: the file exists, or another process is about to begin it.
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
                ledger = cls(path, SweepState(), stream)
                ledger.append(("sweep", {"version": LEDGER_VERSION, **header}))
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
        self.path.unlink()
        self.close()

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open an existing ledger, dropping a last line that a kill has torn.

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
        return cls(path, state, stream)

    def append(self, *events: tuple[str, Mapping[str, Any]]) -> list[Event]:
        """Write events, in one piece, and return when they are on the disk.

        If it raises, for whatever reason and at whatever instant, nothing of these events is kept, neither in the file
        nor in the state, and others can be written.

        Raises:
            OSError: the disk refused.
            LedgerError: the events cannot follow those before them, or the disk will not let go of what an earlier append
                has left.
        """
        if not self._take_back():
            raise LedgerError(f"{self.path}: an earlier write has failed; what was written until then is safe")
        start = self._stream.tell()
        written = [
            Event(seq, round(time.time(), 3), name, _encoded(data))
            for seq, (name, data) in enumerate(events, start=self.state.last_seq + 1)
        ]
        content = b"".join(map(_line, written))
        self._unfinished = self.state.taking_back(written), start
        try:
            for event in written:
                self.state.apply(event)
            _write_all(self._stream, content)
            sync_stream(self._stream)
        except BaseException as error:
            if isinstance(error, OSError) and error.filename is None:
                error.filename = str(self.path)
            self._take_back()
            raise
        self._unfinished = None
        return written

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
    state = SweepState()
    for event in read_events(path)[0]:
        _apply(path, state, event)
    if not state.header:
        raise LedgerError(f"{path}: has no `sweep` event; the sweep never began")
    return state


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


def driver_identity() -> dict[str, Any]:
    """Who drives: what a `driver` event says of this process."""
    return {"host": socket.gethostname(), "pid": os.getpid()}


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
        if state.last_driver and not state.stop_reason:
            who = f"process {state.last_driver['pid']} on {state.last_driver['host']}"
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
    if not driver or state.stop_reason or driver["host"] != socket.gethostname() or driver["pid"] == os.getpid():
        return False
    try:
        ticks = int(Path(f"/proc/{driver['pid']}/stat").read_text().rpartition(")")[2].split()[19])
        since_boot = float(Path("/proc/uptime").read_text().split()[0])
    except OSError:
        return False
    began = time.time() - since_boot + ticks / os.sysconf("SC_CLK_TCK")
    return began <= state.driver_since + _LARGEST_CLOCK_STEP  # else a later process has been given the number


def _replay(path: Path, content: bytes) -> SweepState:
    state = SweepState()
    for event in _parse(path, content, known_before=False):
        _apply(path, state, event)
    if not state.header:
        raise LedgerError(f"{path}: has no `sweep` event; the sweep never began")
    return state


def _apply(path: Path, state: SweepState, event: Event) -> None:
    try:
        state.apply(event)
    except LedgerError as error:
        raise LedgerError(f"{path}: {error}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise LedgerError(f"{path}: line {event.seq + 1}: `{event.name}` is incomplete: {error!r}") from error


def _parse(path: Path, content: bytes, *, known_before: bool) -> Iterator[Event]:
    for number, line in enumerate(content.split(b"\n")[:-1], start=1):
        place = "a line read later" if known_before else f"line {number}"
        body, mark, crc = line.rpartition(b',"crc":"')
        if not mark or crc != b'%08x"}' % zlib.crc32(body):
            raise LedgerError(f"{path}: {place} is not as it was written (its checksum is wrong)")
        try:
            data = json.loads(body + b"}")
            yield Event(data.pop("seq"), data.pop("time"), data.pop("event"), data)
        except (KeyError, ValueError) as error:
            raise LedgerError(f"{path}: {place} is no event: {error!r}") from error


def _line(event: Event) -> bytes:
    content = {"seq": event.seq, "time": event.time, "event": event.name, **event.data}
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    body = text.encode(errors="backslashreplace")[:-1]  # a lone surrogate, of an odd file name, as JSON escapes it
    return b'%s,"crc":"%08x"}\n' % (body, zlib.crc32(body))


def _encoded(data: Mapping[str, Any]) -> dict[str, Any]:
    """Event data as plain JSON values; NaN and infinities, which JSON lacks, become strings."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(k): plain(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [plain(v) for v in value]
        if isinstance(value, enum.Enum):
            return value.value
        if isinstance(value, float) and not math.isfinite(value):
            return str(value)
        return value

    encoded: dict[str, Any] = plain(data)
    return encoded


def _decoded(metrics: Mapping[str, float | str]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items()}


def _write_all(stream: Any, content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[stream.write(view) :]


def tell_all(trackers: Iterable[Tracker], event: Event) -> list[tuple[Tracker, Exception]]:
    """Notify each tracker; those that raised are returned with what they raised, to be dropped and named."""
    failed = []
    for tracker in trackers:
        try:
            tracker.notify(event)
        except Exception as error:  # noqa: BLE001 (observing may fail; the caller says so and drops it)
            failed.append((tracker, error))
    return failed
