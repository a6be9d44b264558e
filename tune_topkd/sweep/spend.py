"""What a sweep's trainings have cost, and what stopping some of them early has saved, by its ledger."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from tune_topkd.config import OBJECTIVE
from tune_topkd.config import SweepConfig
from tune_topkd.findings import ArmSpend
from tune_topkd.findings import Rung
from tune_topkd.ledger import EPOCH_SECONDS
from tune_topkd.ledger import REPEAT
from tune_topkd.ledger import SEARCH
from tune_topkd.ledger import TEST
from tune_topkd.ledger import SweepState
from tune_topkd.ledger import TrialRecord
from tune_topkd.ledger import TrialStatus
from tune_topkd.sweep.wording import duration
from tune_topkd.verdict import baseline_name

FEWEST = 8
"""Trials of the full budget below which a rank correlation says nothing."""
WEAK = 0.5
"""A rank correlation below which a rung stops trials nearly at random."""


@dataclass(frozen=True)
class Spend:
    """Seconds in which trials trained, in their workers: trials beside one another count each."""

    search: float
    """Of all trials of the search."""
    others: float
    """Of the baselines, and of whatever else is not the search's."""
    stopped: float
    """Of the search's trials that were stopped early."""
    failed: float
    """Of all that failed, baselines too."""
    saved: float
    """What the stopped trials would have taken to the full budget, at the pace of their own epochs."""

    @property
    def total(self) -> float:
        """Of all trials."""
        return self.search + self.others

    def sentence(self) -> str:
        """In words; empty before anything was reported."""
        if not self.total:
            return ""
        saved = f"; stopping trials early has saved {duration(self.saved)}" if self.saved else ""
        failed = f", {duration(self.failed)} of it in trainings that failed" if self.failed else ""
        return f"{duration(self.total)} of training in all, one trial at a time{failed}{saved}"


def spend(state: SweepState) -> Spend:
    """What the trainings of a sweep have cost so far; an epoch that a trial trained twice counts once."""
    search = state.arm(SEARCH)
    stopped = [record for record in search if record.status is TrialStatus.PRUNED]
    epochs = state.header.epochs or max((record.epoch for record in search), default=0)
    return Spend(
        search=_seconds(search),
        others=_seconds(record for record in state.trials.values() if record.key.arm != SEARCH),
        stopped=_seconds(stopped),
        failed=_seconds(record for record in state.trials.values() if record.status is TrialStatus.FAILED),
        saved=math.fsum(_seconds([r]) / r.epoch * (epochs - r.epoch) for r in stopped if r.epoch),
    )


def _seconds(records: Iterable[TrialRecord]) -> float:
    return math.fsum(report.get(EPOCH_SECONDS, 0.0) for record in records for report in record.reports.values())


def spend_by_arm(state: SweepState) -> list[ArmSpend]:
    """What the trials of each arm have cost, by what became of them; the search first."""
    found: dict[tuple[str, str], list[TrialRecord]] = {}
    for record in sorted(state.trials.values(), key=lambda record: record.key.arm != SEARCH):
        found.setdefault((_arm_name(record), record.status.value), []).append(record)
    return [ArmSpend(arm, status, len(records), _seconds(records)) for (arm, status), records in found.items()]


def _arm_name(record: TrialRecord) -> str:
    named = {SEARCH: "search", REPEAT: "finalists on fresh seeds", TEST: "test set"}
    return named.get(record.key.arm) or f"baseline {baseline_name(record)}"


@dataclass(frozen=True)
class RungRank:
    """How well a rung foresaw the end."""

    epoch: int
    trials: int
    """That reached the full budget, over which the correlation is."""
    spearman: float
    """Between what trials are compared by at the rung, and their value at the end."""

    def sentence(self) -> str:
        """In words."""
        weak = ": it foresees little, later rungs or none may find more" if self.spearman < WEAK else ""
        return (
            f"rung at epoch {self.epoch}: rank correlation {self.spearman:.2f} with the end, {self.trials} trials{weak}"
        )


def rung_ranks(config: SweepConfig, state: SweepState) -> list[RungRank]:
    """How well each of ASHA's rungs foresaw the end, by the trials that reached it; none where these are few.

    They are the ones that the rungs let pass, so among all trials the correlation is higher.
    """
    import pandas as pd  # takes long, and is needed once a sweep is over

    done = state.ranked()
    found = []
    for epoch in config.sweep.asha.rungs(config.recipe.epochs) if config.sweep.asha else ():
        pairs = [
            (r.reports[epoch][config.rung_metric], r.reports[r.epoch][OBJECTIVE]) for r in done if epoch in r.reports
        ]
        if len(pairs) >= FEWEST and all(len(set(values)) > 1 for values in zip(*pairs, strict=True)):
            ranks = pd.DataFrame(pairs).rank()
            found.append(RungRank(epoch, len(pairs), float(ranks[0].corr(ranks[1]))))
    return found


def rungs_of(config: SweepConfig, state: SweepState) -> list[Rung]:
    """Each of ASHA's rungs: how many trials arrived and were stopped there, and how well it foresaw the end."""
    ranks = {rank.epoch: rank for rank in rung_ranks(config, state)}
    search = state.arm(SEARCH)
    found = []
    for epoch in config.sweep.asha.rungs(config.recipe.epochs) if config.sweep.asha else ():
        stopped = [r for r in search if r.status is TrialStatus.PRUNED and r.epoch == epoch]
        arrived = sum(epoch in record.reports for record in search)
        rank = ranks.get(epoch)
        found.append(Rung(epoch, arrived, len(stopped), rank.spearman if rank else None, rank.trials if rank else 0))
    return found
