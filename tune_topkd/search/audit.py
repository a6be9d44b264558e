"""Does a sweep's ledger hold together? Every decision in it is taken again from what lay before it.

What is checked is what a user trusts: no trial lost, doubled or run again, no stop that the scheduler would not take, no
proposal that the sampler would not make, Optuna told what happened, and checkpoints that can be gone on from.
"""

import math
import socket
from collections import Counter
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from importlib import metadata

from tune_topkd.config import Scalar
from tune_topkd.config import SweepConfig
from tune_topkd.ledger import CPU_HOURS
from tune_topkd.ledger import GPU_HOURS
from tune_topkd.ledger import REPEAT
from tune_topkd.ledger import SEARCH
from tune_topkd.ledger import Confirm
from tune_topkd.ledger import Decision
from tune_topkd.ledger import Driver
from tune_topkd.ledger import End
from tune_topkd.ledger import Event
from tune_topkd.ledger import Finalists
from tune_topkd.ledger import Header
from tune_topkd.ledger import HoursSpent
from tune_topkd.ledger import Look
from tune_topkd.ledger import Plateau
from tune_topkd.ledger import Repeat
from tune_topkd.ledger import Report
from tune_topkd.ledger import Retry
from tune_topkd.ledger import Start
from tune_topkd.ledger import Stop
from tune_topkd.ledger import Suggest
from tune_topkd.ledger import SweepState
from tune_topkd.ledger import TrialKey
from tune_topkd.ledger import TrialRecord
from tune_topkd.ledger import TrialStatus
from tune_topkd.ledger import confirmation
from tune_topkd.ledger import due_look
from tune_topkd.ledger import due_plateau
from tune_topkd.ledger import finalists_to_repeat
from tune_topkd.ledger import has_collapsed
from tune_topkd.ledger import to_measure
from tune_topkd.search.baselines import baseline_samplers
from tune_topkd.search.baselines import baseline_spaces
from tune_topkd.search.baselines import first_of_baseline
from tune_topkd.search.choosing import PACKAGES
from tune_topkd.search.choosing import ChoiceError
from tune_topkd.search.choosing import sampler_of
from tune_topkd.search.choosing import scheduler_of
from tune_topkd.search.failing import CommonError
from tune_topkd.search.samplers import StudySampler
from tune_topkd.search.samplers import optuna_state
from tune_topkd.search.search import NODES_LOST_WITHOUT_AN_EPOCH
from tune_topkd.space import Space

PROPOSALS_DRAWN_AGAIN = 250
"""Of a longer sweep so many proposals, evenly spread, are drawn again: each costs more the more there were before it."""

_FIRST_WITH_COMMON_ERRORS = 3  # the ledger version

_OUTCOME = {
    Decision.COMPLETE: (TrialStatus.COMPLETED,),
    Decision.PRUNE: (TrialStatus.PRUNED,),
    Decision.DIVERGED: (TrialStatus.FAILED,),
    Decision.COLLAPSED: (TrialStatus.FAILED,),
    Decision.CONTINUE: (TrialStatus.FAILED,),
    None: (TrialStatus.FAILED,),
}


def audit_decisions(config: SweepConfig, events: Sequence[Event]) -> tuple[list[str], SweepState]:
    """Take every decision of a sweep again.

    Args:
        config: the sweep's frozen config.
        events: its ledger's.

    Returns:
        What is wrong, a line each, empty if nothing is; and what the events tell.

    Raises:
        ChoiceError: the sampler or the scheduler that the config names cannot be had.
        LedgerError: one event contradicts another.
    """
    audit = _Audit(config, events)
    return list(audit.findings()), audit.state


