"""The ledger in MLflow's terms: which runs there should be, with which rows, tags and status."""

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from typing import NamedTuple

from tune_topkd.ledger import REPEAT
from tune_topkd.ledger import REPEATING
from tune_topkd.ledger import SEARCH
from tune_topkd.ledger import TEST
from tune_topkd.ledger import Driver
from tune_topkd.ledger import End
from tune_topkd.ledger import Event
from tune_topkd.ledger import Finalist
from tune_topkd.ledger import Header
from tune_topkd.ledger import HoursSpent
from tune_topkd.ledger import Prepared
from tune_topkd.ledger import Repeat
from tune_topkd.ledger import Report
from tune_topkd.ledger import Share
from tune_topkd.ledger import Stop
from tune_topkd.ledger import Suggest
from tune_topkd.ledger import SweepState
from tune_topkd.ledger import TrialKey
from tune_topkd.ledger import TrialRecord
from tune_topkd.ledger import TrialStatus
from tune_topkd.ledger import apart_by_seed
from tune_topkd.ledger import apart_from_baselines
from tune_topkd.ledger import baseline_trials
from tune_topkd.ledger import finalists
from tune_topkd.ledger import finalists_done
from tune_topkd.ledger import is_of_the_answer
from tune_topkd.ledger import measured
from tune_topkd.ledger import measured_done
from tune_topkd.ledger import winner_of
from tune_topkd.tracking.cleaning import LONGEST_NAME
from tune_topkd.tracking.cleaning import LONGEST_PARAM
from tune_topkd.tracking.cleaning import LONGEST_TAG
from tune_topkd.tracking.cleaning import clean_name
from tune_topkd.tracking.cleaning import clean_number
from tune_topkd.tracking.cleaning import clean_text
from tune_topkd.tracking.cleaning import is_step

_MLFLOW_STATUS = {
    TrialStatus.COMPLETED: "FINISHED",
    TrialStatus.PRUNED: "KILLED",
    TrialStatus.FAILED: "FAILED",
}
_MLFLOW_END = {**dict.fromkeys(("finished", "time_budget", "gpu_hours", "cpu_hours"), "FINISHED"), "failed": "FAILED"}
PARENT_TAG = "mlflow.parentRunId"
NOTE_TAG = "mlflow.note.content"
KIND = "kind"
"""The tag that says what a run is: `sweep`, `trial`, `baseline`, `finalist` or `test`."""
TRIAL_TAG = "trial_number"
"""Of the runs of the search's trials."""
BASELINE_TAG = "baseline_number"
"""Of the runs of the baselines; their method is the tag `arm`."""
REPEAT_TAG = "repeat_number"
"""Of the runs of the trainings that repeat trials on fresh seeds."""
MEASUREMENT_TAG = "test_number"
"""Of the runs of the trainings that are evaluated on the test set."""
_NUMBER_TAGS = {REPEAT: REPEAT_TAG, TEST: MEASUREMENT_TAG}
_KINDS = {REPEAT: "finalist", TEST: "test"}
_OWN_END = frozenset(_MLFLOW_END)
"""Why a driver stops by itself: what has been found is worth a report."""
_DIGEST_LENGTH = 36  # MLflow's limit

METRIC_NAMES = {
    "lr": "learning_rate",
    "cpu_percent": "system/process_cpu_percentage",
    "memory_mb": "system/process_memory_megabytes",
    "gpu_memory_mb": "system/gpu_memory_megabytes",
}
"""Metrics that have another name in MLflow than in the ledger: a parameter has theirs, or MLflow shows what begins with
`system/` on a page of its own."""

