"""What to try next: the `Sampler` protocol, and the samplers there are."""

import copy
import functools
import hashlib
import heapq
import math
import random
import warnings
from abc import ABC
from abc import abstractmethod
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
from tune_topkd.space import startup_trials_of

LONGEST_HISTORY = 500
"""A longer history keeps its best fifth, the running and the newest trials: TPE's cost grows with what it looks at."""

LONGEST_HISTORY_OF_GP = 200
"""The same of the Gaussian process, whose cost grows with the cube of it."""

_NOTHING_IS_SAMPLED = optuna.samplers.RandomSampler(seed=0)
"""For a study whose trials are given all their values."""


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


class StudySampler(ABC):
    """A sampler of Optuna's, made anew for each proposal, its random numbers a function of (seed, trial number).

    Args:
        axes: to propose on.
        seed: the sweep's.
        startup_trials: random proposals before the model takes over; by default `startup_trials_of` the axes.
        rung_metric: what trials are compared by before their last epoch.
    """

    def __init__(
        self,
        axes: Sequence[Axis],
        seed: int,
        startup_trials: int | None = None,
        rung_metric: str = OBJECTIVE,
    ) -> None:
        self._seed = seed
        self._rung_metric = rung_metric
        self._startup_trials = startup_trials or startup_trials_of(len(axes))
        self.distributions = {axis.name: _distribution(axis) for axis in axes}
        self.study = optuna.create_study(direction="maximize", sampler=_NOTHING_IS_SAMPLED)
        self._asked: dict[int, optuna.Trial] = {}
        self._best: list[tuple[float, int]] = []
        """A heap of the completed ones with the highest values: the value and minus the number."""

    @property
    @abstractmethod
    def longest_history(self) -> int:
        """How many trials it looks at, at most: what a proposal costs grows with them."""

    @abstractmethod
    def _proposer(self, number: int) -> optuna.samplers.BaseSampler:
        """Optuna's sampler for the proposal of a trial."""

    def ask(self, number: int) -> dict[str, Scalar]:
        """What the sampler proposes after the trials so far."""
        return self._beside(self._history(), number)

    def _beside(self, trials: Sequence[FrozenTrial], number: int) -> dict[str, Scalar]:
        """What the sampler proposes after these trials."""
        study = optuna.create_study(
            direction="maximize", sampler=self._proposer(number), storage=_Borrowed(self._shown(trials))
        )
        return dict(study.ask(self.distributions).params)

    def _shown(self, trials: Sequence[FrozenTrial]) -> Sequence[FrozenTrial]:
        """These trials as Optuna's sampler is to see them."""
        return trials

    def _history(self) -> list[FrozenTrial]:
        """The trials that the sampler looks at: all of a short sweep; of a long one those at work, the best, the newest."""
        trials = self.study.get_trials(deepcopy=False)
        if len(trials) <= self.longest_history:
            return trials
        newest = range(len(trials) - self.longest_history + len(self._best), len(trials))
        return [trials[number] for number in sorted({-n for _, n in self._best} | self._asked.keys() | {*newest})]

    def take(self, number: int, proposal: Mapping[str, Scalar]) -> dict[str, Scalar]:
        """Enter a proposal into the study, as one that is running."""
        self.study.enqueue_trial(dict(proposal))
        trial = self.study.ask(self.distributions)
        assert trial.number == number, "Optuna's trials are numbered as ours"
        self._asked[number] = trial
        return dict(trial.params)

    def tell(self, record: TrialRecord) -> None:
        """A completed trial with its value; a pruned one with its intermediate values; a failed one without any.

        A failure told as FAIL would leave its region looking unexplored, and it would be proposed for ever; as PRUNED
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
            if len(self._best) > self.longest_history // 5:
                heapq.heappop(self._best)


class TpeSampler(StudySampler):
    """Optuna's TPE (Bergstra et al., NeurIPS 2011), multivariate; a trial at work counts as a bad one (constant liar)."""

    @functools.cached_property
    def _coordinates(self) -> dict[int, list[float]]:
        """What each trial's values are as numbers, by the number that `_beside` shows it under; `_Tpe` fills it."""
        return {}

    @property
    def longest_history(self) -> int:
        """So many trials of a longer sweep it looks at."""
        return LONGEST_HISTORY

    def _proposer(self, number: int) -> optuna.samplers.BaseSampler:
        return self._sampler(number, self._coordinates)

    def _sampler(self, number: int, coordinates: dict[int, list[float]] | None = None) -> optuna.samplers.BaseSampler:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # multivariate, before Optuna 5
            return _Tpe(self.distributions, _seed(self._seed, number), self._startup_trials, coordinates)


