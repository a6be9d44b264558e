"""What to try next and what to stop: the decisions of a sweep, each in the ledger before it is acted on.

A decision is a function of the ledger alone, so a sweep that was killed goes on as if it had not been: proposal n is
drawn by a sampler seeded with (the sweep's seed, n) from a study rebuilt out of the ledger, and ASHA's rungs are filled
by the same reports in the same order. Nothing here knows Ray's trials; `tuning` calls these methods.
"""

import copy
import hashlib
import heapq
import logging
import math
import time
import warnings
from collections.abc import Callable
from collections.abc import Container
from collections.abc import Mapping
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.distributions import CategoricalDistribution
from optuna.distributions import FloatDistribution
from optuna.distributions import IntDistribution
from optuna.storages import InMemoryStorage
from optuna.trial import FrozenTrial
from optuna.trial import TrialState
from ray.tune.schedulers import AsyncHyperBandScheduler
from ray.tune.schedulers import TrialScheduler

from tune_topkd.config import NO_FILES
from tune_topkd.config import RECIPE_PARAMETERS
from tune_topkd.config import RecipeConfig
from tune_topkd.config import Scalar
from tune_topkd.config import SharedFiles
from tune_topkd.config import SweepConfig
from tune_topkd.config import TrialConfig
from tune_topkd.errors import TuneTopKDError
from tune_topkd.ledger import SEARCH
from tune_topkd.ledger import Content
from tune_topkd.ledger import Decision
from tune_topkd.ledger import End
from tune_topkd.ledger import Ledger
from tune_topkd.ledger import LedgerError
from tune_topkd.ledger import Report
from tune_topkd.ledger import Retry
from tune_topkd.ledger import Share
from tune_topkd.ledger import Start
from tune_topkd.ledger import Stop
from tune_topkd.ledger import Suggest
from tune_topkd.ledger import SweepState
from tune_topkd.ledger import Tracker
from tune_topkd.ledger import TrialKey
from tune_topkd.ledger import TrialRecord
from tune_topkd.ledger import TrialStatus
from tune_topkd.ledger import tell_all
from tune_topkd.space import Axis
from tune_topkd.space import Space
from tune_topkd.space import lattice
from tune_topkd.sweep.failing import CommonError

OBJECTIVE = "val_top1"
"""The metric that a sweep maximises, at the last epoch of the full budget."""

NODES_LOST_WITHOUT_AN_EPOCH = 25
"""A trial that loses so many nodes and has no epoch to show for it may be what brings them down."""

LONGEST_HISTORY = 500
"""Trials that the sampler looks at: of a longer sweep the best fifth of so many, and the newest. More costs ever more."""

_log = logging.getLogger(__name__)


class UndecidedError(TuneTopKDError):
    """What a sweep does next cannot be decided: it cannot go on, and what it has is safe."""

    @classmethod
    def of(cls, error: Exception) -> "UndecidedError":
        """The one line to tell of an exception that came out of a decision."""
        while error.__cause__ is not None and isinstance(error.__cause__, Exception):
            error = error.__cause__
        text = " ".join(f"{type(error).__name__}: {error}".split())
        return cls(f"what comes next cannot be decided: {text[:500]}")