class _Audit:
    """A sweep told again, event by event, beside what should have been decided."""

    def __init__(self, config: SweepConfig, events: Sequence[Event]) -> None:
        self.state = SweepState()
        self._config = config
        self._events = events
        self._space = Space.of(config)
        self._spaces = {SEARCH: self._space, **baseline_spaces(config)}
        self._scheduler = scheduler_of(config)
        self._sampler = sampler_of(config)(self._space.axes(), config.sweep.seed)
        self._samplers = {SEARCH: self._sampler, **baseline_samplers(config, sampler_of(config))}
        self._may_start: dict[TrialKey, bool] = {}
        self._common_error = CommonError()
        self._spent = HoursSpent.of(config, self.state)
        self._is_driven = False
        suggested = sum(isinstance(event.content, Suggest) and event.key.arm == SEARCH for event in events)
        self._stride = max(1, math.ceil(suggested / PROPOSALS_DRAWN_AGAIN))

    def findings(self) -> Iterator[str]:
        """What is wrong, in the order of the events."""
        try:
            yield from self._told_again()
        except ChoiceError as error:
            yield f"{error}; no more is checked"

    def _told_again(self) -> Iterator[str]:
        for event in self._events:
            is_new = isinstance(event.content, Suggest | Repeat)
            if is_new and event.key.number != (expected := self.state.size(event.key.arm)):
                yield f"line {event.seq + 1}: trial {event.key} is suggested where {expected} comes next; no more is checked"
                return
            yield from (f"line {event.seq + 1}: {what}" for what in self._before(event))
            self.state.apply(event)
            yield from (f"line {event.seq + 1}: {what}" for what in self._after(event))
        yield from self._whole_findings()

    def _before(self, event: Event) -> Iterator[str]:
        """What is wrong with an event, seen from the state that it came into."""
        match event.content:
            case Suggest() as suggest:
                yield from self._proposal_findings(suggest)
                yield from self._beginning_findings(suggest.key)
            case Repeat() as repeat:
                yield from self._repeat_findings(repeat)
                yield from self._beginning_findings(repeat.key)
            case Plateau() as plateau:
                if plateau != (expected_plateau := due_plateau(self._config, self.state)):
                    right = "it goes on" if expected_plateau is None else expected_plateau.sentence
                    yield f"the search is ended ({plateau.sentence}), where {right}"
            case Confirm() as confirm:
                yield from self._confirm_findings(confirm)
            case Look() as look:
                if look != (expected := due_look(self.state)):
                    yield f"the test set is to be read for {_told(look)}, where {_told(expected)} is right"
            case Start(key=key):
                if not self._may_start.get(key) and self.state.header.version > 1:  # 1 had no `retry`
                    yield f"trial {key} is started again without a retry or a new driver"
                self._may_start[key] = False
            case Retry() as retry:
                self._may_start[retry.key] = True
                yield from self._retry_findings(retry)
            case Report() as report:
                yield from self._decision_findings(report)
            case End() as end:
                yield from self._end_findings(end)
            case Driver() as driver:
                yield from self._finalists_findings(driver)
                self._may_start = dict.fromkeys(self._may_start, True)
                if self.state.stop_reason == "failed":
                    self._common_error.forgive()
                self._is_driven = True
            case Stop(reason=reason):
                self._is_driven = False
                if reason in (GPU_HOURS, CPU_HOURS) and self._spent.used_up(self.state) != reason:
                    yield f"the sweep is stopped for {reason}, which are not used up"
                if reason == "failed" and self._knows_common_errors() and not self._common_error.error:
                    yield "the sweep is given up although its trials do not all fail alike"
        if not isinstance(event.content, Header | Stop) and not self._is_driven:
            yield f"`{event.name}` while no process drives the sweep"

    def _after(self, event: Event) -> Iterator[str]:
        match event.content:
            case Report(key=key, metrics=metrics):
                self._spent.take(self.state.trials[key], metrics)
            case End(key=key):
                if (sampler := self._samplers.get(key.arm)) is not None:
                    sampler.tell(self.state.trials[key])
                self._common_error.take(self.state.trials[key])
            case Stop(reason="finished"):
                if left := self.state.running():
                    yield f"the sweep is finished, but {_named(left)} not"
                if self.state.size() != self.state.target:
                    yield f"the sweep is finished with {self.state.size()} trials, not {self.state.target}"
                if lacking := finalists_to_repeat(self.state) or to_measure(self.state):
                    yield f"the sweep is finished without {_on_seed(*lacking[0])}, and {len(lacking) - 1} more like it"
                if (look := due_look(self.state)) is not None:
                    yield f"the sweep is finished without the look at the test set for {_told(look)}"

    def _proposal_findings(self, suggest: Suggest) -> Iterator[str]:
        key, proposal, params = suggest.key, suggest.proposal, suggest.params
        space = self._spaces.get(key.arm) or Space.of_recipe(self._config)
        if not _alike(space.params(proposal), params):
            yield f"the parameters of trial {key} are not what its proposal gives"
        sampler = self._samplers.get(key.arm)
        if sampler is None:
            return
        first = self.state.header.first if key.arm == SEARCH else []
        begun_with = first_of_baseline(self._config, key.arm) if key.arm != SEARCH and key.number == 0 else None
        if key.number < len(first):
            expected: Mapping[str, Scalar] | None = self._space.proposal(first[key.number])
        elif begun_with is not None:
            expected = begun_with
        elif key.number % self._stride == 0 and self._proposes_the_same():
            expected = sampler.ask(key.number)
        else:
            expected = None
        if expected is not None and not _alike(expected, proposal):
            yield f"the proposal of trial {key} is not what the sampler proposes"
        sampler.take(key.number, proposal)

    def _beginning_findings(self, key: TrialKey) -> Iterator[str]:
        self._may_start[key] = True
        if used_up := self._spent.used_up(self.state):
            yield f"trial {key} is begun although {used_up} are used up"
        if key.arm == SEARCH and (plateau := due_plateau(self._config, self.state)) is not None:
            yield f"trial {key} is suggested where {plateau.sentence}"
        if self._common_error.error and self._knows_common_errors():
            yield f"trial {key} is suggested although the newest have all failed alike"

    def _repeat_findings(self, repeat: Repeat) -> Iterator[str]:
        """Whether the search was over, and this training of a finalist, or of the test, is the one that comes next."""
        is_at_work = any(record.of_trial is None for record in self.state.running())
        if is_at_work or self.state.size() < self.state.target:
            yield f"trial {repeat.key} repeats a finalist although the search is not over"
        lacking = finalists_to_repeat(self.state) if repeat.key.arm == REPEAT else to_measure(self.state)
        if not lacking or (lacking[0][0].key, lacking[0][1]) != (repeat.of_trial, repeat.seed):
            expected = _on_seed(*lacking[0]) if lacking else "nothing"
            yield f"trial {repeat.key} repeats {repeat.of_trial} on seed {repeat.seed}, where {expected} comes next"

    def _finalists_findings(self, driver: Driver) -> Iterator[str]:
        given, expected = driver.finalists or self.state.finalists, Finalists.configured(self._config.sweep.finalists)
        if given != expected:
            yield f"finalists are {given or 'none'}, where the config says {expected or 'none'}"

    def _confirm_findings(self, confirm: Confirm) -> Iterator[str]:
        """Whether the finalists are those that the search had to offer, and the looks at the test set are counted."""
        if self.state.size() < self.state.target or self.state.running():
            yield "the answer is to be confirmed although the search is not over"
        count = len(confirm.finalists)
        expected = confirmation(self.state, count, confirm.seeds, confirm.test_seeds)
        if confirm.finalists != expected.finalists:
            names = ", ".join(map(str, expected.finalists)) or "nothing"
            yield f"the finalists are {', '.join(map(str, confirm.finalists))}, where {names} is to be confirmed"
        if confirm.baselines != expected.baselines:
            yield f"the best {confirm.baselines} of each baseline are compared, where the plan says {expected.baselines}"
        if confirm.look != expected.look:
            yield f"this is look {confirm.look} at the test set, where {expected.look} is right"
        if confirm.of_trials != expected.of_trials:
            yield f"the finalists are of {confirm.of_trials} trials, but the search has {expected.of_trials}"

    def _knows_common_errors(self) -> bool:
        """Whether the program that began the sweep gave up by the rule of today."""
        return self.state.header.version >= _FIRST_WITH_COMMON_ERRORS

    def _proposes_the_same(self) -> bool:
        """Whether what the sampler computes can be compared here with what it computed then."""
        name, before = self._config.sweep.sampler.name, self.state.header.versions
        if name == "gp" and self.state.last_driver is not None and self.state.last_driver.host != socket.gethostname():
            return False  # its optimisers end elsewhere on another CPU, by more than the last digits
        return all(
            before.get(package) in (None, metadata.version(package)) for package in PACKAGES.get(name, ("optuna",))
        )

    def _decision_findings(self, report: Report) -> Iterator[str]:
        key, epoch, decision, metrics = report.key, report.epoch, report.decision, report.metrics
        record = self.state.trials.get(key)
        if record is None:
            return
        if epoch <= record.epoch:
            yield f"trial {key} reports epoch {epoch} after epoch {record.epoch}"
        if record.decision not in (None, Decision.CONTINUE):
            yield f"trial {key} reports although it was to end ({record.decision})"
        if not all(map(math.isfinite, metrics.values())):
            expected = Decision.DIVERGED
        elif epoch >= self._config.recipe.epochs:
            expected = Decision.COMPLETE
        elif has_collapsed(self._config, self.state.header.num_classes, record, epoch, metrics):
            expected = Decision.COLLAPSED
        else:
            value = metrics.get(self._config.rung_metric, math.nan)
            expected = self._scheduler.decide(key, epoch, value) if key.arm == SEARCH else Decision.CONTINUE
        if decision is not expected:
            yield f"trial {key} was decided {decision} at epoch {epoch}, where {expected} is right"

    def _retry_findings(self, retry: Retry) -> Iterator[str]:
        key, reason = retry.key, retry.reason
        record = self.state.trials.get(key)
        limits = {"crash": self._config.sweep.max_failures, "oom": 1}
        if record is not None and reason == "node" and record.nodes_lost >= NODES_LOST_WITHOUT_AN_EPOCH:
            yield f"trial {key} is retried although it lost {record.nodes_lost} nodes without an epoch in between"
        if record is not None and record.retries.count(reason) >= limits.get(reason, math.inf):
            yield f"trial {key} is retried for {reason} more often than {limits[reason]} times"

    def _end_findings(self, end: End) -> Iterator[str]:
        key, status = end.key, end.status
        record = self.state.trials.get(key)
        if record is None:
            return
        if status not in _OUTCOME[record.decision]:
            yield f"trial {key} ends {status} after the decision {record.decision or 'none'}"
        if end.epoch != record.epoch:
            yield f"trial {key} ends at epoch {end.epoch}, but its last report is of {record.epoch}"
        last = record.reports.get(record.epoch, {}).get(key.metric)
        expected = None if status is TrialStatus.FAILED else last
        if end.value != expected:
            yield f"trial {key} ends with {end.value}, but its last {key.metric} is {expected}"

    def _whole_findings(self) -> Iterator[str]:
        if isinstance(self._sampler, StudySampler):
            yield from self._study_findings(self._sampler)
        for arm, number in Counter(key.arm for key in self.state.trials).items():
            if arm == SEARCH and number > self.state.target:
                yield f"there are {number} trials, more than the {self.state.target} asked for"

    def _study_findings(self, sampler: StudySampler) -> Iterator[str]:
        """Whether Optuna was told what happened."""
        for record, trial in zip(self.state.arm(SEARCH), sampler.study.get_trials(deepcopy=False), strict=True):
            if trial.state is not optuna_state(record.status):
                yield f"trial {record.key} is {record.status}, but {trial.state.name} in Optuna"
            if record.status is TrialStatus.COMPLETED and trial.value != record.value:
                yield f"trial {record.key} has {record.value}, but {trial.value} in Optuna"


def _alike(one: Mapping[str, Scalar], other: Mapping[str, Scalar]) -> bool:
    """Whether two sets of values are the same, up to what another CPU may round otherwise."""

    def is_alike(a: Scalar, b: Scalar) -> bool:
        return math.isclose(a, b, rel_tol=1e-9) if isinstance(a, float) and isinstance(b, float | int) else a == b

    return one.keys() == other.keys() and all(is_alike(value, other[name]) for name, value in one.items())


def _on_seed(trial: TrialRecord, seed: int) -> str:
    return f"{trial.key} on seed {seed}"


def _told(look: Look | None) -> str:
    if look is None:
        return "nothing"
    return f"{', '.join(map(str, look.trials))} on seeds {', '.join(map(str, look.seeds))} (look {look.look})"


def _named(records: list[TrialRecord]) -> str:
    names = ", ".join(str(record.key) for record in records)
    return f"trial {names} is" if len(records) == 1 else f"trials {names} are"
