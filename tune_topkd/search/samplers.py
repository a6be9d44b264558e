"""What to try next: Optuna's TPE, asked and told, its random numbers a function of (seed, trial number)."""

import copy
import hashlib
import heapq
import warnings
from collections.abc import Container
from collections.abc import Mapping
from collections.abc import Sequence

import optuna
from optuna.distributions import BaseDistribution
from optuna.distributions import CategoricalDistribution
from optuna.distributions import FloatDistribution
from optuna.distributions import IntDistribution
from optuna.storages import InMemoryStorage
from optuna.trial import FrozenTrial
from optuna.trial import TrialState

from tune_topkd.config import OBJECTIVE
from tune_topkd.config import Scalar
from tune_topkd.ledger import TrialRecord
from tune_topkd.ledger import TrialStatus
from tune_topkd.space import Axis

LONGEST_HISTORY = 500
"""A longer history keeps its best fifth, the running and the newest trials: TPE's cost grows with what it looks at."""


class Sampler:
    """Optuna's TPE by ask and tell, its random numbers a function of (seed, trial number)."""

    def __init__(self, axes: Sequence[Axis], seed: int, startup_trials: int) -> None:
        self._seed = seed
        self._startup_trials = startup_trials
        self.distributions = {axis.name: _distribution(axis) for axis in axes}
        self.study = optuna.create_study(direction="maximize", sampler=self._sampler(0))
        self._asked: dict[int, optuna.Trial] = {}
        self._best: list[tuple[float, int]] = []
        """A heap of the completed ones with the highest values: the value and minus the number."""

    def ask(self, number: int) -> dict[str, Scalar]:
        """The sampler's proposal `number`, entered."""
        return self.take(number, self.would_ask(number))

    def would_ask(self, number: int) -> dict[str, Scalar]:
        """What `ask` would give, without entering it."""
        return self._beside(self._history(), number)

    def _beside(self, trials: Sequence[FrozenTrial], number: int) -> dict[str, Scalar]:
        """What the sampler proposes after these trials."""
        study = optuna.create_study(direction="maximize", sampler=self._sampler(number), storage=_Borrowed(trials))
        return dict(study.ask(self.distributions).params)

    def _history(self) -> list[FrozenTrial]:
        """The trials that the sampler looks at: all of a short sweep; of a long one those at work, the best, the newest."""
        trials = self.study.get_trials(deepcopy=False)
        if len(trials) <= LONGEST_HISTORY:
            return trials
        newest = range(len(trials) - LONGEST_HISTORY + len(self._best), len(trials))
        return [trials[number] for number in sorted({-n for _, n in self._best} | self._asked.keys() | {*newest})]

    def take(self, number: int, proposal: Mapping[str, Scalar]) -> dict[str, Scalar]:
        """Enter a proposal that is not the sampler's, or that it made in an earlier run."""
        self.study.enqueue_trial(dict(proposal))
        self.study.sampler = optuna.samplers.RandomSampler(seed=0)  # every value is given: nothing is sampled
        trial = self.study.ask(self.distributions)
        assert trial.number == number, "Optuna's trials are numbered as ours"
        self._asked[number] = trial
        return dict(trial.params)

    def tell(self, record: TrialRecord) -> None:
        """A completed trial with its value; a pruned one with its intermediate values; a failed one without any.

        A failure told as FAIL would leave its region looking unexplored, and TPE would propose it for ever; as PRUNED
        without a value it counts as the worst there is.
        """
        trial = self._asked.pop(record.key.number)
        if record.status is not TrialStatus.FAILED:
            for epoch, metrics in record.reports.items():
                trial.report(metrics[OBJECTIVE], epoch)
        state = optuna_state(record.status)
        value = record.value if state is TrialState.COMPLETE else None
        self.study.tell(trial, value, state=state)
        if value is not None:
            heapq.heappush(self._best, (value, -record.key.number))
            if len(self._best) > LONGEST_HISTORY // 5:
                heapq.heappop(self._best)

    def _sampler(self, number: int) -> optuna.samplers.BaseSampler:
        seed = int.from_bytes(hashlib.sha256(f"{self._seed}:{number}".encode()).digest()[:4])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # multivariate, before Optuna 5
            return _Tpe(self.distributions, seed, self._startup_trials)


class _Tpe(optuna.samplers.TPESampler):
    """Optuna's sampler, told the space: to compare all trials' ranges takes it a third of a late proposal's time."""

    def __init__(self, distributions: Mapping[str, BaseDistribution], seed: int, startup_trials: int) -> None:
        super().__init__(seed=seed, n_startup_trials=startup_trials, multivariate=True, constant_liar=True)
        self._searched = {name: d for name, d in sorted(distributions.items()) if not d.single()}

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Every trial has every axis, so the first that has ended shows them all."""
        trials = study.get_trials(deepcopy=False)
        return self._searched if any(t.state.is_finished() for t in trials) else {}


def optuna_state(status: TrialStatus) -> TrialState:
    """What Optuna is told of a trial."""
    if status is TrialStatus.RUNNING:
        return TrialState.RUNNING
    return TrialState.COMPLETE if status is TrialStatus.COMPLETED else TrialState.PRUNED


class _Borrowed(InMemoryStorage):
    """Has a study see another's trials as they are: one that it is given it would copy, and a late proposal sees many."""

    def __init__(self, trials: Sequence[FrozenTrial]) -> None:
        super().__init__()
        self._trials = [self._renumbered(t) if t.number == 0 else t for t in trials]

    @staticmethod
    def _renumbered(trial: FrozenTrial) -> FrozenTrial:
        """0 is the number of the one that is asked for here; the sampler passes over it."""
        trial = copy.copy(trial)
        trial.number = -1
        return trial

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        seen = [trial for trial in self._trials if states is None or trial.state in states]
        return [*(copy.deepcopy(seen) if deepcopy else seen), *super().get_all_trials(study_id, deepcopy, states)]


def _distribution(axis: Axis) -> BaseDistribution:
    if axis.kind == "choice":
        return CategoricalDistribution(axis.choices)
    if axis.kind == "int":
        return IntDistribution(int(axis.low), int(axis.high), log=axis.log)
    return FloatDistribution(axis.low, axis.high, log=axis.log)


optuna.logging.set_verbosity(optuna.logging.WARNING)  # what it says of each trial is in the ledger
