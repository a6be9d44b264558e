"""MLflow: one parent run per sweep, one nested child run per trial, written beside the sweep from its ledger.

The tracker is a thread that follows the ledger file. What it writes is a function of the ledger, and writing it twice
changes nothing: runs are found again by their tags, and metrics carry the ledger's times. So a tracking server that is
slow, down or gone costs the sweep nothing, and what was missed is caught up the next time the ledger is followed.

In MLflow (experiment `tune_topkd`, or `MLFLOW_EXPERIMENT_NAME`):

- the parent: tags `sweep`, `sweep_id`, `state`; params of the sweep; metrics `best_val_top1` and
  `baseline_<method>_<metric>`, their step the trial's number;
- a child: tags `sweep`, `sweep_id`, `trial_number`, `trial_status` (completed | pruned | failed; running and interrupted
  while it has no end), `reason`; its parameters; its metrics by epoch.
"""

import logging
import math
import os
import re
import threading
from collections import defaultdict
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from typing import Protocol

from tune_topkd.trials import SEARCH
from tune_topkd.trials import Event
from tune_topkd.trials import SweepState
from tune_topkd.trials import TrialKey
from tune_topkd.trials import TrialStatus
from tune_topkd.trials import read_events

# MLflow reads these at import or at a request; what the user has set wins. Its own patience with a server that is
# down is minutes per call; ours is the retry loop below.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

EXPERIMENT = "tune_topkd"
METRICS_PER_BATCH = 1000  # MLflow's limit for one log_batch
SECONDS_BETWEEN_LOOKS = 1.0
LONGEST_RETRY_SECONDS = 30.0

_log = logging.getLogger(__name__)


