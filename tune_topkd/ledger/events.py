"""The lines of a ledger: what each of them says, and how it is written.

A line is a JSON object: `seq` (its line number, from 0), `time` (seconds since 1970), `event`, the event's own keys, and
`crc`, the CRC-32 of the line without it. The events, in the order they come, each with a class of its own:

| event | class | meaning |
|---|---|---|
| `sweep` | `Header` | first line, once: which sweep this is |
| `driver` | `Driver` | a process began to drive the sweep, towards a number of trials |
| `prepared` | `Prepared` | what all trials share is there; once, before the first trial |
| `suggest` | `Suggest` | a trial was made: what the sampler chose, what the trial is given |
| `confirm` | `Confirm` | the answer is to be confirmed: which trials are the finalists, on how many fresh seeds |
| `test` | `Look` | the test set is about to be read: for which trials, trained again on which seeds |
| `repeat` | `Repeat` | a trial was made that is another one on another seed |
| `plateau` | `Plateau` | the search is over: its newest trials brought less than the noise |
| `start` | `Start` | a worker began it, or went on from its checkpoint |
| `report` | `Report` | one epoch's metrics and what was decided on them |
| `retry` | `Retry` | its worker was lost; it is to go on from its checkpoint |
| `end` | `End` | the trial is over |
| `stop` | `Stop` | the driver let go |

The keys of a line are the fields of its class, in their order; a trial's `key` is written as `arm` and `number`. A reader
passes over keys that it does not know, and a field with a default may be missing, as in a ledger of an older version.
Version 1 has no `retry`. Versions 1 and 2 have no `prepared`: their `teacher_file` stands in the `sweep` event. A program
that does not know `repeat`, `confirm`, `test` or `plateau` refuses the line, so it takes no repeat for a trial of the
search or of a baseline.
"""

import dataclasses
import enum
import json
import math
import os
import socket
import zlib
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field
from typing import Any
from typing import ClassVar
from typing import NamedTuple
from typing import Self
from typing import TypeAlias

from tune_topkd.config import OBJECTIVE
from tune_topkd.config import OBJECTIVE_TEST
from tune_topkd.config import FinalistsConfig
from tune_topkd.config import Scalar
from tune_topkd.errors import TuneTopKDError

LEDGER_VERSION = 3
_READABLE_VERSIONS = (1, 2, 3)
SEARCH = "search"
"""The arm of the search's own trials."""
REPEAT = "repeat"
"""The arm of the trials that repeat others on fresh seeds."""
TEST = "test"
"""The arm of the trials that repeat others on all images but those of the test set, and are evaluated on it once."""
REPEATING = frozenset({REPEAT, TEST})
"""The arms whose trials are others' again."""


class LedgerError(TuneTopKDError):
    """A ledger that cannot be used: damaged, of another version, or driven by another process."""


class TrialStatus(enum.StrEnum):
    """What became of a trial."""

    RUNNING = "running"
    COMPLETED = "completed"
    """Reached the full budget of epochs."""
    PRUNED = "pruned"
    """Stopped early by the scheduler."""
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
    COLLAPSED = "collapsed"
    """Top-1 stays at chance."""


FELL_APART = (Decision.DIVERGED, Decision.COLLAPSED)
"""Decisions that a training has come to nothing by itself; they are the reasons of its end, too."""


class Share(NamedTuple):
    """What a trial gets of a node."""

    cpus: float
    gpus: float

    @classmethod
    def of(cls, values: Sequence[float] | None) -> Self | None:
        """From the list that a line has, if it has one."""
        return None if values is None else cls(*values)

    def times_on(self, node: "Share") -> int:
        """How many trials that get this fit at once on a node that has so much."""
        by_cpu = math.floor(node.cpus / self.cpus + 1e-9)
        if self.gpus == 0:
            return by_cpu
        by_gpu = node.gpus * math.floor(1 / self.gpus + 1e-9) if self.gpus <= 1 else node.gpus // self.gpus
        return min(by_cpu, int(by_gpu))


