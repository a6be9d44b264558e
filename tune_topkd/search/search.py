"""What to try next and what to stop: the decisions of a sweep, each in the ledger before it is acted on.

A decision is a function of the ledger alone, so a sweep that was killed goes on as if it had not been: proposal n is
drawn by a sampler seeded with (the sweep's seed, n) from a study rebuilt out of the ledger, and ASHA's rungs are filled
by the same reports in the same order. Nothing here knows workers; `execution` calls these methods.
"""

import logging
import math
import time
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence

from tune_topkd.config import DEFAULTS
from tune_topkd.config import NO_FILES
from tune_topkd.config import RecipeConfig
from tune_topkd.config import Scalar
from tune_topkd.config import SharedFiles
from tune_topkd.config import SweepConfig
from tune_topkd.config import TrialConfig
from tune_topkd.config import loss_part
from tune_topkd.config import recipe_part
from tune_topkd.errors import TuneTopKDError
from tune_topkd.ledger import REPEAT
from tune_topkd.ledger import SEARCH
from tune_topkd.ledger import TEST
from tune_topkd.ledger import Content
from tune_topkd.ledger import Decision
from tune_topkd.ledger import End
from tune_topkd.ledger import HoursSpent
from tune_topkd.ledger import Ledger
from tune_topkd.ledger import LedgerError
from tune_topkd.ledger import Repeat
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
from tune_topkd.ledger import baseline_target
from tune_topkd.ledger import baseline_to_come
from tune_topkd.ledger import due_look
from tune_topkd.ledger import due_plateau
from tune_topkd.ledger import finalists_to_repeat
from tune_topkd.ledger import has_collapsed
from tune_topkd.ledger import is_searched
from tune_topkd.ledger import tell_all
from tune_topkd.ledger import to_measure
from tune_topkd.search.baselines import baseline_samplers
from tune_topkd.search.baselines import baseline_spaces
from tune_topkd.search.baselines import first_of_baseline
from tune_topkd.search.choosing import sampler_of
from tune_topkd.search.choosing import scheduler_of
from tune_topkd.search.failing import CommonError
from tune_topkd.search.samplers import Sampler
from tune_topkd.search.samplers import SamplerFactory
from tune_topkd.search.samplers import proposal_problem
from tune_topkd.search.schedulers import Scheduler
from tune_topkd.space import Space
from tune_topkd.space import lattice

NODES_LOST_WITHOUT_AN_EPOCH = 25
"""A trial that loses so many nodes and has no epoch to show for it may be what brings them down."""

_log = logging.getLogger(__name__)


class UndecidedError(TuneTopKDError):
    """What a sweep does next cannot be decided: it cannot go on, and what it has is safe."""

    @classmethod
    def of(cls, error: Exception) -> "UndecidedError":
        """The one line to tell of an exception that came out of a decision."""
        while isinstance(error.__cause__, Exception) and not isinstance(error, TuneTopKDError):
            error = error.__cause__
        kind = "" if isinstance(error, TuneTopKDError) else f"{type(error).__name__}: "
        text = " ".join(f"{kind}{error}".split())
        return cls(f"what comes next cannot be decided: {text[:500]}")