class MlflowTracker:
    """Follows a sweep's ledger into MLflow, on a thread of its own; a `tune_topkd.trials.Tracker`."""

    def __init__(self, ledger: Path, uri: str) -> None:
        """Start following.

        Args:
            ledger: the sweep's ledger file.
            uri: MLflow's tracking URI; credentials in it are never shown.
        """
        self.uri = uri
        self.trouble = ""
        """What MLflow last failed with, if it did; empty once it answers again."""
        self._follower = _Follower(ledger, uri)
        self._news = threading.Event()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="mlflow-tracker", daemon=True)
        self._thread.start()

    def notify(self, event: Event) -> None:
        """Something is new in the ledger; the thread will see it."""
        self._news.set()

    def close(self, patience: float = 60.0) -> None:
        """Catch up with the ledger's end; give up after `patience` seconds, or at once if MLflow does not answer."""
        self._closing.set()
        self._news.set()
        self._thread.join(patience)
        if self._thread.is_alive() and not self.trouble:
            self.trouble = f"not done after {patience:g} s"

    @property
    def is_caught_up(self) -> bool:
        """Whether MLflow has all that the ledger tells."""
        return not self._thread.is_alive() and not self.trouble

    def _follow(self) -> None:
        wait = SECONDS_BETWEEN_LOOKS
        while True:
            last_look = self._closing.is_set()
            try:
                self._follower.catch_up()
                if self.trouble:
                    _log.warning("MLflow answers again; it has been caught up")
                self.trouble, wait = "", SECONDS_BETWEEN_LOOKS
            except Exception as error:  # noqa: BLE001 (observing may fail, work goes on; said once per outage)
                if not self.trouble:
                    _log.warning("MLflow at %s fails; the sweep goes on without it", masked(self.uri), exc_info=error)
                self.trouble = masked(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
                wait = min(2 * wait, LONGEST_RETRY_SECONDS)
            if last_look:
                return
            self._closing.wait(wait) if self.trouble else self._wait_for_news(wait)

    def _wait_for_news(self, rest: float) -> None:
        self._news.wait()
        self._news.clear()
        self._closing.wait(rest)  # let more come together into one batch


def catch_up(ledger: Path, uri: str) -> None:
    """Bring MLflow to where the ledger is, once; any number of times gives the same runs.

    Raises:
        LedgerError: the ledger is damaged.
        Exception: whatever MLflow raises.
    """
    _Follower(ledger, uri).catch_up()


def log_training(
    uri: str,
    name: str,
    *,
    params: Mapping[str, Any],
    tags: Mapping[str, str],
    history: Sequence[tuple[int, float, Mapping[str, float]]],
    started: float,
    status: str,
) -> str:
    """Write one training that belongs to no sweep as a run of its own.

    Args:
        uri: MLflow's tracking URI.
        name: the run's.
        params: the run's, by dotted key.
        tags: the run's.
        history: (epoch, Unix seconds, metrics) of each epoch; values that are not finite are left out.
        started: Unix seconds.
        status: MLflow's: FINISHED, FAILED or KILLED.

    Returns:
        What went wrong, in one line without credentials, or nothing: observing may fail, the training is done.
    """
    from mlflow.entities import Metric
    from mlflow.entities import Param

    try:
        client, experiment = _connected(uri)
        run = client.create_run(experiment, _ms(started), dict(tags), name).info.run_id
        chunk = [Param(n, str(v)) for n, v in params.items()]
        for start in range(0, len(chunk), 100):
            client.log_batch(run, params=chunk[start : start + 100])
        points = [
            Metric(n, v, _ms(at), epoch)
            for epoch, at, metrics in history
            for n, v in metrics.items()
            if math.isfinite(v)
        ]
        for start in range(0, len(points), METRICS_PER_BATCH):
            client.log_batch(run, metrics=points[start : start + METRICS_PER_BATCH])
        client.set_terminated(run, status)
    except Exception as error:  # noqa: BLE001 (observing may fail; the caller says so)
        return masked(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
    return ""


def masked(text: str) -> str:
    """The text with the credentials of every URI in it starred out."""
    return re.sub(r"(\w+://)[^/@\s]+@", r"\1***@", text)


def check_uri(uri: str) -> None:
    """Open the tracking store once.

    Raises:
        ValueError: it cannot be opened; with the reason, credentials masked.
    """
    from mlflow import MlflowClient  # costs seconds: only where MLflow is used

    try:
        MlflowClient(tracking_uri=uri).search_experiments(max_results=1)
    except Exception as error:
        reason = masked(" ".join(str(error).split())[:300])
        raise ValueError(f"MLflow at {masked(uri)} cannot be used: {reason}") from error


class _Client(Protocol):
    """The part of `mlflow.MlflowClient` that is used here."""

    def get_experiment_by_name(self, name: str) -> Any: ...
    def create_experiment(self, name: str, artifact_location: str | None = None) -> str: ...
    def search_runs(
        self, experiment_ids: list[str], filter_string: str, *, max_results: int, page_token: Any
    ) -> Any: ...
    def create_run(self, experiment_id: str, start_time: int, tags: dict[str, str], run_name: str) -> Any: ...
    def log_batch(self, run_id: str, metrics: Any = (), params: Any = (), tags: Any = ()) -> Any: ...
    def set_terminated(self, run_id: str, status: str, end_time: int | None = None) -> None: ...
    def update_run(self, run_id: str, status: str) -> None: ...


class _Follower:
    """Where MLflow is in the ledger. The place moves on only when MLflow has taken what lies before it."""

    def __init__(self, ledger: Path, uri: str) -> None:
        self._ledger = ledger
        self._uri = uri
        self._offset = 0
        self._state = SweepState()
        self._behind: list[Event] = []
        self._client: _Client | None = None
        self._experiment = ""
        self._runs: dict[str, str] = {}
        """Run ids by trial number, the parent's under ""."""

    def catch_up(self) -> None:
        """Write what the ledger has beyond the last time."""
        events, self._offset = read_events(self._ledger, self._offset)
        for event in events:
            self._state.apply(event)
        self._behind += events
        if not self._behind:
            return
        if self._client is None:
            self._connect()
        batches = _Batches()
        for event in self._behind:
            self._enter(event, batches)
        self._send(batches)
        self._behind = []

    def _connect(self) -> None:
        client, self._experiment = _connected(self._uri)
        self._runs = _find_runs(client, self._experiment, self._state.header["id"])
        self._client = client

    def _enter(self, event: Event, batches: "_Batches") -> None:
        match event.name:
            case "sweep":
                batches.open("", event, _sweep_params(event.data), self._tags())
            case "driver":
                batches.tags[""]["state"] = "running"
                batches.status[""] = ("RUNNING", event.time)
                for record in self._state.running():
                    if record.key.arm == SEARCH and str(record.key.number) in self._runs:
                        batches.tags[str(record.key.number)]["trial_status"] = "running"
                        batches.status[str(record.key.number)] = ("RUNNING", event.time)
            case "suggest" if event.key.arm == SEARCH:
                tags = self._tags() | {"trial_number": str(event.key.number), "trial_status": "running"}
                batches.open(str(event.key.number), event, event.data["params"], tags)
            case "report" if event.key.arm == SEARCH:
                batches.metrics(str(event.key.number), event, event.data["metrics"], step=event.data["epoch"])
            case "end":
                self._enter_end(event, batches)
            case "stop":
                self._enter_stop(event, batches)

    def _enter_end(self, event: Event, batches: "_Batches") -> None:
        key, status = event.key, TrialStatus(event.data["status"])
        if key.arm != SEARCH:
            if status is TrialStatus.COMPLETED:
                record = self._state.trials[key]
                values = {"val_top1": event.data["value"], **record.params}
                named = {f"baseline_{key.arm}_{n}": v for n, v in values.items() if not isinstance(v, str | bool)}
                batches.metrics("", event, named, step=key.number)
            return
        trial = str(key.number)
        tags = {"trial_status": status.value, "reason": event.data["reason"], "error": event.data.get("error", "")}
        batches.tags[trial] |= {name: text for name, text in tags.items() if text}
        batches.status[trial] = (_MLFLOW_STATUS[status], event.time)
        if status is TrialStatus.COMPLETED and self._is_best_so_far(key):
            batches.metrics("", event, {"best_val_top1": event.data["value"]}, step=key.number)

    def _is_best_so_far(self, key: TrialKey) -> bool:
        this = self._state.trials[key]
        before = [r for r in self._state.ranked() if (r.ended_at or 0, r.key) < (this.ended_at or 0, key)]
        return not before or (this.value or 0.0) > (before[0].value or 0.0)

    def _enter_stop(self, event: Event, batches: "_Batches") -> None:
        reason = event.data["reason"]
        batches.tags[""]["state"] = reason
        ends = {"finished": "FINISHED", "time_budget": "FINISHED", "failed": "FAILED"}
        batches.status[""] = (ends.get(reason, "KILLED"), event.time)
        for record in self._state.running():
            if record.key.arm == SEARCH:
                batches.tags[str(record.key.number)]["trial_status"] = "interrupted"
                batches.status[str(record.key.number)] = ("KILLED", event.time)

    def _tags(self) -> dict[str, str]:
        return {"sweep": self._state.header["sweep"], "sweep_id": self._state.header["id"]}

    def _send(self, batches: "_Batches") -> None:
        from mlflow.entities import Metric
        from mlflow.entities import Param
        from mlflow.entities import RunTag

        assert self._client is not None, "connected before sending"
        for run, (name, event, params, tags) in batches.opened.items():
            if run not in self._runs:
                parent = {"mlflow.parentRunId": self._runs[""]} if run else {}
                created = self._client.create_run(self._experiment, _ms(event.time), {**tags, **parent}, name)
                self._runs[run] = created.info.run_id
            chunk = [Param(n, str(v)) for n, v in params.items()]
            for start in range(0, len(chunk), 100):  # MLflow's limit for one log_batch
                self._client.log_batch(self._runs[run], params=chunk[start : start + 100])
        for run in batches.touched():
            metrics = [Metric(n, v, _ms(t), step) for n, v, t, step in batches.points[run]]
            run_tags = [RunTag(n, text[:5000]) for n, text in batches.tags[run].items()]
            for start in range(0, max(len(metrics), 1), METRICS_PER_BATCH):
                part = metrics[start : start + METRICS_PER_BATCH]
                self._client.log_batch(self._runs[run], metrics=part, tags=run_tags if start == 0 else [])
        for run, (status, at) in batches.status.items():
            if status == "RUNNING":
                self._client.update_run(self._runs[run], status)
            else:
                self._client.set_terminated(self._runs[run], status, _ms(at))


class _Batches:
    """What one look at the ledger brings for each run ("" is the parent), to be sent in few requests."""

    def __init__(self) -> None:
        self.opened: dict[str, tuple[str, Event, Mapping[str, Any], dict[str, str]]] = {}
        self.points: dict[str, list[tuple[str, float, float, int]]] = defaultdict(list)
        self.tags: dict[str, dict[str, str]] = defaultdict(dict)
        self.status: dict[str, tuple[str, float]] = {}

    def open(self, run: str, event: Event, params: Mapping[str, Any], tags: dict[str, str]) -> None:
        name = f"trial {int(run):04d}" if run else tags["sweep"]
        self.opened[run] = (name, event, params, tags)
        self.tags[run] |= tags

    def metrics(self, run: str, event: Event, values: Mapping[str, float | str], *, step: int) -> None:
        points = [(n, float(v), event.time, step) for n, v in values.items()]
        self.points[run] += [p for p in points if math.isfinite(p[1])]  # stores disagree on NaN; the ledger has it

    def touched(self) -> Iterable[str]:
        return [run for run in {**self.tags, **self.points} if self.tags[run] or self.points[run]]


_MLFLOW_STATUS = {
    TrialStatus.COMPLETED: "FINISHED",
    TrialStatus.PRUNED: "KILLED",
    TrialStatus.FAILED: "FAILED",
}


def _connected(uri: str) -> tuple[_Client, str]:
    """A client, and the id of the experiment, which is created if need be."""
    from mlflow import MlflowClient  # costs seconds: here it is the tracker's thread that waits

    client: _Client = MlflowClient(tracking_uri=uri)
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT
    experiment = client.get_experiment_by_name(name)
    return client, experiment.experiment_id if experiment else _create_experiment(client, name, uri)


def _create_experiment(client: _Client, name: str, uri: str) -> str:
    location = None
    if uri.startswith("sqlite:///"):  # by default artifacts would go to the working directory
        location = (Path(uri.removeprefix("sqlite:///")).resolve().parent / "mlartifacts").as_uri()
    return client.create_experiment(name, artifact_location=location)


def _find_runs(client: _Client, experiment: str, sweep_id: str) -> dict[str, str]:
    runs: dict[str, str] = {}
    token = None
    while True:
        page = client.search_runs([experiment], f"tags.sweep_id = '{sweep_id}'", max_results=1000, page_token=token)
        for run in page:
            runs[run.data.tags.get("trial_number", "")] = run.info.run_id
        token = page.token
        if not token:
            return runs


def _sweep_params(header: Mapping[str, Any]) -> dict[str, Any]:
    names = ("dataset", "teacher", "student", "method", "trials", "epochs", "seed", "digest", "git_commit")
    return {name: header[name] for name in names if header.get(name) is not None}


def _ms(seconds: float) -> int:
    return round(seconds * 1000)
