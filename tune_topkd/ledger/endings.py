"""When a search ends before its last trial, by hours used up or a plateau; and when a trial has collapsed.

All of it by the ledger alone.

So a sweep that was killed and resumed ends where it would have ended, and an audit can tell.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

from tune_topkd.config import OBJECTIVE
from tune_topkd.config import SweepConfig
from tune_topkd.ledger.events import SEARCH
from tune_topkd.ledger.events import Plateau
from tune_topkd.ledger.events import Share
from tune_topkd.ledger.events import TrialStatus
from tune_topkd.ledger.state import SweepState
from tune_topkd.ledger.state import TrialRecord
from tune_topkd.space import random_proposals

EPOCH_SECONDS = "epoch_seconds"
"""The metric that says how long an epoch took in its worker, in seconds."""
GPU_HOURS = "gpu_hours"
"""The stop reason of a sweep whose GPU hours are used up, and the setting of these."""
CPU_HOURS = "cpu_hours"
"""The same of CPU hours."""

_PER_HOUR = 3_600_000_000
_ABOVE_CHANCE = (1.5, 0.05)
"""What is no better than chance: at most half as much again, and a twentieth of the way from chance to 100 %."""


class Hours(NamedTuple):
    """Hours of training times what the trials had of a node."""

    cpu: float
    gpu: float


class HoursSpent:
    """Adds up what trainings take, as their workers measure it: epochs with their validation.

    Starts of workers, checkpoints and epochs that a lost worker had begun are not in it. It counts in millionths of a
    second, so the sum does not depend on the order in which it is told.

    Args:
        share: what a trial gets of a node that has no other.
    """

    def __init__(self, share: Share) -> None:
        self._share = share
        self._cpu = self._gpu = 0

    @classmethod
    def of(cls, config: SweepConfig, state: SweepState) -> "HoursSpent":
        """What a ledger tells of a sweep, each of whose trials has the config's share, as a number, or its own."""
        cpus, gpus = config.sweep.cpus_per_trial, config.sweep.gpus_per_trial
        known = state.prepared.share if state.prepared is not None else None
        if isinstance(cpus, str) or isinstance(gpus, str):
            spent = cls(known or Share(0.0, 0.0))  # before it is measured, no trial can have been
        else:
            spent = cls(Share(cpus, gpus))
        for record in state.trials.values():
            for metrics in record.reports.values():
                spent.take(record, metrics)
        return spent

    def take(self, record: TrialRecord, metrics: Mapping[str, float]) -> None:
        """One epoch's metrics of a trial."""
        share, seconds = record.share or self._share, metrics.get(EPOCH_SECONDS, 0.0)
        self._cpu += round(seconds * share.cpus * 1e6)
        self._gpu += round(seconds * share.gpus * 1e6)

    @property
    def hours(self) -> Hours:
        """What there is so far."""
        return Hours(self._cpu / _PER_HOUR, self._gpu / _PER_HOUR)

    def used_up(self, state: SweepState) -> str:
        """Which of a sweep's limits is reached: `gpu_hours`, `cpu_hours`, or empty.

        They limit the search, its baselines and its finalists. What `confirm` is asked for has its cost told, and is not
        limited.
        """
        if state.confirm is not None:
            return ""
        hours = self.hours
        if state.gpu_hours is not None and hours.gpu >= state.gpu_hours:
            return GPU_HOURS
        return CPU_HOURS if state.cpu_hours is not None and hours.cpu >= state.cpu_hours else ""


def due_plateau(config: SweepConfig, state: SweepState) -> Plateau | None:
    """The plateau that ends a search now; None where the search goes on.

    With b(i) the best value at the full budget among the first i trials of the search that have ended, in the order of
    their ends, n of them now and m = `sweep.plateau.newest`: the search ends when b(n) - b(n - m) < `points`. What
    the newest m trials have brought stands for what the next m will bring; to end where that is below the noise of a value
    is the rule of Makarova et al., arXiv 2104.08166, who bound it by a Gaussian process instead. As the best of noisy values
    rises a little by itself, it errs towards going on. Trials that were stopped early count, as they bring nothing;
    failed ones do not. The m trials come after the random proposals at the start, and after the plateau before, where
    somebody went on from that.
    """
    rule = config.sweep.plateau
    if rule is None or state.size() >= state.target:
        return None
    ended = [r for r in state.ended if r.key.arm == SEARCH and r.status is not TrialStatus.FAILED]
    since = sum(r.key.arm == SEARCH and r.status is not TrialStatus.FAILED for r in state.ended[state.plateau_after :])
    first = len(ended) - rule.newest
    startup = random_proposals(config)
    if first < startup or since < rule.newest:
        return None
    values = [r.value if r.status is TrialStatus.COMPLETED else None for r in ended]
    before = [value for value in values[:first] if value is not None]
    best = max((value for value in values if value is not None), default=None)
    if best is None or not before or best - max(before) >= rule.points:
        return None
    return Plateau(trials=state.size(), best=best, gained=best - max(before), newest=rule.newest, points=rule.points)


def has_collapsed(
    config: SweepConfig, num_classes: int | None, record: TrialRecord, epoch: int, metrics: Mapping[str, float]
) -> bool:
    """Whether a trial's newest epochs, `sweep.collapse_epochs` of them past the warm-up, are all no better than chance.

    Chance is that of classes of one size, 100 / C percent. Where one class is larger, a student that always names it is
    better than that, and is not seen.

    Args:
        config: the sweep's.
        num_classes: C; None where it is not known.
        record: the trial, before this report.
        epoch: of the report.
        metrics: what is reported.
    """
    newest = config.sweep.collapse_epochs
    if newest is None or not num_classes or epoch - newest < config.recipe.warmup_epochs:
        return False
    values = [record.reports.get(e, {}).get(OBJECTIVE, math.inf) for e in range(epoch - newest + 1, epoch)]
    return all(is_near_chance(value, num_classes) for value in [*values, metrics.get(OBJECTIVE, math.inf)])


def is_near_chance(value: float, num_classes: int) -> bool:
    """Whether a top-1 in percent is hardly above that of guessing among classes of one size."""
    chance = 100 / num_classes
    factor, share = _ABOVE_CHANCE
    return value <= min(factor * chance, chance + share * (100 - chance))
