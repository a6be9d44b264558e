"""The finalists of a sweep, and which trial is its answer.

The best of many trials is in part the luckiest of them. So when a search is over, its best trials and the best one of each
baseline may be repeated: trained once more, in full, on fresh seeds, the same seeds for all. The answer is then the
finalist with the best mean over these; the value that it was found by takes no part.

A sweep that is over may be confirmed: its finalists are then chosen once, at the ledger's `confirm`, and repeated on as many
seeds as it says. All of it is a function of the ledger. `unrepeated` does not ask where its trials and seeds come from.
"""

import math
import statistics
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass

from tune_topkd.ledger.events import FELL_APART
from tune_topkd.ledger.events import REPEAT
from tune_topkd.ledger.events import SEARCH
from tune_topkd.ledger.events import TrialStatus
from tune_topkd.ledger.state import SweepState
from tune_topkd.ledger.state import TrialRecord

# --- which trials are repeated ----------------------------------------------------------------------------------------


def repeats_of(state: SweepState, trial: TrialRecord, arm: str = REPEAT) -> dict[int, TrialRecord]:
    """A trial's repeats by their seeds; those of a trial of the same arm and parameters are its own too.

    Args:
        state: the sweep.
        trial: one of the search or of a baseline.
        arm: of the repeats: `repeat`, or `test`.
    """
    found: dict[int, TrialRecord] = {}
    for repeat in state.arm(arm):
        if repeat.seed is not None and repeat.origin.arm == trial.key.arm and repeat.params == trial.params:
            found.setdefault(repeat.seed, repeat)
    return found


def unrepeated(
    state: SweepState, trials: Iterable[TrialRecord], seeds: Iterable[int], arm: str = REPEAT
) -> list[tuple[TrialRecord, int]]:
    """Which of these trials have not been begun on which of these seeds, in the order in which they are to be.

    Seed by seed: what an interruption leaves is a comparison on fewer seeds.
    """
    known = [(trial, repeats_of(state, trial, arm)) for trial in trials]
    return [(trial, seed) for seed in seeds for trial, repeats in known if seed not in repeats]


def finalist_trials(state: SweepState) -> list[TrialRecord]:
    """The trials that are repeated: the search's best and each baseline's, those of the same parameters once."""
    if state.confirm is not None:
        chosen = [state.trials[key] for key in state.confirm.finalists]
    elif state.finalists is not None:
        chosen = different(state.ranked(), state.finalists.count)
    else:
        return []
    return chosen + baselines_to_repeat(state, _repeated_of_each(state))


def baselines_to_repeat(state: SweepState, count: int) -> list[TrialRecord]:
    """The first so many of each baseline's trials, by own values, those of the same parameters once."""
    return [record for method in state.baseline_methods() for record in different(state.ranked(method), count)]


def _repeated_of_each(state: SweepState) -> int:
    """How many trials of each baseline are repeated."""
    plan = state.finalists if state.confirm is None else state.confirm
    return 0 if plan is None else plan.baselines


def baseline_trials(state: SweepState) -> list[TrialRecord]:
    """The trial that stands for each baseline: of those that were repeated the first as of `standings`, else its best."""
    return [record for method in state.baseline_methods() if (record := baseline_trial(state, method)) is not None]


def baseline_trial(state: SweepState, method: str) -> TrialRecord | None:
    """The trial that stands for a baseline; None without one that reached the full budget."""
    found = [finalist_of(state, record) for record in different(state.ranked(method), _repeated_of_each(state))]
    if len(found) > 1 and all(finalist.is_done for finalist in found):
        for finalist in sorted(found, key=_rank):
            if finalist.values:
                return finalist.record
    return state.best(method)


def different(records: Iterable[TrialRecord], count: int) -> list[TrialRecord]:
    """The first so many with parameters that none before them has."""
    chosen: list[TrialRecord] = []
    for record in records:
        if len(chosen) < count and all(record.params != other.params for other in chosen):
            chosen.append(record)
    return chosen