class Search:
    """The brain of a sweep: proposes trials, takes their reports, decides, and writes it all to the ledger first.

    **Threads.** Not thread-safe: one thread calls it. **Crashes.** A `Search` made from the ledger of a killed one
    decides as that one would have.

    Raises:
        UndecidedError: the ledger's trials are not such as this sampler and this space take.
    """

    def __init__(
        self,
        config: SweepConfig,
        ledger: Ledger,
        trackers: Sequence[Tracker] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.config = config
        self.ledger = ledger
        self._trackers = list(trackers)
        self._space = Space.of(config)
        self._proposer = Proposer(self._space.axes(), config.sweep.seed, config.sweep.startup_trials)
        self._asha = Asha(config)
        self._clock = clock
        budget = config.sweep.time_budget
        self._deadline = None if budget is None else clock() + budget
        try:
            self._rebuild()
        except (OSError, LedgerError):
            raise
        except Exception as error:
            raise UndecidedError.of(error) from error
        self._common_error = CommonError.of(self.state)
        self._to_reissue = list(self.state.running())

    @property
    def state(self) -> SweepState:
        """The sweep so far."""
        return self.ledger.state

    @property
    def study(self) -> optuna.Study:
        """Optuna's view of the search's trials; its numbers are ours."""
        return self._proposer.study

    @property
    def distributions(self) -> Mapping[str, BaseDistribution]:
        """The searched axes as Optuna has them."""
        return self._proposer.distributions

    @property
    def fatal(self) -> str:
        """The one error that every trial makes, once it is clear that the rest would make it too."""
        return self._common_error.error

    @property
    def out_of_time(self) -> bool:
        """Whether the time budget is used up."""
        return self._deadline is not None and self._clock() >= self._deadline

    @property
    def is_finished(self) -> bool:
        """Whether every trial and every baseline has ended."""
        counts_reached = self.state.size() >= self.state.target and self._next_baseline() is None
        return counts_reached and not self.state.running()

    def next_trial(self) -> TrialRecord | None:
        """The next trial to start: an interrupted one again, a new proposal, or a baseline; none when all are out."""
        if self.fatal or self.out_of_time:
            return None
        if self._to_reissue:
            return self._to_reissue.pop(0)
        number = self.state.size()
        if number < self.state.target:
            return self._suggest(TrialKey(SEARCH, number), self._propose(number), self._space)
        if (baseline := self._next_baseline()) is not None:
            key, proposal, space = baseline
            return self._suggest(key, proposal, space)
        return None

    def started(self, key: TrialKey) -> None:
        """A worker has begun this trial, or gone on with it."""
        record = self.state.trials[key]
        if not record.status.is_end:
            self._write(Start(key=key, attempt=record.attempts + 1))

    def reported(self, key: TrialKey, epoch: int, metrics: Mapping[str, float]) -> Decision:
        """Take a trial's report of one epoch and decide whether it goes on.

        An epoch that the ledger has already (a trial gone back to its checkpoint) changes nothing.

        Raises:
            KeyError: the metrics lack the objective.
        """
        record = self.state.trials[key]
        if record.status.is_end or epoch <= record.epoch:
            return record.decision or Decision.CONTINUE
        decision = self._decide(key, epoch, metrics)
        contents: list[Content] = [Report(key=key, epoch=epoch, metrics=metrics, decision=decision)]
        if decision is not Decision.CONTINUE:
            contents.append(_end(key, decision, epoch, metrics[OBJECTIVE]))
        self._write(*contents)
        if decision is not Decision.CONTINUE:
            self._over(record)
        return decision

    def lost(self, key: TrialKey, reason: str, error: str, larger: Share | None = None) -> bool:
        """A trial's worker is gone; the trial goes on from its checkpoint, or has failed.

        Args:
            key: the trial.
            reason: `crash`, retried `max_failures` times; `oom`, retried once, with a larger share if there is one;
                `node`, the machine's loss and not the trial's, retried as long as the trial gets on: it may lose
                `NODES_LOST_WITHOUT_AN_EPOCH` nodes between two epochs.
            error: in one line.
            larger: the next larger share of a node, if there is one.

        Returns:
            Whether the trial is to be started again: `next_trial` gives it out.
        """
        record = self.state.trials[key]
        if record.status.is_end:
            return False
        before = record.retries.count(reason)
        again = {
            "crash": before < self.config.sweep.max_failures,
            "oom": before == 0 and larger is not None,
            "node": record.nodes_lost < NODES_LOST_WITHOUT_AN_EPOCH,
        }[reason]
        if not again:
            if reason == "node":
                error = f"{record.nodes_lost + 1} nodes were lost under it without an epoch in between: {error}"
            self.failed(key, reason, error)
            return False
        share = larger if reason == "oom" else record.share
        self._write(Retry(key=key, reason=reason, error=error, share=share))
        if all(waiting.key != key for waiting in self._to_reissue):  # a loss may be told twice
            self._to_reissue.append(record)
        return True

    def failed(self, key: TrialKey, reason: str, error: str) -> None:
        """A trial has ended without an answer, for a `reason` in one word and an `error` in one line."""
        record = self.state.trials[key]
        if record.status.is_end:
            return
        self._write(End(key=key, epoch=record.epoch, status=TrialStatus.FAILED, reason=reason, error=error, value=None))
        self._over(record)

    def stopped(self, trouble: str = "") -> str:
        """Write that the driver lets go, and return why: the `stop` event's reason.

        Args:
            trouble: what keeps the sweep from going on, if that is why.
        """
        if self.is_finished:
            reason = "finished"
        elif trouble:
            reason = "trouble"
        elif self.fatal:
            reason = "failed"
        else:
            reason = "time_budget" if self.out_of_time else "interrupted"
        self._write(Stop(reason=reason, error=trouble if reason == "trouble" else self.fatal))
        return reason

    def trial_config(self, record: TrialRecord, files: SharedFiles = NO_FILES) -> TrialConfig:
        """All that one training needs: the sweep's config with this trial's parameters in it."""
        arm, config = record.key.arm, self.config
        recipe = config.recipe.model_dump() | {n: v for n, v in record.params.items() if n in RECIPE_PARAMETERS}
        searched = {n: v for n, v in record.params.items() if n not in RECIPE_PARAMETERS}
        return TrialConfig(
            data=config.data,
            student=config.student,
            teacher=config.teacher.model if config.teacher else None,
            **files.model_dump(),
            method=config.method if arm == SEARCH else arm,  # an arm is a method's name
            loss=config.loss | searched if arm == SEARCH else {},
            recipe=RecipeConfig.model_validate(recipe),
            seed=config.sweep.seed,
        )

    def _write(self, *contents: Content) -> None:
        for event in self.ledger.append(*contents):
            for tracker, error in tell_all(self._trackers, event):
                _log.error("%s is dropped for this run: %r", type(tracker).__name__, error, exc_info=error)
                self._trackers.remove(tracker)

    def _suggest(self, key: TrialKey, proposal: Mapping[str, Scalar], space: Space) -> TrialRecord:
        self._write(Suggest(key=key, proposal=proposal, params=space.params(proposal)))
        return self.state.trials[key]

    def _propose(self, number: int) -> dict[str, Scalar]:
        """The sampler's next proposal, after those that the sweep was begun with."""
        first = self.state.header.first
        if number < len(first):
            return self._proposer.take(number, self._space.proposal(first[number]))
        return self._proposer.ask(number)

    def _next_baseline(self) -> tuple[TrialKey, dict[str, Scalar], Space] | None:
        baselines = self.config.baselines
        if baselines is None:
            return None
        space = Space.of_recipe(self.config)
        trials = baselines.trials if len(space) else 1
        for method in baselines.methods:
            number = self.state.size(method)
            if number < trials:
                return TrialKey(method, number), lattice(space.axes(), trials)[number], space
        return None

    def _decide(self, key: TrialKey, epoch: int, metrics: Mapping[str, float]) -> Decision:
        if not all(map(math.isfinite, metrics.values())):
            return Decision.DIVERGED
        if epoch >= self.config.recipe.epochs:
            return Decision.COMPLETE
        return self._asha.decide(key, epoch, metrics[OBJECTIVE]) if key.arm == SEARCH else Decision.CONTINUE

    def _over(self, record: TrialRecord) -> None:
        """The trial's end is written: tell the sampler, and look whether all trials end so."""
        if record.key.arm == SEARCH:
            self._proposer.tell(record)
        self._common_error.take(record)

    def _rebuild(self) -> None:
        """Bring Optuna's study and ASHA's rungs to where the ledger is, and write the ends a kill left out."""
        for record in self.state.running():
            if record.decision not in (None, Decision.CONTINUE):
                value = record.reports[record.epoch][OBJECTIVE]
                self._write(_end(record.key, record.decision, record.epoch, value))
        for record in self.state.arm(SEARCH):
            self._proposer.take(record.key.number, record.proposal)
            if record.status.is_end:
                self._proposer.tell(record)
        self._asha.replay(self.state)


class Proposer:
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
                    self.decide(record.key, epoch, metrics[OBJECTIVE])


def optuna_state(status: TrialStatus) -> TrialState:
    """What Optuna is told of a trial."""
    if status is TrialStatus.RUNNING:
        return TrialState.RUNNING
    return TrialState.COMPLETE if status is TrialStatus.COMPLETED else TrialState.PRUNED


def _end(key: TrialKey, decision: Decision | None, epoch: int, value: float) -> End:
    """What a decision brings about."""
    match decision:
        case Decision.COMPLETE:
            return End(key=key, epoch=epoch, status=TrialStatus.COMPLETED, reason="full budget", value=value)
        case Decision.PRUNE:
            return End(key=key, epoch=epoch, status=TrialStatus.PRUNED, reason=f"asha at epoch {epoch}", value=value)
        case Decision.DIVERGED:
            error = f"a metric is NaN or infinite at epoch {epoch}"
            reason = Decision.DIVERGED.value
            return End(key=key, epoch=epoch, status=TrialStatus.FAILED, reason=reason, error=error, value=None)
        case _:
            raise AssertionError(f"should not end on {decision}")


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
