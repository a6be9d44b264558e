"""How long a sweep will still take, by what its ledger tells of the time since this driver began."""

import math

from tune_topkd.config import RECIPE_PARAMETERS
from tune_topkd.config import AshaConfig
from tune_topkd.config import SweepConfig
from tune_topkd.ledger import EPOCH_SECONDS
from tune_topkd.ledger import SEARCH
from tune_topkd.ledger import Finalists
from tune_topkd.ledger import HoursSpent
from tune_topkd.ledger import SweepState
from tune_topkd.ledger import TrialKey
from tune_topkd.ledger import TrialRecord
from tune_topkd.ledger import baseline_target
from tune_topkd.ledger import baseline_trials
from tune_topkd.ledger import finalists
from tune_topkd.ledger import finalists_to_repeat
from tune_topkd.ledger import has_looked
from tune_topkd.ledger import is_searched
from tune_topkd.ledger import to_measure

_WEIGHT_OF_THE_EXPECTED = 4
"""Of how many ended trials what ASHA is expected to do counts as much: those that end first are the short ones."""


class Pace:
    """The epochs that a driver's trials report, and when: from the first on, so that no start of anything counts.

    Nothing is added up but these: trials at once, what workers, evaluation and checkpoints cost, all is in the pace.
    """

    def __init__(self) -> None:
        self._first = self._last = 0.0
        self._epochs = 0
        self._reported: dict[TrialKey, float] = {}
        self._between = (0.0, 0)
        """The seconds between the reports of one trial, added up, and how many there were."""

    def reported(self, key: TrialKey, at: float) -> None:
        """A trial has reported an epoch, at this time."""
        if not self._epochs:
            self._first = self._last = at
        self._last = max(at, self._last)
        self._epochs += 1
        if key in self._reported:
            seconds, count = self._between
            self._between = seconds + max(at - self._reported[key], 0.0), count + 1
        self._reported[key] = at

    def seconds_left(self, config: SweepConfig, state: SweepState, now: float) -> float | None:
        """Seconds from now on; none as long as there is nothing to go by."""
        counted, seconds = self._epochs - 1, self._last - self._first
        if counted < 1 or seconds <= 0:
            return None
        ahead = epochs_ahead(config, state)
        of_one = self._between[0] / max(self._between[1], 1)  # seconds per epoch of a trial beside the others
        longest = max((left_of(record, config, state) for record in state.running()), default=0.0)
        since = min(max(now - self._last, 0.0), seconds / counted)  # the next report is on its way
        return max(max(sum(ahead) * seconds / counted, longest * of_one) - since, 0.0)


def seconds_to_limit(config: SweepConfig, state: SweepState) -> float | None:
    """Seconds until the sweep's GPU or CPU hours are used up, by the trials that are at work; none without such a limit."""
    if state.gpu_hours is None and state.cpu_hours is None:
        return None
    spent, given = HoursSpent.of(config, state), HoursSpent.of(config, SweepState())
    for record in state.running():
        given.take(record, {EPOCH_SECONDS: 1.0})  # what they take in a second
    pairs = ((state.gpu_hours, spent.hours.gpu, given.hours.gpu), (state.cpu_hours, spent.hours.cpu, given.hours.cpu))
    left = [max(limit - used, 0.0) / rate for limit, used, rate in pairs if limit is not None and rate]
    return min(left, default=None)


def epochs_ahead(config: SweepConfig, state: SweepState) -> list[float]:
    """The epochs that each trial without an end is expected to need: those at work, and those to come."""
    at_work = [left_of(record, config, state) for record in state.running()]
    to_come = max(state.target - state.size(), 0)
    in_full = _baselines_ahead(config, state) + _repeats_ahead(config, state)
    return at_work + [mean_epochs(config, state)] * to_come + [float(config.recipe.epochs)] * in_full


def training_total(config: SweepConfig, state: SweepState) -> int:
    """How many trainings a sweep has: those there are, and those that are expected to come."""
    to_come = max(state.target - state.size(), 0)
    return len(state.trials) + to_come + _baselines_ahead(config, state) + _repeats_ahead(config, state)


def _baselines_ahead(config: SweepConfig, state: SweepState) -> int:
    methods = config.baselines.methods if config.baselines else []
    known = {method: baseline_target(config, state, method) for method in methods}
    alike = math.ceil(state.target * mean_epochs(config, state) / config.recipe.epochs)
    wanted = {method: alike if target is None else target for method, target in known.items()}
    return sum(max(target - state.size(method), 0) for method, target in wanted.items())


def _repeats_ahead(config: SweepConfig, state: SweepState) -> int:
    """Trainings on fresh seeds to come: as many as can be while the search goes on, then those of the finalists."""
    if is_searched(config, state):
        return len(finalists_to_repeat(state)) + _measurements_ahead(state)
    begun = sum(len(f.repeats.keys() & set(f.seeds)) for f in finalists(state))
    return max(finalist_total(config, state.finalists, state.target) - begun, 0)


def _measurements_ahead(state: SweepState) -> int:
    """Trainings for the test set to come."""
    if state.confirm is None:
        return 0
    if has_looked(state):
        return len(to_measure(state))
    return (1 + len(baseline_trials(state))) * state.confirm.test_seeds


def finalist_total(config: SweepConfig, finalists: Finalists | None, trials: int) -> int:
    """How many trainings finalists have, of a search of so many trials, if enough of them reach the full budget."""
    if finalists is None:
        return 0
    of_baselines = [min(finalists.baselines, count) for count in baseline_counts(config).values()]
    return (min(finalists.count, trials) + sum(of_baselines)) * finalists.seeds


def left_of(record: TrialRecord, config: SweepConfig, state: SweepState) -> float:
    """The epochs that a trial at work is expected to need still: what is beyond the mean goes to the end."""
    mean = mean_epochs(config, state) if record.key.arm == SEARCH else config.recipe.epochs
    return (mean if record.epoch < mean else config.recipe.epochs) - record.epoch


def mean_epochs(config: SweepConfig, state: SweepState) -> float:
    """The epochs of a mean trial of the search: as ASHA is expected to stop them, and more and more as it has."""
    if config.sweep.asha is None:
        return float(config.recipe.epochs)
    ended = [record.epoch for record in state.arm(SEARCH) if record.status.is_end]
    expected = expected_epochs(config.sweep.asha, config.recipe.epochs)
    return (_WEIGHT_OF_THE_EXPECTED * expected + sum(ended)) / (_WEIGHT_OF_THE_EXPECTED + len(ended))


def expected_epochs(asha: AshaConfig, epochs: int) -> float:
    """Epochs of a mean trial if each rung lets its share of them on."""
    expected, share, before = 0.0, 1.0, 0
    for rung in asha.rungs(epochs):
        expected, before, share = expected + share * (rung - before), rung, share / asha.reduction_factor
    return expected + share * (epochs - before)


def baseline_total(config: SweepConfig) -> int:
    """How many baseline trials a sweep has; of baselines that are tuned alike, as many as are expected."""
    return sum(baseline_counts(config).values())


def baseline_counts(config: SweepConfig) -> dict[str, int]:
    """The same by baseline."""
    if config.baselines is None:
        return {}
    searched = any(name in RECIPE_PARAMETERS for name in config.space)
    expected = float(config.recipe.epochs)
    if config.sweep.asha is not None:
        expected = expected_epochs(config.sweep.asha, config.recipe.epochs)
    alike = math.ceil(config.sweep.trials * expected / config.recipe.epochs)
    grid = config.baselines.trials if searched else 1
    return {method: alike if config.baselines.is_tuned_alike(method) else grid for method in config.baselines.methods}