def fresh_seeds(state: SweepState) -> range:
    """The seeds that finalists are repeated on; never the search's own."""
    first = state.header.seed + 1
    counts = [plan.seeds for plan in (state.finalists, state.confirm) if plan is not None]
    return range(first, first + max(counts, default=0))


def finalists_to_repeat(state: SweepState) -> list[tuple[TrialRecord, int]]:
    """The trainings of the finalists that have not been begun, as the search stands."""
    return unrepeated(state, finalist_trials(state), fresh_seeds(state))


# --- what their seeds gave --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finalist:
    """A trial with what its fresh seeds gave."""

    record: TrialRecord
    """The search's or the baseline's own."""
    repeats: Mapping[int, TrialRecord]
    """By seed, those that there are."""
    seeds: Sequence[int]
    """All that it is to have."""
    chance: float
    """Percent that guessing gets right."""

    @property
    def is_done(self) -> bool:
        """Whether it has been trained on all of its seeds, with success or not."""
        return all(seed in self.repeats and self.repeats[seed].status.is_end for seed in self.seeds)

    @property
    def values(self) -> dict[int, float]:
        """By seed, the value of each training that reached the full budget."""
        done = {seed: repeat for seed, repeat in self.repeats.items() if repeat.status is TrialStatus.COMPLETED}
        return {seed: done[seed].value or 0.0 for seed in self.seeds if seed in done}

    @property
    def broken(self) -> dict[int, str]:
        """By seed, how a training fell apart, if it did.

        It failed, diverged, collapsed, or ended with less than half of what the trial's own value is above chance. Of two
        seeds no spread can be told, and a spread pooled with the others' would grow with the very seed that is looked at.
        What a seed loses short of that half is in the mean.
        """
        least = self.chance + ((self.record.value or 0.0) - self.chance) / 2
        found = {}
        for seed, repeat in sorted(self.repeats.items()):
            if repeat.status is TrialStatus.FAILED:
                found[seed] = repeat.reason if repeat.reason in FELL_APART else f"failed ({repeat.reason})"
            elif repeat.status is TrialStatus.COMPLETED and (repeat.value or 0.0) < least:
                found[seed] = f"fell to {repeat.value:.2f} %"
        return {seed: how for seed, how in found.items() if seed in self.seeds}

    @property
    def mean(self) -> float | None:
        """Of its values, in percent; none without one."""
        return statistics.fmean(self.values.values()) if self.values else None

    @property
    def error(self) -> float | None:
        """The standard error of the mean; none of fewer than two values."""
        return _error(list(self.values.values()))

    @property
    def luck(self) -> float:
        """By how much its own value is above the mean of its fresh seeds."""
        return (self.record.value or 0.0) - (0.0 if self.mean is None else self.mean)

    @property
    def figure(self) -> str:
        """Its mean in words: `94.20 ± 0.40 %`, one standard error."""
        if self.mean is None:
            return "no value"
        return f"{self.mean:.2f} %" if self.error is None else f"{self.mean:.2f} ± {self.error:.2f} %"

    @property
    def sentence(self) -> str:
        """What its fresh seeds gave, apart from what it was found by."""
        own, luck = self.record.value or 0.0, round(self.luck, 2)
        of_all = "" if len(self.values) == len(self.seeds) else f" of {len(self.seeds)}"
        text = f"{self.figure} over {len(self.values)}{of_all} fresh seeds; the search's own value {own:.2f} %"
        if self.mean is not None:
            text += f", {luck:.2f} of it luck" if luck > 0 else f", {-luck:.2f} below" if luck < 0 else ", the same"
        return "; ".join([text, *(f"seed {seed} {how}" for seed, how in self.broken.items())])


def finalists(state: SweepState) -> list[Finalist]:
    """The finalists as the search stands, those of the search first, best first by its own values."""
    return [finalist_of(state, record) for record in finalist_trials(state)]


