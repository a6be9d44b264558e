"""What a sweep's seeds say: its answer and the baselines on fresh seeds or on the test set, and how sure that is.

On the test set the values are of seeds that had no part in any choice, so their means need no correction. Of the fresh seeds
by which finalists are compared, the answer's are the best of a few. What is said of both:

- **Interval**: Student's t over seeds, of a mean or of differences on the same seeds. All gains of a sweep are told
  together: their intervals are as wide as it takes for all of them to hold at once (Bonferroni), so that the sentence claims
  a difference that is none in at most 5 of 100 sweeps.
- **Two sweeps** are told apart by Welch's t: their seeds are not paired, and their spreads need not be alike.
- **Prediction interval**: where the mean of so many further trainings is to be expected (Student's t; Hahn & Meeker 1991,
  *Statistical Intervals*, §4.6). It is wider than that of the mean, and it is what a stranger's re-run is held to.
"""

import math
import statistics
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tune_topkd.config import loss_part
from tune_topkd.ledger import SEARCH
from tune_topkd.ledger import Finalist
from tune_topkd.ledger import SweepState
from tune_topkd.ledger import TrialRecord
from tune_topkd.ledger import apart_by_seed
from tune_topkd.ledger import apart_from_baselines
from tune_topkd.ledger import finalist_of
from tune_topkd.ledger import is_near_chance
from tune_topkd.ledger import is_of_the_answer
from tune_topkd.ledger import measured
from tune_topkd.ledger import measured_done
from tune_topkd.ledger import winner_of

LEVEL = 0.95
"""Of the intervals that are told."""


