"""The ledger in MLflow's terms: which runs there should be, with which rows, tags and status."""

import math
from collections import defaultdict
from collections.abc import Iterable
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tune_topkd.trials import SEARCH
from tune_topkd.trials import Event
from tune_topkd.trials import SweepState
from tune_topkd.trials import TrialStatus

_MLFLOW_STATUS = {
    TrialStatus.COMPLETED: "FINISHED",
    TrialStatus.PRUNED: "KILLED",
    TrialStatus.FAILED: "FAILED",
}
_MLFLOW_END = {"finished": "FINISHED", "time_budget": "FINISHED", "failed": "FAILED"}
PARENT_TAG = "mlflow.parentRunId"
_LONGEST_TAG = 5000


class Reading:
    """The ledger in MLflow's terms: takes the events in order, and enters into a batch what each one brings."""

    def __init__(self) -> None:
        self.state = SweepState()
        """At the last event taken; trials that have ended are without their reports, so that it stays small."""
        self._now = 0.0
        self._best = -math.inf

    def take(self, event: Event, batch: "Batch") -> None:
        """Take the next event."""
        was_driven, before, self._now = bool(self.state.last_driver), self._now, event.time
        self.state.apply(event)
        match event.name:
            case "sweep":
                batch.open("", event, _sweep_params(event.data), self._tags())
            case "driver":
                self._enter_work("running", "running", "RUNNING", "RUNNING", before if was_driven else None, batch)
            case "suggest" if event.key.arm == SEARCH:
                tags = self._tags() | {"trial_number": str(event.key.number), "trial_status": "running"}
                batch.open(str(event.key.number), event, event.data["params"], tags)
            case "report" if event.key.arm == SEARCH:
                batch.metrics(str(event.key.number), event, event.data["metrics"], step=event.data["epoch"])
            case "end":
                self._enter_end(event, batch)
                self.state.trials[event.key].reports.clear()
            case "stop":
                reason = event.data["reason"]
                self._enter_work(reason, "interrupted", _MLFLOW_END.get(reason, "KILLED"), "KILLED", event.time, batch)

    def abandon(self, batch: "Batch") -> None:
        """Enter what a `stop` event for an interruption, now, would have brought; nothing if there was one."""
        if not self.state.stop_reason:
            self._enter_work("interrupted", "interrupted", "KILLED", "KILLED", self._now, batch)

    def _enter_work(
        self, state: str, trial_status: str, parent: str, child: str, ended: float | None, batch: "Batch"
    ) -> None:
        """Work on the sweep begins, goes on or ends: the parent's state, and that of the trials under way."""
        batch.tags[""]["state"] = state
        batch.status[""] = (parent, ended)
        for record in self.state.running():
            if record.key.arm == SEARCH:
                batch.tags[str(record.key.number)]["trial_status"] = trial_status
                batch.status[str(record.key.number)] = (child, ended)

    def _enter_end(self, event: Event, batch: "Batch") -> None:
        key, status = event.key, TrialStatus(event.data["status"])
        if key.arm != SEARCH:
            if status is TrialStatus.COMPLETED:
                record = self.state.trials[key]
                values = {"val_top1": event.data["value"], **record.params}
                named = {f"baseline_{key.arm}_{n}": v for n, v in values.items() if not isinstance(v, str | bool)}
                batch.metrics("", event, named, step=key.number)
            return
        trial = str(key.number)
        tags = {"trial_status": status.value, "reason": event.data["reason"], "error": event.data.get("error", "")}
        batch.tags[trial] |= {name: text[:_LONGEST_TAG] for name, text in tags.items() if text}
        batch.status[trial] = (_MLFLOW_STATUS[status], event.time)
        if status is TrialStatus.COMPLETED and event.data["value"] > self._best:
            self._best = event.data["value"]
            batch.metrics("", event, {"best_val_top1": self._best}, step=key.number)

    def _tags(self) -> dict[str, str]:
        return {"sweep": self.state.header["sweep"], "sweep_id": self.state.header["id"]}


@dataclass(frozen=True)
class Opening:
    """What a run is made with."""

    name: str
    time: float
    params: dict[str, str]
    tags: dict[str, str]


class Batch:
    """What some events of the ledger bring for each run ("" is the parent), to be sent in few requests."""

    def __init__(self) -> None:
        self.opened: dict[str, Opening] = {}
        self.points: dict[str, list[tuple[str, int, float, int]]] = defaultdict(list)
        """Metric rows: name, step, value, milliseconds since 1970."""
        self.tags: dict[str, dict[str, str]] = defaultdict(dict)
        self.status: dict[str, tuple[str, float | None]] = {}
        """MLflow's word, and the end in Unix seconds."""

    def open(self, run: str, event: Event, params: Mapping[str, Any], tags: dict[str, str]) -> None:
        """A run begins."""
        name = run_name(run) if run else tags["sweep"]
        self.opened[run] = Opening(name, event.time, {n: str(v) for n, v in params.items()}, tags)
        self.tags[run] |= tags

    def metrics(self, run: str, event: Event, values: Mapping[str, float | str], *, step: int) -> None:
        """A run has metrics at a step."""
        points = [(n, step, float(v), milliseconds(event.time)) for n, v in values.items()]
        self.points[run] += [p for p in points if math.isfinite(p[2])]  # stores disagree on NaN; the ledger has it

    def touched(self) -> Iterable[str]:
        """The runs that have something new besides their status."""
        return [run for run in {**self.tags, **self.points} if self.tags[run] or self.points[run]]


def run_name(run: str) -> str:
    """How MLflow's pages show a trial."""
    return f"trial {int(run):04d}"


def _sweep_params(header: Mapping[str, Any]) -> dict[str, Any]:
    names = ("dataset", "teacher", "student", "method", "trials", "epochs", "seed", "digest", "git_commit")
    return {name: header[name] for name in names if header.get(name) is not None}


def milliseconds(seconds: float) -> int:
    """Unix time as MLflow has it."""
    return round(seconds * 1000)