SWEEP_NOTE = """One sweep. Its trials, its baselines and its finalists are the nested runs; the tag `kind` tells them apart.

- `best_val_top1`, `best_trial`: the best trial so far that reached the full budget of epochs.
- `gain_over_<method>`: by how many points of top-1 the answer so far is above the best run of a baseline. It is measured on
  one seed until there are finalists, then on their fresh seeds, and on the test set once the answer is confirmed.
- `baseline_<method>_…`: the best run so far of a baseline. `grid_<method>_…`: each of its runs; the step is its number.
- `trials_completed`, `trials_pruned`, `trials_failed`: trials of the search. `cpu_hours`, `gpu_hours`: what all trainings
  have cost, the hours of each times its CPUs and GPUs.
- `trial_status` of a run: completed (full budget), pruned (stopped early), failed, interrupted, running.
- With finalists: their trainings on fresh seeds are nested runs with the tags `arm`, `repeats` and `seed`. Once the tag
  `finalists` says done, `best_trial` is the one with the best mean over its seeds (`finalist_val_top1`, standard error
  `finalist_error`; `finalist_<method>_…` of a baseline), and `best_val_top1` is still its own value, of one seed.
- Confirmed: `test_top1` is the mean of the answer's trainings for the test set, with the standard error `test_error`
  (`test_<method>_…` of a baseline), `test_look` which look it was.

The step of these metrics is the line of the ledger.
"""


@dataclass(frozen=True)
class Images:
    """The dataset of a sweep as MLflow has it."""

    name: str
    digest: str
    """Of its content, as results depend on it."""
    profile: str
    """JSON: how many images each split has, and how many classes there are."""


