"""Which trials to stop early: the `Scheduler` protocol, and ASHA."""

import math
from types import SimpleNamespace
from typing import Any
from typing import Protocol

from ray.tune.schedulers import AsyncHyperBandScheduler
from ray.tune.schedulers import TrialScheduler

from tune_topkd.config import OBJECTIVE
from tune_topkd.config import SweepConfig
from tune_topkd.ledger import SEARCH
from tune_topkd.ledger import Decision
from tune_topkd.ledger import SweepState
from tune_topkd.ledger import TrialKey


class Scheduler(Protocol):
    """Says of each report whether its trial goes on, from the reports of all trials so far.

    A sweep that was killed makes its scheduler anew and lets it `replay` the ledger; after that it must decide as the one
    before would have. `tune_topkd.search.conformance.check_scheduler` runs a class against this.
    """

    def decide(self, key: TrialKey, epoch: int, value: float) -> Decision:
        """Enter a trial's `rung_metric`, which is finite, at an epoch before its last: `Decision.CONTINUE` or `PRUNE`."""

    def replay(self, state: SweepState) -> None:
        """Enter all that a ledger tells, into a scheduler that has seen nothing."""


class Asha:
    """Ray's asynchronous successive halving, fed by the ledger: only the search's trials, each epoch once."""

    def __init__(self, config: SweepConfig) -> None:
        self._scheduler: AsyncHyperBandScheduler | None = None
        asha, epochs = config.sweep.asha, config.recipe.epochs
        if asha is not None and asha.grace_epochs < epochs:
            self._scheduler = AsyncHyperBandScheduler(
                time_attr="epoch",
                metric=OBJECTIVE,
                mode="max",
                max_t=epochs,
                grace_period=asha.grace_epochs,
                reduction_factor=asha.reduction_factor,
            )
        self._metric = config.rung_metric
        self._known: set[TrialKey] = set()

    def decide(self, key: TrialKey, epoch: int, value: float) -> Decision:
        """Enter a trial's value at an epoch and say whether it goes on: continue or prune."""
        if self._scheduler is None:
            return Decision.CONTINUE
        trial: Any = SimpleNamespace(trial_id=str(key))  # all that the scheduler looks at
        if key not in self._known:
            self._known.add(key)
            self._scheduler.on_trial_add(None, trial)
        action = self._scheduler.on_trial_result(None, trial, {"epoch": epoch, OBJECTIVE: value})
        return Decision.PRUNE if action == TrialScheduler.STOP else Decision.CONTINUE

    def replay(self, state: SweepState) -> None:
        """Fill the rungs from the ledger; the order of the reports does not matter to what a rung holds."""
        for record in state.arm(SEARCH):
            for epoch, metrics in record.reports.items():
                if all(map(math.isfinite, metrics.values())):
                    self.decide(record.key, epoch, metrics[self._metric])
