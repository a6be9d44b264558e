"""What a sweep has found, in numbers and words: what tables and pages are made of."""

from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import asdict
from dataclasses import dataclass
from dataclasses import field
from typing import Any

from tune_topkd.config import ParameterRange
from tune_topkd.config import Scalar
from tune_topkd.config import SweepConfig
from tune_topkd.ledger import SweepState
from tune_topkd.verdict import Interval

NONE = "–"
"""What stands where there is no value."""
CONFIRMING = "confirming"
"""The condition of a sweep whose search is over and whose answer is being confirmed."""


def text_of(value: Scalar | None) -> str:
    """A value in few characters."""
    if value is None:
        return NONE
    if isinstance(value, bool):
        return "true" if value else "false"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def range_text(parameter: ParameterRange) -> str:
    """A range in words."""
    if parameter.choices is not None:
        return ", ".join(map(text_of, parameter.choices))
    return bounds_text(parameter) + (", logarithmic" if parameter.log else "")


def bounds_text(parameter: ParameterRange) -> str:
    """The ends of a range in words, such as `0.03 to 1`."""
    low, high = (bound if isinstance(bound, str) else f"{bound:g}" for bound in (parameter.low, parameter.high))
    return f"{low} to {high}"


INTERVALS = "in brackets are 95 % intervals over seeds; those of gains hold for all baselines of a sweep at once"
"""What must be known to read a `Figure`."""


@dataclass(frozen=True)
class Figure:
    """A mean, and where it may lie; in percent, or in points of a difference."""

    mean: float
    interval: Interval | None = None
    """At 95 %; none of one seed."""

    def of_top1(self) -> str:
        """A top-1 in words: the mean, and from where to where it may lie."""
        return self._text(self.interval and self.interval.of_top1, "")

    def of_gain(self, sign: str = "+") -> str:
        """A difference in words, with a sign; `sign` "" leaves out those of numbers above 0."""
        return self._text(self.interval and self.interval.of_gain, sign)

    def _text(self, interval: Interval | None, sign: str) -> str:
        within = "" if interval is None else f" ({interval.low:{sign}.2f} to {interval.high:{sign}.2f})"
        return f"{self.mean:{sign}.2f}{within}"

    def data(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {"mean": self.mean, "interval": None if self.interval is None else list(self.interval)}


@dataclass(frozen=True)
class Size:
    """How large a network is, and its work for one image."""

    parameters: int
    multiply_adds: int
    """In convolutions and matrix products; a multiplication with its addition counts once."""


@dataclass(frozen=True)
class EqualK:
    """The K that cannot be told from the best one."""

    values: list[int]
    how: str
    """By what they cannot."""


@dataclass(frozen=True)
class Row:
    """What a sweep found, for the table."""

    sweep: str
    dataset: str
    teacher: str
    student: str
    method: str
    state: str
    """`finished` or why its last driver let go."""
    params: Mapping[str, Scalar] = field(default_factory=dict)
    """Of the answer, complete; empty without one."""
    equal_k: EqualK | None = None
    top1: Figure | None = None
    measured_on: str = ""
    """`test set`, `fresh seeds` (the validation split), or `one seed`, which is optimistic."""
    gains: Mapping[str, Figure] = field(default_factory=dict)
    """In points over each baseline, by its name."""
    trials: int = 0
    """Of the search."""
    trainings: int = 0
    """Of all arms."""
    cpu_hours: float = 0.0
    gpu_hours: float = 0.0
    size: Size | None = None
    """Of the student; None where nobody asked, or it cannot be built here."""

    def data(self) -> dict[str, Any]:
        """As JSON can hold it."""
        equal = self.equal_k
        return {
            "sweep": self.sweep,
            "dataset": self.dataset,
            "teacher": self.teacher,
            "student": self.student,
            "method": self.method,
            "state": self.state,
            "params": dict(self.params),
            "equal_k": None if equal is None else {"values": equal.values, "how": equal.how},
            "top1": None if self.top1 is None else self.top1.data(),
            "measured_on": self.measured_on,
            "gains": {name: gain.data() for name, gain in self.gains.items()},
            "trials": self.trials,
            "trainings": self.trainings,
            "cpu_hours": round(self.cpu_hours, 4),
            "gpu_hours": round(self.gpu_hours, 4),
            **({} if self.size is None else {"size": asdict(self.size)}),
        }


@dataclass(frozen=True)
class Note:
    """Something to know before relying on an answer."""

    title: str
    text: str
    is_warning: bool = True
    """Whether it speaks against the figure; else it is worth knowing."""


@dataclass(frozen=True)
class Command:
    """A command line to be pasted, and what it does."""

    purpose: str
    text: str


@dataclass(frozen=True)
class Importance:
    """How much of the variation in top-1 goes with each parameter, by one measure."""

    measure: str
    trials: int
    """That it was measured over."""
    of: int
    """That it could have been measured over: of many a part is taken."""
    shares: Mapping[str, float]
    """By parameter, from 0 to 1."""


@dataclass(frozen=True)
class Rung:
    """A rung of the scheduler, and how well it foresaw the end."""

    epoch: int
    arrived: int
    """Trials that have reported this epoch."""
    stopped: int
    """Trials that were pruned here."""
    rank_correlation: float | None
    """With the value at the end, over the trials that got there; none where these are few."""
    trials: int
    """That the correlation is over."""


@dataclass(frozen=True)
class ArmSpend:
    """What the trials of one arm that have one status have cost."""

    arm: str
    """In words."""
    status: str
    trials: int
    seconds: float
    """Of training, each trial's own added up."""


@dataclass(frozen=True)
class ForAll:
    """The one config that is recommended for several sweeps, in words."""

    sentence: str
    """Which it is and what it loses at most, or why there is none."""
    headings: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    """What it loses on each sweep; empty where there is none."""


@dataclass(frozen=True)
class Findings:
    """All that a page tells of a sweep."""

    config: SweepConfig
    """The frozen one."""
    state: SweepState
    condition: str
    """`running`, `confirming`, `finished`, or how else its last driver let go."""
    row: Row
    lead: str
    """The answer in one sentence."""
    sentence: str
    """The same with its figures; may be empty."""
    notes: Sequence[Note]
    commands: Sequence[Command]
    defaults: Mapping[str, Scalar]
    """The parameters of loss and recipe that a trial has if nothing is searched."""
    importances: Sequence[Importance] = ()
    rungs: Sequence[Rung] = ()
    spends: Sequence[ArmSpend] = ()
    saved: float = 0.0
    """Seconds that stopping trials early has saved."""
    spend_sentence: str = ""