class Projection:
    """The ledger in MLflow's terms: takes the events in order, and enters into a batch what each one brings.

    **Steps.** MLflow shows a metric's value at its highest step. A trial's metrics have their epoch as the step. What is
    best so far has the ledger's line: lines only grow, in whatever order trials end, so what is shown is the newest.
    """

    def __init__(self) -> None:
        self.state = SweepState()
        """At the last event taken; trials that have ended are without their reports, so that it stays small."""
        self._now = 0.0
        self._best: dict[str, TrialRecord] = {}
        """The best trial so far of each arm; of the search the answer so far."""
        self._written: dict[str, float] = {}
        """What was last written of the metrics that are written when they change."""
        self._hours = HoursSpent(Share(1.0, 0.0))
        self._ends: dict[TrialStatus, int] = {}
        """How many trials of the search have ended with each status."""
        self._images: Images | None = None
        self._older_best = -math.inf
        self.milestone: int | None = None
        """The newest line after which the sweep's documents are due: `prepared`, or an end that nobody has brought about."""

    def take(self, event: Event, batch: "Batch") -> None:
        """Take the next event."""
        was_driven, before, self._now = self.state.last_driver is not None, self._now, event.time
        self.state.apply(event)
        match event.content:
            case Header() as header:
                tags = self._tags() | {KIND: "sweep"}
                batch.open("", header.sweep, event.time, _sweep_params(header), tags, SWEEP_NOTE)
            case Prepared() as prepared:
                self._enter_prepared(event, prepared, batch)
            case Driver():
                self._enter_work("running", "running", "RUNNING", "RUNNING", before if was_driven else None, batch)
                self._enter_finalists(event, batch)
            case Suggest(key=key, params=params):
                of_search = {TRIAL_TAG: str(key.number), KIND: "trial"}
                of_baseline = {BASELINE_TAG: str(key.number), KIND: "baseline", "arm": key.arm}
                tags = self._tags() | (of_search if key.arm == SEARCH else of_baseline) | {"trial_status": "running"}
                self._open(run_of(key), run_name(run_of(key)), event, params, tags, batch)
            case Repeat() as repeat:
                self._enter_repeat(event, repeat, batch)
            case Report() as report:
                self._enter_report(event, report, batch)
            case End(key=key):
                self._enter_end(event, batch)
                self.state.trials[key].reports.clear()
            case Stop(reason=reason):
                self._enter_work(reason, "interrupted", _MLFLOW_END.get(reason, "KILLED"), "KILLED", event.time, batch)
                self.milestone = event.seq if reason in _OWN_END else self.milestone

    @property
    def is_over(self) -> bool:
        """Whether the sweep has ended by itself, and nobody goes on with it."""
        return self.state.stop_reason in _OWN_END

    def abandon(self, batch: "Batch") -> None:
        """Enter what a `stop` event for an interruption, now, would have brought; nothing if there was one."""
        if not self.state.stop_reason:
            self._enter_work("interrupted", "interrupted", "KILLED", "KILLED", self._now, batch)

    def _enter_work(
        self, state: str, trial_status: str, parent: str, child: str, ended: float | None, batch: "Batch"
    ) -> None:
        """Work on the sweep begins, goes on or ends: the parent's state, and that of the trials under way."""
        batch.tag("", {"state": state})
        batch.status[""] = (parent, ended)
        for record in self.state.running():
            run = run_of(record.key)
            batch.tag(run, {"trial_status": trial_status})
            batch.status[run] = (child, ended)

    def _enter_prepared(self, event: Event, prepared: Prepared, batch: "Batch") -> None:
        """What all trials share: the dataset, and what an hour of a trial costs."""
        self._hours = HoursSpent(prepared.share or Share(1.0, 0.0))
        self._images = _images(self.state.header, prepared)
        if self._images is not None:
            batch.inputs[""] = self._images
        self.milestone = event.seq

    def _open(
        self, run: str, name: str, event: Event, params: Mapping[str, Any], tags: Mapping[str, str], batch: "Batch"
    ) -> None:
        """The run of a training begins."""
        batch.open(run, name, event.time, params, tags)
        if self._images is not None:
            batch.inputs[run] = self._images

    def _enter_report(self, event: Event, report: Report, batch: "Batch") -> None:
        """An epoch's metrics; a metric that is named like a parameter of its run gets a name of its own."""
        record, run = self.state.trials[report.key], run_of(report.key)
        self._hours.take(record, report.metrics)
        values = {metric_name(name, record.params): value for name, value in report.metrics.items()}
        batch.metrics(run, event.time, values, step=report.epoch)
        for name in report.metrics.keys() - values.keys():
            batch.supersede(run, name, report.metrics[name], step=report.epoch, at=event.time)

    def _enter_repeat(self, event: Event, repeat: Repeat, batch: "Batch") -> None:
        """A finalist is trained on a fresh seed: a run of its own, which is none of the search's trials."""
        run, of_trial = str(repeat.key), repeat.of_trial
        tag = _NUMBER_TAGS[repeat.key.arm]
        about = {tag: str(repeat.key.number), "arm": of_trial.arm, "repeats": str(of_trial)}
        tags = self._tags() | about | {"seed": str(repeat.seed), "trial_status": "running"}
        tags |= {KIND: _KINDS[repeat.key.arm]}
        name = f"{'trial ' if of_trial.arm == SEARCH else ''}{of_trial}, seed {repeat.seed}"
        name += ", test" if repeat.key.arm == TEST else ""
        self._open(run, name, event, self.state.trials[repeat.key].params, tags, batch)

    def _enter_finalists(self, event: Event, batch: "Batch") -> None:
        """How far the finalists are, which trial is the answer by now, and what their fresh seeds gave."""
        done = finalists_done(self.state)
        if done is None:
            return
        winner = winner_of(self.state)
        is_done = winner is not None and winner.finalist is not None
        batch.tag("", {"finalists": "done" if is_done else f"{done[0]} of {done[1]} trainings"})
        if winner is None:
            return
        if self._best.get(SEARCH) is not winner.record:
            self._best[SEARCH] = winner.record
            batch.metrics("", event.time, _best_metrics(winner.record), step=event.seq)
        self._enter_changed(event, _test_metrics(self.state), batch)
        if winner.finalist is not None:
            bases = [finalist for finalist in finalists(self.state) if finalist.record.key.arm != SEARCH]
            values = {name: value for each in (winner.finalist, *bases) for name, value in _fresh_metrics(each).items()}
            self._enter_changed(event, values, batch)

    def _enter_changed(self, event: Event, values: Mapping[str, float], batch: "Batch") -> None:
        """Those of the values that are not as they were last written."""
        changed = {name: value for name, value in values.items() if self._written.get(name) != value}
        self._written |= values
        if changed:
            batch.metrics("", event.time, changed, step=event.seq)

    def _enter_end(self, event: Event, batch: "Batch") -> None:
        key = event.key
        record = self.state.trials[key]
        status = record.status
        run, tags = run_of(key), {"trial_status": status.value, "reason": record.reason, "error": record.error}
        batch.tag(run, {name: text for name, text in tags.items() if text})
        batch.status[run] = (_MLFLOW_STATUS[status], event.time)
        self._enter_value(event, record, batch)
        self._enter_finalists(event, batch)
        self._enter_changed(event, self._summary(record), batch)

    def _summary(self, ended: TrialRecord) -> dict[str, float]:
        """What the sweep's run shows of all its trainings, one of which has just ended: trials by state, cost, gains."""
        hours = self._hours.hours
        values = {"cpu_hours": hours.cpu, "gpu_hours": hours.gpu}
        if ended.key.arm == SEARCH:
            self._ends[ended.status] = self._ends.get(ended.status, 0) + 1
        values |= {f"trials_{status.value}": float(count) for status, count in self._ends.items()}
        best = self._best.get(SEARCH)
        if self.state.finalists is not None or self.state.confirm is not None:
            return values | _gains(self.state)
        if best is None:
            return values
        own = {arm: (best.value or 0.0) - (base.value or 0.0) for arm, base in self._best.items() if arm != SEARCH}
        return values | {f"gain_over_{arm}": points for arm, points in own.items()}

    def _enter_value(self, event: Event, record: TrialRecord, batch: "Batch") -> None:
        """What a trial's end changes in the sweep's own run."""
        key, status = record.key, record.status
        if key.arm in REPEATING:
            return
        if status is not TrialStatus.COMPLETED or record.value is None or not math.isfinite(record.value):
            return
        self._enter_superseded(event, record, batch)
        if key.arm != SEARCH:
            each = {f"grid_{key.arm}_{name}": value for name, value in _outcome(record).items()}
            batch.metrics("", event.time, each, step=key.number)
        if key.arm == SEARCH and self.state.finalists is not None:
            return  # which trial is the answer is for the finalists to say
        best = self._best.get(key.arm)
        if best is None or _rank(record) > _rank(best):
            self._best[key.arm] = record
            batch.metrics("", event.time, _best_metrics(record), step=event.seq)

    def _enter_superseded(self, event: Event, record: TrialRecord, batch: "Batch") -> None:
        """What earlier versions wrote of an end: with the trial's number as the step, which a later end may have lower."""
        if record.key.arm != SEARCH:
            rows = {f"baseline_{record.key.arm}_{name}": value for name, value in _outcome(record).items()}
        elif (value := record.value or 0.0) > self._older_best:
            self._older_best, rows = value, {"best_val_top1": value}
        else:
            return
        for name, value in rows.items():
            batch.supersede("", name, value, step=record.key.number, at=event.time)

    def summary(self) -> dict[str, float]:
        """What the sweep's run is to show of its arms at this point of the ledger."""
        winner = winner_of(self.state)
        best = [record for arm in self.state.baseline_methods() if (record := self.state.best(arm)) is not None]
        best += [] if winner is None else [winner.record]
        return {name: value for record in best for name, value in _best_metrics(record).items()} | self._written

    def _tags(self) -> dict[str, str]:
        return {"sweep": self.state.header.sweep, "sweep_id": self.state.header.id}