class Interval(NamedTuple):
    """From where to where a figure is to be expected, in the units of its values."""

    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether all of it lies on one side of zero."""
        return self.low > 0 or self.high < 0

    @property
    def of_top1(self) -> "Interval":
        """Of a top-1 in percent, as it is told: a wide one of few seeds leaves what can be, which is 0 to 100."""
        return Interval(min(max(self.low, 0.0), 100.0), min(max(self.high, 0.0), 100.0))

    @property
    def of_gain(self) -> "Interval":
        """Of a difference of two in points, as it is told: from -100 to 100."""
        return Interval(min(max(self.low, -100.0), 100.0), min(max(self.high, -100.0), 100.0))

    def __contains__(self, value: object) -> bool:
        return isinstance(value, int | float) and self.low <= value <= self.high


def mean_interval(values: Sequence[float], level: float = LEVEL, together: int = 1) -> Interval | None:
    """Where the mean lies that these values were drawn around; none of fewer than two.

    Args:
        values: independent, of one normal distribution.
        level: the share of such intervals that hold.
        together: how many intervals are to hold at once, this being one of them.
    """
    return _interval(values, 1 / len(values) if values else 0.0, level, together)


def prediction_interval(values: Sequence[float], further: int, level: float = LEVEL) -> Interval | None:
    """Where the mean of so many further values lies, drawn as these were; none of fewer than two."""
    return _interval(values, 1 / len(values) + 1 / further if values else 0.0, level, 1)


def welch_interval(first: Sequence[float], second: Sequence[float], level: float = LEVEL) -> Interval | None:
    """By how much the mean of the first is above that of the second; none where one of them has fewer than two values.

    The values are independent, and their spreads need not be alike (Welch's t).
    """
    from scipy import stats

    if min(len(first), len(second)) < 2:
        return None
    apart = statistics.fmean(first) - statistics.fmean(second)
    parts = [statistics.variance(values) / len(values) for values in (first, second)]
    if not sum(parts):
        return Interval(apart, apart)
    freedom = sum(parts) ** 2 / sum(p**2 / (len(v) - 1) for p, v in zip(parts, (first, second), strict=True))
    half = float(stats.t.ppf(1 - (1 - level) / 2, freedom)) * math.sqrt(sum(parts))
    return Interval(apart - half, apart + half)


def _interval(values: Sequence[float], variances: float, level: float, together: int) -> Interval | None:
    """Around the mean; `variances` is the figure's variance in units of one value's."""
    from scipy import stats  # takes long, and reading a tuned config does not need it

    if len(values) < 2:
        return None
    quantile = float(stats.t.ppf(1 - (1 - level) / 2 / together, len(values) - 1))
    mean, half = statistics.fmean(values), quantile * statistics.stdev(values) * math.sqrt(variances)
    return Interval(mean - half, mean + half)


@dataclass(frozen=True)
class Measured:
    """A config on the test set, after training on all other images."""

    name: str
    """In words."""
    finalist: Finalist
    """Its trainings of the newest look, the values in percent of the test images."""
    chosen_by: Finalist
    """Its trainings on other seeds, the values in percent of the validation images."""

    @property
    def record(self) -> TrialRecord:
        """The trial that it is: of the search, or the best one of a baseline."""
        return self.finalist.record

    @property
    def values(self) -> list[float]:
        """By seed."""
        return list(self.finalist.values.values())

    @property
    def spread(self) -> float | None:
        """The standard deviation over seeds; none of fewer than two."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    @property
    def interval(self) -> Interval | None:
        """Of its mean."""
        return mean_interval(self.values)


@dataclass(frozen=True)
class Apart:
    """By how much one config is above another, on the same seeds."""

    values: Sequence[float]
    """In points, by seed."""
    interval: Interval | None
    """Of the mean; as wide as it takes for those of all that is told beside it to hold together."""

    @classmethod
    def together(cls, differences: Sequence[Sequence[float]]) -> "list[Apart]":
        """Differences that are told in one breath, each by its values."""
        return [cls(values, mean_interval(values, together=len(differences))) for values in differences]

    @property
    def mean(self) -> float:
        """In points."""
        return statistics.fmean(self.values)

    @property
    def error(self) -> float | None:
        """The standard error of the mean; none of one seed."""
        return statistics.stdev(self.values) / math.sqrt(len(self.values)) if len(self.values) > 1 else None

    @property
    def is_told_apart(self) -> bool:
        """Whether there is a difference: the interval lies on one side of zero."""
        return self.interval is not None and self.interval.excludes_zero


def fresh_gains(state: SweepState) -> dict[str, Apart]:
    """By how much the answer is above the best run of each baseline, on the fresh seeds that both have a value of, by arm.

    Empty where finalists have not chosen the answer.
    """
    known = apart_from_baselines(state)
    return dict(zip(known, Apart.together(list(known.values())), strict=True))


@dataclass(frozen=True)
class Gain(Apart):
    """By how much the answer is above a baseline on the test set."""

    base: Measured

    @property
    def sentence(self) -> str:
        """In words."""
        return f"{self.mean:+.2f} points {_over(self)}"


def _over(gain: Gain) -> str:
    name = gain.base.name
    if gain.interval is None:
        return f"against {name} (one seed: nothing is sure)"
    low, high = gain.interval.of_gain
    if not gain.is_told_apart:
        return f"against {name} ({low:+.2f} to {high:+.2f}: not told apart)"
    return f"{'over' if gain.mean > 0 else 'against'} {name} ({low:+.2f} to {high:+.2f})"


_NAMES = {
    "ce": "cross-entropy",
    "kd": "KD, T = 4",
    "dkd": "DKD",
    "lskd": "logit-standardised KD",
    "defaults": "the untuned method",
}
_TUNED_NAMES = {"kd": "tuned KD", "dkd": "tuned DKD", "lskd": "tuned logit-standardised KD"}


def baseline_name(record: TrialRecord) -> str:
    """What the baseline that a trial is of is called: whether it was tuned alike shows in what it was given."""
    arm = record.origin.arm
    return _TUNED_NAMES[arm] if loss_part(record.params) else _NAMES[arm]


@dataclass(frozen=True)
class Verdict:
    """What the newest look at the test set says of a sweep's answer."""

    look: int
    """Which one it is; a later one than the first may have been prompted by what an earlier one showed."""
    answer: Measured
    baselines: Sequence[Measured]
    trainings: tuple[int, int]
    """How many have ended, and of how many."""
    effort: str
    """How much each was searched for, in a sentence."""
    classes: int | None = None
    """Of the dataset; None where it is not known."""

    @property
    def is_done(self) -> bool:
        """Whether all of its trainings have ended."""
        return self.trainings[0] == self.trainings[1]

    @property
    def gains(self) -> list[Gain]:
        """Over each baseline that has a value on a seed of the answer's."""
        pairs = [(base, apart_by_seed(self.answer.finalist, base.finalist)) for base in self.baselines]
        found = [(base, values) for base, values in pairs if values]
        told = Apart.together([values for _, values in found])
        return [Gain(apart.values, apart.interval, base) for apart, (base, _) in zip(told, found, strict=True)]

    @property
    def advice(self) -> str:
        """Which to use, in one sentence."""
        return advice(self.answer.name, {gain.base.name: (gain.mean, gain.interval) for gain in self.gains})

    @property
    def sentence(self) -> str:
        """The answer in plain words."""
        ended, total = self.trainings
        if not self.is_done:
            return (
                f"the answer is not measured yet: {ended} of {total} trainings of the test are done; `resume` goes on"
            )
        mean, interval = self.answer.finalist.mean, self.answer.interval
        if mean is None:
            return "the answer has no value on the test set: all of its trainings failed"
        within = "" if interval is None else " ({:.2f} to {:.2f})".format(*interval.of_top1)
        seeds = len(self.answer.values)
        parts = [f"{capital(self.answer.name)} has {mean:.2f} %{within} top-1 on the test set over {seeds} seeds"]
        parts += [gain.sentence for gain in self.gains]
        parts += [f"{base.name} has no value" for base in self.baselines if not base.values]
        again = (
            f" This is look {self.look} at the test set: it may have been chosen by an earlier one."
            if self.look > 1
            else ""
        )
        broken = "".join(f" Seed {seed} {how}." for seed, how in self.answer.finalist.broken.items())
        guesses = f" {capital(told)}." if (told := _guessing(self.answer.values, self.classes)) else ""
        return f"{'; '.join(parts)}. {self.advice}{broken}{guesses} {self.effort}{again}"


def advice(answer: str, gains: Mapping[str, tuple[float, Interval | None]]) -> str:
    """Which to use, in one sentence.

    Args:
        answer: its name.
        gains: of it over each baseline, by name: the mean in points, and the interval of that.
    """
    told = {name: mean for name, (mean, interval) in gains.items() if interval is not None and interval.excludes_zero}
    behind = {name: mean for name, mean in told.items() if mean < 0}
    ahead = [name for name, mean in told.items() if mean > 0]
    equal = [name for name in gains if name not in told]
    if behind:
        return f"{capital(min(behind, key=behind.__getitem__))} is the better choice here."
    if not gains:
        return "There is no baseline to compare it with."
    if not equal:
        return f"{capital(answer)} is the best of these."
    same = listed(equal)
    if ahead:
        better = listed(ahead)
        return f"{capital(answer)} is better than {better}; these seeds do not tell whether it is better than {same}."
    return f"These seeds do not tell whether {answer} is better than {same}."


def capital(text: str) -> str:
    """A text as a sentence begins."""
    return text[0].upper() + text[1:]


def listed(names: Sequence[str]) -> str:
    """Names in words: `ce, kd and defaults`."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def guessing(state: SweepState) -> str:
    """That the answer is no better than guessing, and what to do; empty where it is better, or it cannot be told.

    It is told of the newest figure: of the test set, of fresh seeds, or of one seed. Chance is that of classes of one size.
    """
    winner, verdict = winner_of(state), verdict_of_answer(state)
    if winner is None:
        return ""
    values = verdict.answer.values if verdict is not None else []
    if not values:
        values = [winner.value] if winner.finalist is None else list(winner.finalist.values.values())
    return _guessing(values, state.header.num_classes)


def _guessing(values: Sequence[float], classes: int | None) -> str:
    """The same of a top-1 on some seeds, in percent."""
    if not values or not classes or not is_near_chance(statistics.fmean(values), classes):
        return ""
    chance, interval = 100 / classes, mean_interval(values)
    if interval is not None and interval.low > chance:
        return ""
    return (
        f"top-1 is at chance ({chance:.3g} % with {classes} classes): the student has learnt nothing; train longer, or "
        "try another learning rate"
    )


def verdict_of(state: SweepState) -> Verdict | None:
    """What the newest look at a sweep's test set says; None if there was none."""
    found, done = measured(state), measured_done(state)
    if not found or done is None:
        return None
    names = [f"tuned {state.header.method}", *(baseline_name(finalist.record) for finalist in found[1:])]
    arms = [Measured(n, f, finalist_of(state, f.record)) for n, f in zip(names, found, strict=True)]
    effort = _effort(state, arms[1:])
    return Verdict(state.looks[-1].look, arms[0], arms[1:], done, effort, state.header.num_classes)


def verdict_of_answer(state: SweepState) -> Verdict | None:
    """The same, if it is done and of the trial that is the answer now; else None."""
    verdict = verdict_of(state) if is_of_the_answer(state) else None
    return verdict if verdict is not None and verdict.is_done else None


def _effort(state: SweepState, baselines: Sequence[Measured]) -> str:
    """How many trainings each was chosen from: a baseline that was searched for less may be better than it looks."""
    search = state.arm(SEARCH)
    full = sum(record.epoch for record in search) / max(state.header.epochs or 1, 1)
    own = f"the search trained {len(search)} configs, in all for as many epochs as {full:.0f} full trainings have"
    each = [f"{base.name} is the best of {state.size(base.record.key.arm)}" for base in baselines]
    return capital("; ".join([own, *each])) + "."
