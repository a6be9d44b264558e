"""What to try next: the `Sampler` protocol, and the samplers there are."""

import copy
import hashlib
import heapq
import random
import warnings
from collections.abc import Callable
from collections.abc import Container
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any
from typing import Protocol

import numpy as np
import optuna
from numpy.typing import NDArray
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


class Sampler(Protocol):
    """Proposes parameters, from what became of the trials before.

    A sweep that was killed makes its sampler anew and brings it to where the ledger is, by `take` and `tell`. So a
    proposal must be a function of the seed, the trial's number, what was taken and what was told, and of nothing else.
    `tune_topkd.search.conformance.check_sampler` runs a class against this.
    """

    def ask(self, number: int) -> dict[str, Scalar]:
        """Propose a value on every axis for the trial `number`; the same however often it is asked. Enters nothing."""

    def take(self, number: int, proposal: Mapping[str, Scalar]) -> dict[str, Scalar]:
        """Enter the proposal of the trial `number`, the sampler's or another's; numbers come in order, from 0.

        Returns:
            The proposal as the ledger is to keep it: each value of its axis's type.
        """

    def tell(self, record: TrialRecord) -> None:
        """Enter how a trial that was taken has ended; trials end in any order."""


SamplerFactory = Callable[[Sequence[Axis], int], Sampler]
"""Makes a sampler for these axes and this seed."""


def proposal_problem(proposal: object, axes: Sequence[Axis]) -> str:
    """Which rule a proposal breaks; empty if it has a value of the right type and range for each axis."""
    if not isinstance(proposal, Mapping) or set(proposal) != {axis.name for axis in axes}:
        return f"a proposal must name every axis once, not {set(proposal) if isinstance(proposal, Mapping) else proposal!r}"
    return next(filter(None, (_value_problem(axis, proposal[axis.name]) for axis in axes)), "")


def _value_problem(axis: Axis, value: object) -> str:
    if axis.kind == "choice":
        is_one = any(value == choice and type(value) is type(choice) for choice in axis.choices)
        return "" if is_one else f"{axis.name} must be one of {axis.choices}, not {value!r}"
    kind = int if axis.kind == "int" else float
    if type(value) is not kind:
        return f"{axis.name} must be of type {kind.__name__}, not {type(value).__name__}"
    return (
        "" if axis.low <= value <= axis.high else f"{axis.name} must be from {axis.low:g} to {axis.high:g}, not {value}"
    )


class TpeSampler:
    """Optuna's TPE, its random numbers a function of (seed, trial number)."""

    def __init__(self, axes: Sequence[Axis], seed: int, startup_trials: int, rung_metric: str = OBJECTIVE) -> None:
        self._seed = seed
        self._rung_metric = rung_metric
        self._startup_trials = startup_trials
        self.distributions = {axis.name: _distribution(axis) for axis in axes}
        self._coordinates: dict[int, list[float]] = {}
        """What each trial's values are as numbers, by the number that `_beside` shows it under."""
        self.study = optuna.create_study(direction="maximize", sampler=self._sampler(0))
        self._asked: dict[int, optuna.Trial] = {}
        self._best: list[tuple[float, int]] = []
        """A heap of the completed ones with the highest values: the value and minus the number."""

    def ask(self, number: int) -> dict[str, Scalar]:
        """What TPE proposes after the trials so far."""
        return self._beside(self._history(), number)

    def _beside(self, trials: Sequence[FrozenTrial], number: int) -> dict[str, Scalar]:
        """What the sampler proposes after these trials."""
        sampler = self._sampler(number, self._coordinates)
        study = optuna.create_study(direction="maximize", sampler=sampler, storage=_Borrowed(trials))
        return dict(study.ask(self.distributions).params)

    def _history(self) -> list[FrozenTrial]:
        """The trials that the sampler looks at: all of a short sweep; of a long one those at work, the best, the newest."""
        trials = self.study.get_trials(deepcopy=False)
        if len(trials) <= LONGEST_HISTORY:
            return trials
        newest = range(len(trials) - LONGEST_HISTORY + len(self._best), len(trials))
        return [trials[number] for number in sorted({-n for _, n in self._best} | self._asked.keys() | {*newest})]

    def take(self, number: int, proposal: Mapping[str, Scalar]) -> dict[str, Scalar]:
        """Enter a proposal into the study, as one that is running."""
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
                trial.report(metrics[self._rung_metric], epoch)
        state = optuna_state(record.status)
        value = record.value if state is TrialState.COMPLETE else None
        self.study.tell(trial, value, state=state)
        if value is not None:
            heapq.heappush(self._best, (value, -record.key.number))
            if len(self._best) > LONGEST_HISTORY // 5:
                heapq.heappop(self._best)

    def _sampler(self, number: int, coordinates: dict[int, list[float]] | None = None) -> optuna.samplers.BaseSampler:
        seed = _seed(self._seed, number)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # multivariate, before Optuna 5
            return _Tpe(self.distributions, seed, self._startup_trials, coordinates)


class RandomSampler:
    """Independent draws, even over each axis, or over its logarithm; they learn nothing. A baseline, and fast."""

    def __init__(self, axes: Sequence[Axis], seed: int) -> None:
        self._axes = axes
        self._seed = seed

    def ask(self, number: int) -> dict[str, Scalar]:
        """A point of the space that depends on the seed and the number alone."""
        draw = random.Random(_seed(self._seed, number))  # noqa: S311 (no secret)
        return {axis.name: axis.at(draw.random()) for axis in self._axes}

    def take(self, number: int, proposal: Mapping[str, Scalar]) -> dict[str, Scalar]:
        """Nothing is kept of it."""
        return dict(proposal)

    def tell(self, record: TrialRecord) -> None:
        """Nothing is learnt from it."""


def _seed(seed: int, number: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{number}".encode()).digest()[:4])


class _Tpe(optuna.samplers.TPESampler):
    """Optuna's sampler, told the space: to compare all trials' ranges takes it a third of a late proposal's time.

    Another eighth goes into making numbers of all trials' values anew at each proposal. Where they are given, they are
    kept in `coordinates`, by the number of a trial that this sampler is shown.
    """

    def __init__(
        self,
        distributions: Mapping[str, BaseDistribution],
        seed: int,
        startup_trials: int,
        coordinates: dict[int, list[float]] | None,
    ) -> None:
        super().__init__(seed=seed, n_startup_trials=startup_trials, multivariate=True, constant_liar=True)
        self._searched = {name: d for name, d in sorted(distributions.items()) if not d.single()}
        self._coordinates = coordinates

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Every trial has every axis, so the first that has ended shows them all."""
        trials = study.get_trials(deepcopy=False)
        return self._searched if any(t.state.is_finished() for t in trials) else {}

    def _get_internal_repr(  # its other arguments are not the same in all versions
        self, trials: list[FrozenTrial], search_space: dict[str, BaseDistribution], *others: Any
    ) -> dict[str, NDArray[np.float64]]:
        """The trials' values as numbers, by parameter."""
        kept = self._coordinates
        if kept is None or search_space != self._searched:
            return super()._get_internal_repr(trials, search_space, *others)
        for trial in trials:
            if trial.number not in kept:
                kept[trial.number] = [d.to_internal_repr(trial.params[name]) for name, d in search_space.items()]
        rows = np.array([kept[trial.number] for trial in trials]).reshape(len(trials), len(search_space))
        return dict(zip(search_space, rows.T, strict=True))


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