@dataclass(frozen=True)
class Opening:
    """What a run is made with."""

    name: str
    time: float
    params: dict[str, str]
    tags: dict[str, str]
    note: str
    """Written when the run is made, and the user's from then on."""


class Row(NamedTuple):
    """A row of a run's metrics."""

    name: str
    step: int
    value: float
    at: int
    """Milliseconds since 1970."""


class Batch:
    """What some events of the ledger bring for each run ("" is the parent), to be sent in few requests.

    All of it is such as every store takes; what had to be changed or left out for that is told in `notes`.
    """

    def __init__(self) -> None:
        self.opened: dict[str, Opening] = {}
        self.points: dict[str, list[Row]] = defaultdict(list)
        self.tags: dict[str, dict[str, str]] = defaultdict(dict)
        self.status: dict[str, tuple[str, float | None]] = {}
        """MLflow's word, and the end in Unix seconds."""
        self.inputs: dict[str, Images] = {}
        """The dataset of each run."""
        self.superseded: dict[str, set[Row]] = defaultdict(set)
        """Rows that earlier versions wrote and that nothing takes back."""
        self.notes: dict[tuple[str, str], str] = {}
        """What is not as the ledger has it, by run and name."""

    def open(
        self, run: str, name: str, at: float, params: Mapping[str, Any], tags: Mapping[str, str], note: str = ""
    ) -> None:
        """A run begins, at a Unix time."""
        self.tag(run, tags)
        cleaned = {self._name(run, n): self._text(run, n, str(v), LONGEST_PARAM) for n, v in params.items()}
        self.opened[run] = Opening(clean_text(name, LONGEST_NAME), at, cleaned, dict(self.tags[run]), note)

    def tag(self, run: str, tags: Mapping[str, str]) -> None:
        """A run has tags."""
        self.tags[run] |= {name: self._text(run, name, text, LONGEST_TAG) for name, text in tags.items()}

    def metrics(self, run: str, at: float, values: Mapping[str, Any], *, step: int) -> None:
        """A run has metrics at a step, measured at a Unix time."""
        for name, value in values.items():
            number = clean_number(value)
            if number is not None and is_step(step):
                self.points[run].append(Row(self._name(run, name), step, number, milliseconds(at)))
            elif number is not None or not isinstance(value, float):  # that NaN and infinities are left out goes unsaid
                self.notes[run, name] = (
                    f"metric {name!r} is left out: {str(value)[:40]} at step {step} does not fit a float"
                )

    def supersede(self, run: str, name: str, value: float, *, step: int, at: float) -> None:
        """A run may have a row that an earlier version wrote, at a Unix time."""
        self.superseded[run].add(Row(clean_name(name), step, value, milliseconds(at)))

    def put_off(self, runs: Iterable[str]) -> "Batch":
        """Move the tags and states of these runs into a batch of their own, as they may change again."""
        later = Batch()
        for run in runs:
            if run in self.tags:
                later.tags[run] = self.tags.pop(run)
            if run in self.status:
                later.status[run] = self.status.pop(run)
        return later

    def touched(self) -> Iterable[str]:
        """The runs that have something new, the parent first."""
        return sorted({*self.opened, *self.tags, *self.points, *self.status, *self.inputs}, key=_place)

    def _name(self, run: str, name: str) -> str:
        cleaned = clean_name(name)
        if cleaned != name:
            self.notes[run, name] = f"{name!r} is called {cleaned!r}"
        return cleaned

    def _text(self, run: str, name: str, text: str, limit: int) -> str:
        cleaned = clean_text(text, limit)
        if cleaned != text:
            self.notes[run, name] = f"{name!r} is not quite the ledger's: a sign that MLflow cannot hold, or too long"
        return cleaned