class TeacherFile(NamedTuple):
    """Which teacher a sweep learns from."""

    key: str
    """Of its content, in hex."""
    val_top1: float
    """In percent, on the validation split."""

    @classmethod
    def of(cls, values: Mapping[str, Any] | None) -> Self | None:
        """From the mapping that a line has; it is empty where there is no teacher."""
        return cls(values["key"], values["val_top1"]) if values else None


@dataclass(frozen=True)
class Finalists:
    """How many of a search's best trials are repeated when it is over, and how often."""

    count: int
    seeds: int
    """The fresh seeds on which each is trained once more."""
    baselines: int = 1
    """How many of each baseline's best trials are repeated beside them."""

    @classmethod
    def of(cls, values: Mapping[str, Any] | None) -> Self | None:
        """From the mapping that a line has, if it has one."""
        return None if values is None else cls(values["count"], values["seeds"], values.get("baselines", 1))

    @classmethod
    def configured(cls, settings: FinalistsConfig | None) -> Self | None:
        """What a config says of them."""
        return None if settings is None else cls(settings.count, settings.seeds, settings.baselines)


class TrialKey(NamedTuple):
    """A trial's identity within its sweep.

    The arm is what it belongs to: `search`, a baseline (`ce`, `kd`, `defaults`), `repeat` or `test`. Each arm numbers its
    trials from 0.
    """

    arm: str
    number: int

    @property
    def metric(self) -> str:
        """What is the trial's value, at its last epoch."""
        return OBJECTIVE_TEST if self.arm == TEST else OBJECTIVE

    def __str__(self) -> str:
        return f"{self.number:04d}" if self.arm == SEARCH else f"{self.arm}-{self.number:04d}"


# --- what a line says -----------------------------------------------------------------------------------------------

_Parsers: TypeAlias = Mapping[str, Callable[[Any], object]]
"""By field: what makes its value of what JSON can hold, where that is not the value itself."""