class Search:
    """The brain of a sweep: proposes trials, takes their reports, decides, and writes it all to the ledger first.

    **Threads.** Not thread-safe: one thread calls it. **Crashes.** A `Search` made from the ledger of a killed one
    decides as that one would have.

    Args:
        config: the sweep's frozen config.
        ledger: the sweep's, opened by this process.
        trackers: are told of each event once it is on the disk.
        clock: seconds, for the time budget.
        sampler: makes what proposes; by default the one that the config names.
        scheduler: stops trials early; by default the one that the config names. It has seen nothing yet.

    Raises:
        ChoiceError: the sampler or the scheduler that the config names cannot be had.
        UndecidedError: the ledger's trials are not such as this sampler and this space take.
    """

    def __init__(
        self,
        config: SweepConfig,
        ledger: Ledger,
        trackers: Sequence[Tracker] = (),
        clock: Callable[[], float] = time.monotonic,
        sampler: SamplerFactory | None = None,
        scheduler: Scheduler | None = None,
    ) -> None:
        self.config = config
        self.ledger = ledger
        self._trackers = list(trackers)
        self._space = Space.of(config)
        factory = sampler or sampler_of(config)
        self.sampler = factory(self._space.axes(), config.sweep.seed)
        self._baseline_spaces = baseline_spaces(config)
        self._baseline_samplers = baseline_samplers(config, factory)
        self._scheduler = scheduler or scheduler_of(config)
        self._stopped_by = type(scheduler).__name__ if scheduler else config.sweep.scheduler.name
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
        self._spent = HoursSpent.of(config, self.state)
        self._to_reissue = list(self.state.running())

    @property
    def _samplers(self) -> dict[str, Sampler]:
        """By arm, of those that have one."""
        return {SEARCH: self.sampler, **self._baseline_samplers}

    @property
    def state(self) -> SweepState:
        """The sweep so far."""
        return self.ledger.state

    @property
    def fatal(self) -> str:
        """The one error that every trial makes, once it is clear that the rest would make it too."""
        return self._common_error.error

    @property
    def out_of_time(self) -> bool:
        """Whether the time budget is used up."""
        return self._deadline is not None and self._clock() >= self._deadline

    @property
    def used_up(self) -> str:
        """Which limit of the sweep's hours is reached, if one is: `gpu_hours` or `cpu_hours`."""
        return self._spent.used_up(self.state)

    @property
    def lets_go(self) -> bool:
        """Whether no trial goes on, whatever is left to do."""
        return bool(self.fatal or self.out_of_time or self.used_up)

    @property
    def is_finished(self) -> bool:
        """Whether every trial, every baseline, every training of a finalist and every one of the test has ended."""
        is_idle = is_searched(self.config, self.state) and not self.state.running()
        return is_idle and due_look(self.state) is None and self._next_repeat() is None

    def next_trial(self) -> TrialRecord | None:
        """The next trial to start: an interrupted one again, a new proposal, a baseline, or one of these on a fresh seed.

        None when there is none to start now: those at work may be lost, or be finalists when they have ended.
        """
        if self.lets_go:
            return None
        if self._to_reissue:
            return self._to_reissue.pop(0)
        if (plateau := due_plateau(self.config, self.state)) is not None:
            self._write(plateau)
        number = self.state.size()
        if number < self.state.target:
            return self._suggest(TrialKey(SEARCH, number), self._propose(number), self._space)
        if (baseline := baseline_to_come(self.config, self.state)) is not None:
            method, target = baseline
            return None if target is None else self._suggest_baseline(method, target)
        if not is_searched(self.config, self.state):
            return None
        if (look := due_look(self.state)) is not None:
            self._write(look)  # before any training that will read the test set
        if (repeat := self._next_repeat()) is not None:
            self._write(repeat)
            return self.state.trials[repeat.key]
        return None

    def startable(self) -> int:
        """How many trainings could begin now beside those at work, were there room for all: none waits for another's end."""
        if self.lets_go:
            return 0
        count = len(self._to_reissue) + max(self.state.target - self.state.size(), 0)
        for method in self.config.baselines.methods if self.config.baselines else ():
            count += max((baseline_target(self.config, self.state, method) or 0) - self.state.size(method), 0)
        if is_searched(self.config, self.state):
            count += len(finalists_to_repeat(self.state)) or len(to_measure(self.state))
        return count

    def started(self, key: TrialKey) -> None:
        """A worker has begun this trial, or gone on with it."""
        record = self.state.trials[key]
        if not record.status.is_end:
            self._write(Start(key=key, attempt=record.attempts + 1))

    def needed(self, key: TrialKey, epoch: int) -> set[str]:
        """The metrics that a trial's report of an epoch must have."""
        if key.arm == TEST:
            return {key.metric} if epoch >= self.config.recipe.epochs else set()
        return {key.metric, self.config.rung_metric}

    def reported(self, key: TrialKey, epoch: int, metrics: Mapping[str, float]) -> Decision:
        """Take a trial's report of one epoch and decide whether it goes on.

        An epoch that the ledger has already (a trial gone back to its checkpoint) changes nothing.

        Raises:
            KeyError: the metrics lack the trial's value, and it is over.
        """
        record = self.state.trials[key]
        if record.status.is_end or epoch <= record.epoch:
            return record.decision or Decision.CONTINUE
        decision = self._decide(key, epoch, metrics)
        contents: list[Content] = [Report(key=key, epoch=epoch, metrics=metrics, decision=decision)]
        if decision is not Decision.CONTINUE:
            value = math.nan if decision is Decision.DIVERGED else metrics[key.metric]
            contents.append(self._end(key, decision, epoch, value))
        self._write(*contents)
        self._spent.take(record, metrics)
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
            reason = "time_budget" if self.out_of_time else self.used_up or "interrupted"
        self._write(Stop(reason=reason, error=trouble if reason == "trouble" else self.fatal))
        return reason

    def trial_config(self, record: TrialRecord, files: SharedFiles = NO_FILES) -> TrialConfig:
        """All that one training needs: the sweep's config with this trial's parameters in it."""
        arm, config = record.origin.arm, self.config
        is_search = arm in (SEARCH, DEFAULTS)
        data = config.data.model_copy(update={"selection": "test_at_end"}) if record.key.arm == TEST else config.data
        recipe, searched = config.recipe.model_dump() | recipe_part(record.params), loss_part(record.params)
        return TrialConfig(
            data=data,
            student=config.student,
            teacher=config.teacher.model if config.teacher else None,
            **files.model_dump(),
            method=config.method if is_search else arm,  # a baseline's arm is its method's name
            loss=config.loss | searched if is_search else searched,
            recipe=RecipeConfig.model_validate(recipe),
            seed=config.sweep.seed if record.seed is None else record.seed,
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
            return self.sampler.take(number, self._space.proposal(first[number]))
        return self.sampler.take(number, self.sampler.ask(number))

    def _suggest_baseline(self, method: str, target: int) -> TrialRecord:
        """The next trial of a baseline: of a lattice over the recipe's part of the space, or its own sampler's proposal."""
        number, space = self.state.size(method), self._baseline_spaces[method]
        sampler = self._baseline_samplers.get(method)
        if sampler is None:
            return self._suggest(TrialKey(method, number), lattice(space.axes(), target)[number], space)
        first = first_of_baseline(self.config, method) if number == 0 else None
        proposal = sampler.take(number, first or sampler.ask(number))
        return self._suggest(TrialKey(method, number), proposal, space)

    def _next_repeat(self) -> Repeat | None:
        """The next training of the finalists, as the search stands; after them the next one of the test."""
        for arm, to_come in ((REPEAT, finalists_to_repeat), (TEST, to_measure)):
            for trial, seed in to_come(self.state):
                return Repeat(key=TrialKey(arm, self.state.size(arm)), of_trial=trial.key, seed=seed)
        return None

    def _decide(self, key: TrialKey, epoch: int, metrics: Mapping[str, float]) -> Decision:
        if not all(map(math.isfinite, metrics.values())):
            return Decision.DIVERGED
        if epoch >= self.config.recipe.epochs:
            return Decision.COMPLETE
        if has_collapsed(self.config, self.state.header.num_classes, self.state.trials[key], epoch, metrics):
            return Decision.COLLAPSED
        if key.arm != SEARCH:
            return Decision.CONTINUE
        return self._scheduler.decide(key, epoch, metrics[self.config.rung_metric])

    def _over(self, record: TrialRecord) -> None:
        """The trial's end is written: tell the sampler, and look whether all trials end so."""
        if (sampler := self._samplers.get(record.key.arm)) is not None:
            sampler.tell(record)
        self._common_error.take(record)

    def _rebuild(self) -> None:
        """Bring Optuna's study and ASHA's rungs to where the ledger is, and write the ends a kill left out."""
        for record in self.state.running():
            if record.decision not in (None, Decision.CONTINUE):
                value = record.reports[record.epoch].get(record.key.metric, math.nan)
                self._write(self._end(record.key, record.decision, record.epoch, value))
        for arm, sampler in self._samplers.items():
            axes = (self._space if arm == SEARCH else self._baseline_spaces[arm]).axes()
            for record in self.state.arm(arm):
                if problem := proposal_problem(record.proposal, axes):
                    raise ValueError(f"trial {record.key} does not fit the space: {problem}")
                sampler.take(record.key.number, record.proposal)
                if record.status.is_end:
                    sampler.tell(record)
        self._scheduler.replay(self.state)

    def _end(self, key: TrialKey, decision: Decision | None, epoch: int, value: float) -> End:
        """What a decision brings about."""
        match decision:
            case Decision.COMPLETE:
                return End(key=key, epoch=epoch, status=TrialStatus.COMPLETED, reason="full budget", value=value)
            case Decision.PRUNE:
                return End(
                    key=key,
                    epoch=epoch,
                    status=TrialStatus.PRUNED,
                    reason=f"{self._stopped_by} at epoch {epoch}",
                    value=value,
                )
            case Decision.DIVERGED:
                error = f"a metric is NaN or infinite at epoch {epoch}"
                reason = Decision.DIVERGED.value
                return End(key=key, epoch=epoch, status=TrialStatus.FAILED, reason=reason, error=error, value=None)
            case Decision.COLLAPSED:
                error = f"top-1 is at chance at epoch {epoch}, as in those before it"
                reason = Decision.COLLAPSED.value
                return End(key=key, epoch=epoch, status=TrialStatus.FAILED, reason=reason, error=error, value=None)
            case _:
                raise AssertionError(f"should not end on {decision}")