def run_of(key: TrialKey) -> str:
    """Which run is a trial's."""
    return str(key.number) if key.arm == SEARCH else str(key)


def metric_name(name: str, params: Iterable[str]) -> str:
    """What a metric is called in a run that has these parameters: never what one of them is."""
    name = METRIC_NAMES.get(name, name)
    return f"{name}_metric" if name in params else name


def run_in(tags: Mapping[str, str]) -> str:
    """Which run has these tags; that of the sweep itself is ""."""
    for arm, tag in _NUMBER_TAGS.items():
        if (number := tags.get(tag, "")).isdigit():
            return str(TrialKey(arm, int(number)))
    if (number := tags.get(BASELINE_TAG, "")).isdigit():
        return str(TrialKey(tags.get("arm", ""), int(number)))
    return tags.get(TRIAL_TAG, "")


def run_name(run: str) -> str:
    """How MLflow's pages show a trial of the search or of a baseline: `trial 0007`, `kd-0013`."""
    return f"trial {int(run):04d}" if run.isdigit() else run


def _place(run: str) -> tuple[int, int, str]:
    """Sorts runs: the sweep's own, then its trials by number, then those that repeat them."""
    return (0, 0, "") if not run else (1, int(run), "") if run.isdigit() else (2, len(run), run)