class GpSampler(StudySampler):
    """Optuna's Gaussian process (Matérn 5/2, a length scale per axis) and the logarithm of its expected improvement.

    Of trials at work it takes the joint expected improvement (qLogEI, Ament et al., arXiv 2310.20708), so that several at
    once are not the same point. Optuna's own sampler sees completed trials alone, and would propose a region that
    ASHA stops or that fails again and again: so a trial that was stopped is shown with its last value, but none above the
    lowest completed one; one that failed, with the lowest value of all. Each proposal fits the process anew, as one that
    began with the hyperparameters of the one before would depend on which proposals this process has made.
    """

    @property
    def longest_history(self) -> int:
        """So many trials of a longer sweep it looks at."""
        return LONGEST_HISTORY_OF_GP

    def _beside(self, trials: Sequence[FrozenTrial], number: int) -> dict[str, Scalar]:
        """On one thread: so no proposal depends on how many there are, and with two it takes twenty times as long."""
        import torch  # Optuna's process is made of it; nobody else here needs it

        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return super()._beside(trials, number)
        finally:
            torch.set_num_threads(threads)

    def _shown(self, trials: Sequence[FrozenTrial]) -> Sequence[FrozenTrial]:
        values = [t.value for t in trials if t.value is not None and t.state is TrialState.COMPLETE]
        lowest_completed = min(values, default=math.inf)
        last = {
            t.number: min(t.intermediate_values[max(t.intermediate_values)], lowest_completed)
            for t in trials
            if t.state is TrialState.PRUNED and t.intermediate_values
        }
        lowest = min([lowest_completed, *last.values()])
        if math.isinf(lowest):  # there is nothing to compare by: failures alone
            lowest = 0.0
        shown = []
        for trial in trials:
            if trial.state is TrialState.PRUNED:
                trial = copy.copy(trial)
                trial.state, trial.values = TrialState.COMPLETE, [last.get(trial.number, lowest)]
            shown.append(trial)
        return shown

    def _proposer(self, number: int) -> optuna.samplers.BaseSampler:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return optuna.samplers.GPSampler(
                seed=_seed(self._seed, number),
                n_startup_trials=self._startup_trials,
                warn_independent_sampling=False,
            )


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


class QmcSampler:
    """Points of a scrambled Sobol sequence (Sobol 1967, Owen 1998), more even than random draws; they learn nothing.

    The proposal of trial n is the sequence's point n, so it depends on the seed and the number alone. Every axis has a
    coordinate of the sequence, a choice too. Points that a sweep is begun with take the places of the first ones.
    """

    def __init__(self, axes: Sequence[Axis], seed: int) -> None:
        from scipy.stats import qmc  # takes long, and only this sampler needs it

        self._axes = axes
        self._points = qmc.Sobol(len(axes), scramble=True, seed=np.random.default_rng(_seed(seed, 0)))

    def ask(self, number: int) -> dict[str, Scalar]:
        """The sequence's point of this number."""
        self._points.reset()
        if number:
            self._points.fast_forward(number)
        (point,) = self._points.random(1)
        return {axis.name: axis.at(float(share)) for axis, share in zip(self._axes, point, strict=True)}

    def take(self, number: int, proposal: Mapping[str, Scalar]) -> dict[str, Scalar]:
        """Nothing is kept of it."""
        return dict(proposal)

    def tell(self, record: TrialRecord) -> None:
        """Nothing is learnt from it."""


class CmaesSampler:
    """CMA-ES (Hansen, arXiv 1604.00772) on the axes that are numbers; a choice is drawn at random.

    Its state is made anew for each proposal: the trials that are over, by number, are cut into generations, and one after
    the other is told. So it does not matter in which order trials end, or which process asks. It starts around the
    first trial, the sweep's defaults, with a standard deviation of a sixth of each axis, and draws the proposal of
    trial n by a generator seeded with (seed, n). It goes by ranks alone: trials that were stopped early rank behind those
    that completed, the further they came the better, and failures last, as TPE ranks them.
    """

    def __init__(self, axes: Sequence[Axis], seed: int, rung_metric: str = OBJECTIVE) -> None:
        self._random = RandomSampler(axes, seed)
        self._numbers = [axis for axis in axes if axis.kind != "choice" and axis.low < axis.high]
        self._seed = seed
        self._rung_metric = rung_metric
        self._taken: dict[int, NDArray[np.float64]] = {}
        """Each trial's coordinates, from 0 to 1."""
        self._ranks: dict[int, tuple[int, int, float]] = {}
        """What each trial that is over is ranked by; the largest is the best."""

    def ask(self, number: int) -> dict[str, Scalar]:
        """A draw from the distribution that the generations so far have led to."""
        import cmaes

        proposal = self._random.ask(number)
        if not self._numbers:
            return proposal
        dimensions = len(self._numbers)
        optimizer = cmaes.CMA(
            mean=self._taken.get(0, np.full(dimensions, 0.5)),
            sigma=1 / 6,
            bounds=np.tile([0.0, 1.0], (dimensions, 1)),
            n_max_resampling=10 * dimensions,
            seed=_seed(self._seed, number),
        )
        over, size = sorted(self._ranks), optimizer.population_size
        for first in range(0, len(over) - size + 1, size):
            ranked = sorted(over[first : first + size], key=lambda n: self._ranks[n], reverse=True)
            optimizer.tell([(self._taken[n], float(place)) for place, n in enumerate(ranked)])
        shares = optimizer.ask()
        return proposal | {axis.name: axis.at(float(s)) for axis, s in zip(self._numbers, shares, strict=True)}

    def take(self, number: int, proposal: Mapping[str, Scalar]) -> dict[str, Scalar]:
        """Keep where it lies."""
        self._taken[number] = np.clip([axis.share(proposal[axis.name]) for axis in self._numbers], 0.0, 1.0)
        return dict(proposal)

    def tell(self, record: TrialRecord) -> None:
        """Keep how good it is."""
        value = -math.inf
        if record.status is TrialStatus.COMPLETED and record.value is not None:
            self._ranks[record.key.number] = (2, record.epoch, record.value)
        elif record.status is TrialStatus.PRUNED and record.reports:
            value = record.reports[record.epoch][self._rung_metric]
            self._ranks[record.key.number] = (1, record.epoch, value)
        else:
            self._ranks[record.key.number] = (0, 0, value)


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
