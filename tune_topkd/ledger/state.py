"""What a ledger tells: a sweep and its trials as they stand after some of its lines."""

import bisect
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import field
from typing import Any

from tune_topkd.config import Scalar
from tune_topkd.ledger.events import REPEATING
from tune_topkd.ledger.events import SEARCH
from tune_topkd.ledger.events import Confirm
from tune_topkd.ledger.events import Decision
from tune_topkd.ledger.events import Driver
from tune_topkd.ledger.events import End
from tune_topkd.ledger.events import Event
from tune_topkd.ledger.events import Finalists
from tune_topkd.ledger.events import Header
from tune_topkd.ledger.events import LedgerError
from tune_topkd.ledger.events import Look
from tune_topkd.ledger.events import Plateau
from tune_topkd.ledger.events import Prepared
from tune_topkd.ledger.events import Repeat
from tune_topkd.ledger.events import Report
from tune_topkd.ledger.events import Retry
from tune_topkd.ledger.events import Share
from tune_topkd.ledger.events import Start
from tune_topkd.ledger.events import Stop
from tune_topkd.ledger.events import Suggest
from tune_topkd.ledger.events import TeacherFile
from tune_topkd.ledger.events import TrialContent
from tune_topkd.ledger.events import TrialKey
from tune_topkd.ledger.events import TrialStatus

_FIRST_WITH_PREPARED = 3  # the ledger version
_NO_HEADER = Header(sweep="", id="", seed=0, trials=0)


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
    of_trial: TrialKey | None = None
    """The trial that it repeats, if it does."""
    seed: int | None = None
    """Of its training, where that is other than the sweep's."""

    @property
    def origin(self) -> TrialKey:
        """The trial that it repeats, or itself: whose method and parameters it has."""
        return self.of_trial or self.key

    @property
    def epoch(self) -> int:
        """The last epoch reported; 0 before the first."""
        return max(self.reports, default=0)