def _images(header: Header, prepared: Prepared) -> Images | None:
    """The dataset, if the ledger says what its content is."""
    digest = prepared.identities.get("data", "")
    if not digest or not header.dataset:
        return None
    splits = dict(prepared.images)
    about = ({"num_rows": sum(splits.values())} | splits) if splits else {}
    return Images(header.dataset, digest[:_DIGEST_LENGTH], json.dumps(about | {"classes": header.num_classes}))


def _sweep_params(header: Header) -> dict[str, Any]:
    names = ("dataset", "teacher", "student", "method", "trials", "epochs", "seed", "digest", "git_commit")
    return {name: value for name in names if (value := getattr(header, name)) not in (None, "")}


def _outcome(record: TrialRecord) -> dict[str, float]:
    """A completed trial's value and those of its parameters that are numbers."""
    values = {name: None if isinstance(v, bool | str) else clean_number(v) for name, v in record.params.items()}
    return {"val_top1": record.value or 0.0} | {name: value for name, value in values.items() if value is not None}


def _best_metrics(record: TrialRecord) -> dict[str, float]:
    if record.key.arm != SEARCH:
        return {f"baseline_{record.key.arm}_{name}": value for name, value in _outcome(record).items()}
    return {"best_val_top1": record.value or 0.0, "best_trial": float(record.key.number)}


def _fresh_metrics(finalist: Finalist) -> dict[str, float]:
    """The mean of a finalist's fresh seeds and its standard error, as far as there are any."""
    key = finalist.record.key
    prefix = "finalist" if key.arm == SEARCH else f"finalist_{key.arm}"
    values = {f"{prefix}_val_top1": finalist.mean, f"{prefix}_error": finalist.error}
    found = {name: value for name, value in values.items() if value is not None}
    return found | ({f"{prefix}_trial": float(key.number)} if key.arm == SEARCH else {})


def _test_metrics(state: SweepState) -> dict[str, float]:
    """What the newest look at the test set gave, once all of its trainings have ended."""
    done = measured_done(state)
    if done is None or done[0] < done[1]:
        return {}
    values: dict[str, float | None] = {"test_look": float(state.looks[-1].look)}
    for number, finalist in enumerate(measured(state)):
        prefix = f"test_{finalist.record.key.arm}_" if number else "test_"
        values |= {f"{prefix}top1": finalist.mean, f"{prefix}error": finalist.error}
    return {name: value for name, value in values.items() if value is not None}


def _gains(state: SweepState) -> dict[str, float]:
    """By how much the answer is above the best run of each baseline, in points, by the best evidence that there is."""
    winner = winner_of(state)
    if winner is None:
        return {}
    done = measured_done(state)
    if done is not None and done[0] == done[1] and is_of_the_answer(state) and measured(state)[0].values:
        answer, *others = measured(state)
        found = {other.record.key.arm: apart_by_seed(answer, other) for other in others}
    elif winner.finalist is not None:
        found = apart_from_baselines(state)
    else:
        own = winner.record.value or 0.0
        return {f"gain_over_{base.key.arm}": own - (base.value or 0.0) for base in baseline_trials(state)}
    return {f"gain_over_{arm}": statistics.fmean(apart) for arm, apart in found.items() if apart}


def _rank(record: TrialRecord) -> tuple[float, int]:
    """Sorts completed trials; of equals the one suggested first is the better."""
    return record.value or 0.0, -record.key.number


def milliseconds(seconds: float) -> int:
    """Unix time as MLflow has it."""
    return round(seconds * 1000)