@dataclass(frozen=True, kw_only=True)
class Content:
    """What a line says, but for its number and time."""

    NAME: ClassVar[str]
    """The line's `event`."""
    _PARSERS: ClassVar[_Parsers] = {}

    def data(self) -> dict[str, Any]:
        """The line's own keys and values. Their order is part of the format."""
        return {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Self:
        """The content of a line with these keys and values.

        Raises:
            KeyError: a key is missing.
            Exception: a value is not such as this event has.
        """
        given = {}
        for each in dataclasses.fields(cls):
            if each.name in data:
                parse = cls._PARSERS.get(each.name)
                given[each.name] = parse(data[each.name]) if parse else data[each.name]
            elif each.default is dataclasses.MISSING and each.default_factory is dataclasses.MISSING:
                raise KeyError(each.name)
        return cls(**given)


@dataclass(frozen=True, kw_only=True)
class Header(Content):
    """Which sweep this is, and what it was begun with."""

    NAME = "sweep"
    _PARSERS: ClassVar[_Parsers] = {"teacher_file": TeacherFile.of}

    version: int = LEDGER_VERSION
    """Of the ledger's format."""
    sweep: str
    """Its name."""
    id: str
    seed: int
    trials: int
    """How many the search is to have."""
    baselines: int = 0
    """How many trials the baselines are to have."""
    epochs: int | None = None
    """Of a trial's full budget."""
    metric: str = ""
    """What is maximised."""
    dataset: str = ""
    num_classes: int | None = None
    teacher: str | None = None
    """The name of its network; None without a teacher."""
    student: str = ""
    """The name of its network."""
    method: str = ""
    digest: str = ""
    """Of the config."""
    space_digest: str = ""
    first: Sequence[Mapping[str, Scalar]] = field(default_factory=list)
    """Parameters that are tried before the sampler proposes any."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Of the packages that results depend on."""
    git_commit: str | None = None
    teacher_file: TeacherFile | None = None
    """In versions 1 and 2 only: `Prepared` has it."""

    def data(self) -> dict[str, Any]:
        """The line's own keys and values; `teacher_file` only where there is one."""
        data = super().data()
        del data["teacher_file"]
        return data if self.teacher_file is None else data | {"teacher_file": self.teacher_file._asdict()}

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Self:
        """The content of a line with these keys and values.

        Raises:
            LedgerError: the ledger is of another version.
            Exception: as `Content.of`.
        """
        if data["version"] not in _READABLE_VERSIONS:
            known = f"{', '.join(map(str, _READABLE_VERSIONS[:-1]))} and {_READABLE_VERSIONS[-1]}"
            raise LedgerError(f"this is ledger version {data['version']!r}; this program reads versions {known}")
        return super().of(data)


@dataclass(frozen=True, kw_only=True)
class Driver(Content):
    """A process began to drive the sweep."""

    NAME = "driver"
    _PARSERS: ClassVar[_Parsers] = {"finalists": Finalists.of}

    host: str
    pid: int
    trials: int
    """How many the search is to have from now on."""
    folder: str | None = None
    """The process's working directory."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Of the packages that results depend on."""
    places: Mapping[str, Any] = field(default_factory=dict)
    """Config keys whose files have moved, with where they are."""
    finalists: Finalists | None = None
    """Which trials are to be repeated once the search is over, from now on; None leaves it as it was."""
    gpu_hours: float | None = None
    """Of training, times the GPUs of each trial, after which the sweep is to stop; None if there is no such limit."""
    cpu_hours: float | None = None
    """The same of CPUs."""

    def data(self) -> dict[str, Any]:
        """The line's own keys and values; `finalists` and hours only where there are any."""
        data = super().data()
        finalists = data.pop("finalists")
        for name in ("gpu_hours", "cpu_hours"):
            if data[name] is None:
                del data[name]
        return data if finalists is None else data | {"finalists": dataclasses.asdict(finalists)}

    @classmethod
    def here(cls, **about: Any) -> Self:
        """This process; `about` are the other fields."""
        return cls(host=socket.gethostname(), pid=os.getpid(), **about)


@dataclass(frozen=True, kw_only=True)
class Prepared(Content):
    """What all trials share is there."""

    NAME = "prepared"
    _PARSERS: ClassVar[_Parsers] = {"teacher_file": TeacherFile.of, "share": Share.of}

    digest: str | None = None
    """Of the config as it is from now on, with each trial's share as a number."""
    teacher_file: TeacherFile | None = None
    identities: Mapping[str, str] = field(default_factory=dict)
    """What results depend on besides the config, by content: data, weights, networks, a user's code."""
    identity_version: int | None = None
    """Of the rules by which identities are taken."""
    share: Share | None = None
    """What each trial gets of a node."""
    images: Mapping[str, int] = field(default_factory=dict)
    """How many images each split has: `train`, `val` and `test`."""

    def data(self) -> dict[str, Any]:
        """The line's own keys and values; an empty `teacher_file` without a teacher, `images` only where they are known."""
        teacher_file = {} if self.teacher_file is None else self.teacher_file._asdict()
        data = super().data() | {"teacher_file": teacher_file}
        if not self.images:
            del data["images"]
        return data


def _keys(values: Sequence[Sequence[Any]]) -> tuple[TrialKey, ...]:
    return tuple(TrialKey(*value) for value in values)


@dataclass(frozen=True, kw_only=True)
class Confirm(Content):
    """The answer is to be confirmed, by trainings on seeds that took no part in the search."""

    NAME = "confirm"
    _PARSERS: ClassVar[_Parsers] = {"finalists": _keys}

    finalists: Sequence[TrialKey]
    """Trials of the search, the most promising first: the one with the best mean over its fresh seeds is the answer."""
    seeds: int
    """On which each finalist, and the best trials of each baseline, are trained again, to choose."""
    test_seeds: int
    """On which the answer and the baselines are then trained once more, to be measured on the test set."""
    of_trials: int
    """How many trials the search had that they were chosen from."""
    look: int
    """Which look at the test set this one is, from 1; a figure of a later one may have been chosen by an earlier."""
    teacher: str | None = None
    """The content, in hex, of the weights of the teacher in the trainings for the test set; None without one."""
    baselines: int = 1
    """How many of each baseline's best trials are trained again, to choose."""


@dataclass(frozen=True, kw_only=True)
class Look(Content):
    """The test set is about to be read, for these trainings and no others."""

    NAME = "test"
    _PARSERS: ClassVar[_Parsers] = {"trials": _keys, "seeds": tuple}

    look: int
    """Which one it is, from 1."""
    trials: Sequence[TrialKey]
    """What is trained again: the answer first, then the best trial of each baseline."""
    seeds: Sequence[int]
    """On each of which every one of them is."""


@dataclass(frozen=True, kw_only=True)
class TrialContent(Content):
    """What a line says that is about one trial."""

    key: TrialKey

    def data(self) -> dict[str, Any]:
        """The line's own keys and values; `key` as `arm` and `number`."""
        data = super().data()
        key = data.pop("key")
        return {"arm": key.arm, "number": key.number, **data}

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Self:
        """The content of a line with these keys and values; raises as `Content.of`."""
        return super().of({**data, "key": TrialKey(data["arm"], data["number"])})


@dataclass(frozen=True, kw_only=True)
class Suggest(TrialContent):
    """A trial was made."""

    NAME = "suggest"

    proposal: Mapping[str, Scalar]
    """What the sampler chose, by the axes of the space."""
    params: Mapping[str, Scalar]
    """What the trial is given."""


@dataclass(frozen=True, kw_only=True)
class Repeat(TrialContent):
    """A trial was made that is another one, of the same parameters, on another seed.

    One of the arm `test` trains on the images of the validation split too, and its value is of the test set.
    """

    NAME = "repeat"
    _PARSERS: ClassVar[_Parsers] = {"of_trial": lambda values: TrialKey(*values)}

    of_trial: TrialKey
    """The trial that it repeats: one of the search or of a baseline."""
    seed: int
    """Of its training."""


@dataclass(frozen=True, kw_only=True)
class Start(TrialContent):
    """A worker began the trial, or went on from its checkpoint."""

    NAME = "start"

    attempt: int
    """From 1."""


def _floats(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items()}


@dataclass(frozen=True, kw_only=True)
class Report(TrialContent):
    """One epoch's metrics, and what was decided on them."""

    NAME = "report"
    _PARSERS: ClassVar[_Parsers] = {"metrics": _floats, "decision": Decision}

    epoch: int
    """From 1."""
    metrics: Mapping[str, float]
    decision: Decision


@dataclass(frozen=True, kw_only=True)
class Retry(TrialContent):
    """The trial's worker was lost, and the trial is to go on from its checkpoint."""

    NAME = "retry"
    _PARSERS: ClassVar[_Parsers] = {"share": Share.of}

    reason: str
    """`crash`, `oom` or `node`."""
    error: str
    """In one line."""
    share: Share | None
    """Of the next attempt, where it is other than the sweep's."""


@dataclass(frozen=True, kw_only=True)
class End(TrialContent):
    """The trial is over."""

    NAME = "end"
    _PARSERS: ClassVar[_Parsers] = {
        "status": TrialStatus,
        "value": lambda value: None if value is None else float(value),
    }

    epoch: int
    """The last that was reported; 0 before the first."""
    status: TrialStatus
    reason: str
    error: str = ""
    """In one line; of a failed trial."""
    value: float | None
    """The objective at the last epoch; none for a failed trial."""

    def data(self) -> dict[str, Any]:
        """The line's own keys and values: an error only of a failed trial, whose epoch comes first if it diverged."""
        data = super().data()
        if self.status is not TrialStatus.FAILED:
            del data["error"]
        elif self.reason != Decision.DIVERGED:
            data |= {"epoch": data.pop("epoch"), "value": data.pop("value")}
        return data


@dataclass(frozen=True, kw_only=True)
class Plateau(Content):
    """The search is over before its last trial: the newest ones brought less than the noise."""

    NAME = "plateau"

    trials: int
    """How many the search has, now and for good, unless somebody goes on with more."""
    best: float
    """The best value at the full budget, in percent."""
    gained: float
    """By how much the newest trials have raised it, in points."""
    newest: int
    """How many these are."""
    points: float
    """What they had to bring, at least."""

    @property
    def sentence(self) -> str:
        """In words."""
        brought = f"{self.gained:.2f} points" if self.gained else "nothing"
        return (
            f"the search ended at a plateau, with {self.trials} trials: the newest {self.newest} brought {brought}, less "
            f"than sweep.plateau.points = {self.points:g}"
        )


@dataclass(frozen=True, kw_only=True)
class Stop(Content):
    """The driver let go."""

    NAME = "stop"

    reason: str
    """`finished`, `interrupted`, `time_budget`, `gpu_hours`, `cpu_hours`, `failed` or `trouble`."""
    error: str = ""
    """In one line: what all trials failed of, or what the trouble was."""


_CLASSES: Mapping[str, type[Content]] = {
    each.NAME: each
    for each in (Header, Driver, Prepared, Confirm, Look, Suggest, Repeat, Plateau, Start, Report, Retry, End, Stop)
}


# --- a line ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Event:
    """One line of a ledger."""

    seq: int
    """Its line number, from 0."""
    time: float
    """Seconds since 1970."""
    content: Content

    @property
    def name(self) -> str:
        """Which event it is."""
        return self.content.NAME

    @property
    def key(self) -> TrialKey:
        """The trial that the event is about; only for events that have one."""
        assert isinstance(self.content, TrialContent), f"`{self.name}` is about no trial"
        return self.content.key

    @property
    def data(self) -> dict[str, Any]:
        """The line's own keys and values as JSON can hold them: NaN and infinities, which it lacks, are strings."""
        data: dict[str, Any] = _plain(self.content.data())
        return data


def encode(event: Event) -> bytes:
    """The line of an event, with its end.

    Raises:
        TypeError: a value is nothing that JSON can hold.
    """
    content = {"seq": event.seq, "time": event.time, "event": event.name, **event.data}
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    body = text.encode(errors="backslashreplace")[:-1]  # a lone surrogate, of an odd file name, as JSON escapes it
    return b'%s,"crc":"%08x"}\n' % (body, zlib.crc32(body))


def decode(line: bytes, place: str) -> Event:
    """The event of a line without its end; `place` names the line in errors.

    Raises:
        LedgerError: it is not as it was written, or says nothing that this version knows.
    """
    body, mark, crc = line.rpartition(b',"crc":"')
    if not mark or crc != b'%08x"}' % zlib.crc32(body):
        raise LedgerError(f"{place} is not as it was written (its checksum is wrong)")
    try:
        data = json.loads(body + b"}")
        seq, time, name = data.pop("seq"), data.pop("time"), data.pop("event")
    except (KeyError, ValueError) as error:
        raise LedgerError(f"{place} is no event: {error!r}") from error
    if name not in _CLASSES:
        raise LedgerError(f"line {seq + 1}: unknown event {name!r}")
    try:
        return Event(seq, time, _CLASSES[name].of(data))
    except LedgerError as error:
        raise LedgerError(f"line {seq + 1}: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise LedgerError(f"line {seq + 1}: `{name}` is incomplete: {error!r}") from error


_AS_THEY_ARE = frozenset({str, int, bool, type(None)})


def _plain(value: Any) -> Any:
    if type(value) in _AS_THEY_ARE:  # most values, and to ask whether they are mappings takes longer than all else
        return value
    if type(value) is float:
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