def former_finalists(state: SweepState) -> list[Finalist]:
    """Trials that are no finalists any more and have been repeated, with what their seeds gave, best first by own values.

    A confirmation may have fewer finalists than the search had: what the others' trainings gave stays known.
    """
    now = [(record.key.arm, record.params) for record in finalist_trials(state)]
    origins = {repeat.of_trial: state.trials[repeat.of_trial] for repeat in state.arm(REPEAT) if repeat.of_trial}
    others = [record for record in origins.values() if (record.key.arm, record.params) not in now]
    found = [finalist_of(state, record) for record in others]
    return sorted((f for f in found if f.values), key=lambda f: (-(f.record.value or 0.0), f.record.key))


def finalist_of(
    state: SweepState, record: TrialRecord, seeds: Sequence[int] | None = None, arm: str = REPEAT
) -> Finalist:
    """A trial with what the repeats of an arm gave on some seeds; by default those of the finalists."""
    classes = state.header.num_classes
    chance = 100 / classes if classes else 0.0
    return Finalist(record, repeats_of(state, record, arm), fresh_seeds(state) if seeds is None else seeds, chance)


def finalists_done(state: SweepState) -> tuple[int, int] | None:
    """How many of the finalists' trainings have ended, and of how many, as the search stands; None if none are to be."""
    if state.finalists is None and state.confirm is None:
        return None
    found = finalists(state)
    ended = sum(f.repeats[seed].status.is_end for f in found for seed in f.seeds if seed in f.repeats)
    return ended, sum(len(f.seeds) for f in found)


def apart_by_seed(one: Finalist, other: Finalist) -> list[float]:
    """By how much one is above the other on each of the seeds that both have a value of, in points."""
    mine, others = one.values, other.values
    return [mine[seed] - others[seed] for seed in mine if seed in others]


def _error(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


# --- the answer ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Winner:
    """The trial that is a sweep's answer."""

    record: TrialRecord
    """The search's own trial, with the value that it was found by."""
    finalist: Finalist | None = None
    """What its fresh seeds gave, by which it was chosen; None if it was chosen by its own value."""

    @property
    def value(self) -> float:
        """What to expect of it, in percent: the mean of its fresh seeds if there are any, else its own value."""
        mean = None if self.finalist is None else self.finalist.mean
        return (self.record.value or 0.0) if mean is None else mean

    @property
    def figure(self) -> str:
        """Its value in words."""
        return f"{self.value:.2f} %" if self.finalist is None else self.finalist.figure


def apart_from_baselines(state: SweepState) -> dict[str, list[float]]:
    """By how much the answer is above what stands for each baseline, by arm: in points, on the fresh seeds of both.

    Empty where finalists have not chosen the answer; without the baselines that share no seed with it.
    """
    winner = winner_of(state)
    if winner is None or winner.finalist is None:
        return {}
    found = {b.key.arm: apart_by_seed(winner.finalist, finalist_of(state, b)) for b in baseline_trials(state)}
    return {arm: values for arm, values in found.items() if values}


def standings(state: SweepState) -> list[Finalist]:
    """The search's finalists, best first; empty as long as a training of any finalist is to come.

    Those with fewer seeds that fell apart come first, then those of the higher mean, then the earlier trial: whoever fell
    apart on a seed is behind all who did not.
    """
    found = finalists(state)
    if not all(finalist.is_done for finalist in found):
        return []
    return sorted((finalist for finalist in found if finalist.record.key.arm == SEARCH), key=_rank)


def _rank(finalist: Finalist) -> tuple[int, float, int]:
    """The best first."""
    mean = -math.inf if finalist.mean is None else finalist.mean
    return len(finalist.broken), -mean, finalist.record.key.number


def winner_of(state: SweepState) -> Winner | None:
    """The trial that is the answer so far; None if no trial of the search has reached the full budget.

    With all finalists' trainings done it is the first of the `standings` that has a value, else the best by the search's
    own values.
    """
    chosen = next((finalist for finalist in standings(state) if finalist.values), None)
    if chosen is not None:
        return Winner(chosen.record, chosen)
    best = state.best()
    return None if best is None else Winner(best)