class SweepState:
    """A sweep as its ledger tells it so far; `apply` takes the events in order."""

    def __init__(self) -> None:
        self.header = _NO_HEADER
        """What the first line says; an empty one before it."""
        self.started_at = 0.0
        self.trials: dict[TrialKey, TrialRecord] = {}
        self._by_arm: dict[str, list[TrialRecord]] = {}
        self.ended: list[TrialRecord] = []
        """The trials of all arms that are over, in the order of their ends."""
        self.forgiven = 0
        """How many of `ended` lie before a driver that went on where the one before had `failed`."""
        self.target = 0
        """How many trials the search is to have."""
        self.finalists: Finalists | None = None
        """Which trials are repeated once the search is over; None if none are."""
        self.confirm: Confirm | None = None
        """How the answer is to be confirmed; None if nobody asked for it."""
        self.looks: tuple[Look, ...] = ()
        """The looks at the test set that there have been."""
        self.gpu_hours: float | None = None
        """Of training, times GPUs, after which the sweep stops; None without such a limit."""
        self.cpu_hours: float | None = None
        self.asked = 0
        """The most trials that any driver was to run; a plateau lowers the target, and not this."""
        self.plateau: Plateau | None = None
        """Why the search ended before its last trial, where it did and nobody asked for more."""
        self.plateau_after = 0
        """How many of `ended` lie before the last plateau."""
        self.stop_reason = ""
        """Why the last driver let go; empty while one is at work, or when it was killed."""
        self.stop_error = ""
        """What the last driver's `stop` said of it, in one line; empty as `stop_reason` is."""
        self.last_driver: Driver | None = None
        self.drivers = 0
        """How many processes have driven it, the last one included."""
        self.prepared: Prepared | None = None
        """What all trials share; None before the `prepared` event."""
        self.places: dict[str, Any] = {}
        """Where files that have moved are now, by config key."""
        self.driver_since = 0.0
        self.last_seq = -1

    @property
    def has_begun(self) -> bool:
        """Whether there is a first line."""
        return self.last_seq >= 0

    @property
    def is_prepared(self) -> bool:
        """Whether what all trials share is there; before that no trial can have begun."""
        return self.prepared is not None or bool(self.trials) or self.header.version < _FIRST_WITH_PREPARED

    @property
    def teacher_file(self) -> TeacherFile | None:
        """Which teacher the sweep learns from; None without one, or before it is there."""
        return self.header.teacher_file if self.prepared is None else self.prepared.teacher_file

    @property
    def identities(self) -> Mapping[str, str]:
        """What results depend on besides the config, by content; empty before it is known, and in older ledgers."""
        return {} if self.prepared is None else self.prepared.identities

    def apply(self, event: Event) -> None:
        """Take the next event into account.

        Raises:
            LedgerError: if the event cannot follow the ones before it.
        """
        if event.seq != self.last_seq + 1:
            raise LedgerError(
                f"line {event.seq + 1}: follows line {self.last_seq + 1}, so lines are missing or doubled"
            )
        match event.content:
            case Header() as header:
                if event.seq != 0:
                    raise LedgerError(f"line {event.seq + 1}: a second `sweep` event")
                self.header, self.started_at, self.target = header, event.time, header.trials
            case Driver() as driver:
                self.forgiven = len(self.ended) if self.stop_reason == "failed" else self.forgiven
                self.last_driver, self.stop_reason, self.stop_error, self.target = driver, "", "", driver.trials
                self.drivers += 1
                self.asked = max(self.asked, driver.trials)
                self.places |= driver.places
                self.finalists = driver.finalists or self.finalists
                self.driver_since = event.time
                self.gpu_hours, self.cpu_hours = driver.gpu_hours, driver.cpu_hours
                if driver.trials > self.size():
                    self.plateau = None
            case Prepared() as prepared:
                if self.prepared is not None:
                    raise LedgerError(f"line {event.seq + 1}: a second `prepared` event")
                self.prepared = prepared
            case Plateau() as plateau:
                if plateau.trials != self.size():
                    raise LedgerError(
                        f"line {event.seq + 1}: a plateau of {plateau.trials} trials, where there are {self.size()}"
                    )
                self.target, self.plateau, self.plateau_after = plateau.trials, plateau, len(self.ended)
            case Stop() as stop:
                self.stop_reason, self.stop_error = stop.reason, stop.error
            case Confirm() as confirm:
                self._check_known(event, confirm.finalists)
                self.confirm = confirm
            case Look() as look:
                self._check_known(event, look.trials)
                self.looks += (look,)
            case Suggest() as suggest:
                record = TrialRecord(suggest.key, dict(suggest.params), dict(suggest.proposal))
                self._add(event, record)
            case Repeat() as repeat:
                self._apply_repeat(event, repeat)
            case _:
                self._apply_to_trial(event)
        self.last_seq = event.seq

    def taking_back(self, events: Iterable[Event]) -> Callable[[], None]:
        """What undoes the next events, however many of them have been applied, even one in part; may be called again."""
        keys = {event.key for event in events if isinstance(event.content, TrialContent)}
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

    def baseline_methods(self) -> list[str]:
        """The methods of the baselines that have trials, by name."""
        return sorted(self._by_arm.keys() - {SEARCH} - REPEATING)

    def ranked(self, arm: str = SEARCH) -> list[TrialRecord]:
        """The arm's trials that reached the full budget, best first; of equals the earlier one first."""
        done = [r for r in self.arm(arm) if r.status is TrialStatus.COMPLETED and r.value is not None]
        return sorted(done, key=lambda r: (-(r.value or 0.0), r.key.number))

    def best(self, arm: str = SEARCH) -> TrialRecord | None:
        """The best trial that reached the full budget, if any did."""
        return next(iter(self.ranked(arm)), None)

    def _check_known(self, event: Event, keys: Iterable[TrialKey]) -> None:
        for key in keys:
            if key not in self.trials or key.arm in REPEATING:
                raise LedgerError(f"line {event.seq + 1}: `{event.name}` names trial {key}, which was never suggested")

    def _apply_repeat(self, event: Event, repeat: Repeat) -> None:
        original = self.trials.get(repeat.of_trial)
        if repeat.key.arm not in REPEATING:
            raise LedgerError(f"line {event.seq + 1}: `repeat` for trial {repeat.key}, which is of another arm")
        if original is None or original.of_trial is not None:
            what = "was never suggested" if original is None else "is a repeat itself"
            raise LedgerError(f"line {event.seq + 1}: trial {repeat.key} repeats trial {repeat.of_trial}, which {what}")
        params, proposal = dict(original.params), dict(original.proposal)
        self._add(event, TrialRecord(repeat.key, params, proposal, of_trial=repeat.of_trial, seed=repeat.seed))

    def _add(self, event: Event, record: TrialRecord) -> None:
        key = record.key
        if key in self.trials:
            raise LedgerError(f"line {event.seq + 1}: trial {key} is suggested a second time")
        if (key.arm in REPEATING) != (record.of_trial is not None):
            raise LedgerError(f"line {event.seq + 1}: trial {key} does not say which trial it repeats")
        record.suggested_at = event.time
        self.trials[key] = record
        bisect.insort(self._by_arm.setdefault(key.arm, []), record, key=lambda r: r.key.number)

    def _apply_to_trial(self, event: Event) -> None:
        record = self.trials.get(event.key)
        if record is None or record.status.is_end:
            what = "was never suggested" if record is None else f"is already {record.status}"
            raise LedgerError(f"line {event.seq + 1}: `{event.name}` for trial {event.key}, which {what}")
        match event.content:
            case Start() as start:
                record.attempts = start.attempt
            case Report() as report:
                if report.epoch in record.reports:
                    raise LedgerError(f"line {event.seq + 1}: trial {event.key} reports epoch {report.epoch} again")
                record.reports[report.epoch], record.decision = dict(report.metrics), report.decision
                record.nodes_lost = 0
            case Retry() as retry:
                record.retries, record.share = [*record.retries, retry.reason], retry.share
                record.nodes_lost += retry.reason == "node"
            case End() as end:
                record.status, record.reason, record.error = end.status, end.reason, end.error
                record.value, record.ended_at = end.value, event.time
                self.ended.append(record)
