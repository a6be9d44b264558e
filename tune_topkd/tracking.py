"""MLflow: one parent run per sweep, one nested child run per trial, written beside the sweep from its ledger.

The tracker is a thread that follows the ledger file. What it writes is a function of the ledger, and writing it twice
changes nothing: runs are found again by their tags, and metrics carry the ledger's times. So a tracking server that is
slow, down or gone costs the sweep nothing, and what was missed is caught up the next time the ledger is followed. The
same function tells what MLflow should have, which `disagreements` compares with what it has.

In MLflow (experiment `tune_topkd`, or `MLFLOW_EXPERIMENT_NAME`):

- the parent: tags `sweep`, `sweep_id`, `state`; params of the sweep; metrics `best_val_top1` and
  `baseline_<method>_<metric>`, their step the trial's number;
- a child: tags `sweep`, `sweep_id`, `trial_number`, `trial_status` (completed | pruned | failed; running and interrupted
  while it has no end), `reason`; its parameters; its metrics by epoch.

A run that was interrupted and goes on keeps the time of the interruption as its end until it has another one: MLflow
takes no end back.
"""

import contextlib
import logging
import math
import os
import re
import threading
import time
import traceback
from collections import Counter
from collections import defaultdict
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from typing import Protocol
from urllib.parse import unquote

from tune_topkd.trials import SEARCH
from tune_topkd.trials import Event
from tune_topkd.trials import LedgerError
from tune_topkd.trials import SweepState
from tune_topkd.trials import TrialStatus
from tune_topkd.trials import read_events

# MLflow reads these at import or at a request; what the user has set wins. Its own patience with a server that is down
# is minutes per call; ours is the retry loop below. It must not repeat a request by itself: `create_run`, repeated after
# its answer was lost, makes a second run. And it prints a link with the credentials of the URI at the end of each run.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")

EXPERIMENT = "tune_topkd"
EVENTS_PER_CHUNK = 2000  # what is held while MLflow is down; some 200 trials of 9 epochs
SECONDS_BETWEEN_LOOKS = 1.0
LONGEST_RETRY_SECONDS = 30.0
LONGEST_SILENCE_SECONDS = 15.0  # at the end of a sweep; longer than one request may take
FINDINGS_PER_RUN = 5

_log = logging.getLogger(__name__)


class TrackingError(RuntimeError):
    """MLflow has failed; with the reason in one line, credentials masked."""


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
        """Catch up with the ledger's end, for `patience` seconds at most.

        Gives up earlier if MLflow fails again, or answers nothing for 15 seconds.
        """
        self._closing.set()
        self._news.set()
        began = heard = time.monotonic()
        answers = self._follower.answers
        while self._thread.is_alive() and time.monotonic() - began < patience:
            self._thread.join(0.05)
            if answers != self._follower.answers:
                answers, heard = self._follower.answers, time.monotonic()
            # Before the first answer the time may go into imports and into making tables, not into waiting.
            if (answers or self.trouble) and time.monotonic() - heard > LONGEST_SILENCE_SECONDS:
                break
        if self._thread.is_alive() and not self.trouble:
            self.trouble = f"not done after {time.monotonic() - began:.0f} s"

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
                    # Not by exc_info: a formatted traceback would show the URI.
                    trace = masked("".join(traceback.format_exception(error)), self.uri)
                    _log.warning("MLflow at %s fails; the sweep goes on without it\n%s", masked(self.uri), trace)
                self.trouble = _reason(error, self.uri)
                wait = min(2 * wait, LONGEST_RETRY_SECONDS)
            if last_look:
                return
            self._closing.wait(wait) if self.trouble else self._wait_for_news(wait)

    def _wait_for_news(self, rest: float) -> None:
        self._news.wait()
        self._news.clear()
        self._closing.wait(rest)  # let more come together into one batch


def catch_up(ledger: Path, uri: str, *, abandoned: bool = False) -> None:
    """Bring MLflow to where the ledger is, once; any number of times gives the same runs.

    Args:
        ledger: the sweep's ledger file.
        uri: MLflow's tracking URI.
        abandoned: nobody drives the sweep. If its driver was killed, so that the ledger does not say so, what is running
            is shown as interrupted since the ledger's last event. When the sweep goes on, this is as if never said.

    Raises:
        LedgerError: the ledger is damaged.
        TrackingError: MLflow fails; what it has taken until then is kept.
    """
    with _masked_errors(uri):
        follower = _Follower(ledger, uri)
        follower.catch_up()
        if abandoned:
            follower.abandon()


def disagreements(ledger: Path, uri: str) -> list[str]:
    """Where MLflow differs from what the ledger says it should have; nothing is written.

    Looks at the parent and at one run per trial, each there once: status, times, params and tags as far as they are
    written here, and exactly the metric rows. A killed driver's running trials may also be shown as interrupted.

    Returns:
        A line for each finding, which names the trial; at most five a trial, and how many more there are.

    Raises:
        LedgerError: the ledger is damaged.
        TrackingError: MLflow fails.
    """
    reading, should_be, abandoned = _Reading(), _Batch(), _Batch()
    for event in read_events(ledger)[0]:
        reading.take(event, should_be)
    if not reading.state.header:
        return []
    reading.abandon(abandoned)
    with _masked_errors(uri):
        client = _client(uri)
        experiment = client.get_experiment_by_name(_experiment_name())
        sweep_id = reading.state.header["id"]
        found = _runs_by_trial(client, experiment.experiment_id, sweep_id) if experiment else {}
        parents = {run.info.run_id for run in found.get("", [])}
        findings = []
        for run in [*should_be.opened, *sorted(set(found) - set(should_be.opened))]:
            copies = found.get(run, [])
            if len(copies) != 1:
                lines = [f"has {len(copies)} runs in MLflow" if copies else "has no run in MLflow"]
            elif run not in should_be.opened:
                lines = ["has a run in MLflow, but is not in the ledger"]
            else:
                rows = _rows(client, copies[0], {name for name, *_ in should_be.points[run]})
                lines = list(_differences(copies[0], run, should_be, abandoned, rows, parents))
            if len(lines) > FINDINGS_PER_RUN:
                lines[FINDINGS_PER_RUN:] = [f"and {len(lines) - FINDINGS_PER_RUN} more"]
            findings += [f"{_run_name(run) if run else 'the sweep'}: {line}" for line in lines]
    return findings


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
    try:
        from mlflow.entities import Metric
        from mlflow.entities import Param

        client = _client(uri)
        run = client.create_run(_experiment(client, uri), _ms(started), dict(tags), name).info.run_id
        points = [
            Metric(n, v, _ms(at), epoch)
            for epoch, at, metrics in history
            for n, v in metrics.items()
            if math.isfinite(v)
        ]
        client.log_batch(run, metrics=points, params=[Param(n, str(v)) for n, v in params.items()])
        client.set_terminated(run, status)
    except Exception as error:  # noqa: BLE001 (observing may fail; the caller says so)
        return _reason(error, uri)
    return ""


_USER_INFO = re.compile(r"(\w[\w+.-]*://)(?=[^/\s])(\S*)@")
"""Up to the last @ of a word: a password may have any sign in it. Where the URI has no host there is no user either."""
_SECRET_PARAMETER = re.compile(
    r"([?&;](?:sig|[\w.%-]*(?:passw|pwd|passphrase|token|secret|api[_-]?key|access[_-]?key|credential|signature"
    r"|odbc_connect)[\w.%-]*)=)([^&\s]*)",
    re.IGNORECASE,
)
_SHORTEST_SECRET = 4  # what is shorter is starred in URIs only: it may be part of any word


def masked(text: str, *uris: str) -> str:
    """The text with the credentials of every URI in it starred out: users, passwords, tokens, secrets in its query.

    What is secret in `uris` is starred wherever it stands: who fails to take a URI apart shows pieces of it. Where it is
    not clear what belongs to a password, too much is starred rather than too little.
    """
    text = _SECRET_PARAMETER.sub(r"\1***", _USER_INFO.sub(r"\1***@", text))
    for secret in sorted({s for uri in uris for s in _secrets(uri)}, key=len, reverse=True):
        text = text.replace(secret, "***")
    return text


def _secrets(uri: str) -> Iterator[str]:
    """What is secret in a URI: as it stands there, decoded, and in pieces."""
    values = [value for _, value in _SECRET_PARAMETER.findall(uri)]
    for _, info in _USER_INFO.findall(uri):
        user, _, password = info.partition(":")
        values.append(password or user)
    for value in values:
        forms = [value, unquote(value), *re.split(r"[@:/?#&;\[\]]", value)]
        yield from (form for form in forms if len(form) >= _SHORTEST_SECRET)


def check_uri(uri: str) -> None:
    """Open the tracking store once.

    Raises:
        ValueError: it cannot be opened; with the reason, credentials masked.
    """
    try:
        _client(uri).search_experiments(max_results=1)
    except Exception as error:  # noqa: BLE001 (whatever it is, it is told)
        reason = _reason(error, uri)
        # The cause would show the URI in a traceback.
        raise ValueError(f"MLflow at {masked(uri)} cannot be used: {reason}") from None


def _reason(error: Exception, uri: str) -> str:
    """An error in one line. It is cut when it is masked: half a URI has no @ to be known by."""
    return masked(" ".join(f"{type(error).__name__}: {error}".split()), uri)[:300]


@contextlib.contextmanager
def _masked_errors(uri: str) -> Iterator[None]:
    try:
        yield
    except LedgerError:
        raise
    except Exception as error:  # noqa: BLE001 (MLflow raises what its libraries raise)
        raise TrackingError(f"MLflow at {masked(uri)} fails: {_reason(error, uri)}") from None


class _Client(Protocol):
    """The part of `mlflow.MlflowClient` that is used here."""

    def search_experiments(self, *, max_results: int) -> Any: ...
    def get_experiment_by_name(self, name: str) -> Any: ...
    def create_experiment(self, name: str, artifact_location: str | None = None) -> str: ...
    def search_runs(
        self, experiment_ids: list[str], filter_string: str, *, max_results: int, page_token: Any
    ) -> Any: ...
    def create_run(self, experiment_id: str, start_time: int, tags: dict[str, str], run_name: str) -> Any: ...
    def delete_run(self, run_id: str) -> None: ...
    def log_batch(self, run_id: str, metrics: Any = (), params: Any = (), tags: Any = ()) -> Any: ...
    def set_terminated(self, run_id: str, status: str, end_time: int | None = None) -> None: ...
    def update_run(self, run_id: str, status: str) -> None: ...
    def get_metric_history(self, run_id: str, key: str) -> Any: ...


class _Follower:
    """Where MLflow is in the ledger. The place moves on only when MLflow has taken what lies before it.

    **Memory.** While MLflow is down one chunk of events waits, as the batch it made, and the ledger is not read on. While
    it catches up, the events that lie behind are in memory once; what they bring is sent chunk by chunk.
    """

    def __init__(self, ledger: Path, uri: str) -> None:
        self.answers = 0
        """How many requests MLflow has answered; another thread may look at it."""
        self._ledger = ledger
        self._uri = uri
        self._client: _Client | None = None
        self._experiment = ""
        self._runs: dict[str, str] = {}
        """Run ids by trial number, the parent's under ""."""
        self._begin()

    def _begin(self) -> None:
        self._reading = _Reading()
        self._offset = 0
        self._taken = 0
        """How many events from the offset on are in MLflow or in the unsent batch."""
        self._unsent: _Batch | None = None

    def catch_up(self) -> None:
        """Write what the ledger has beyond the last time."""
        if self._unsent is not None:
            if self._client is None:
                self._connect()
            self._deliver()
        events, end = read_events(self._ledger, self._offset)
        while self._taken < len(events):
            self._unsent = _Batch()
            for event in events[self._taken : self._taken + EVENTS_PER_CHUNK]:
                self._reading.take(event, self._unsent)
                self._taken += 1
            if self._client is None:
                self._connect()
            self._deliver()
        self._offset, self._taken = end, 0

    def abandon(self) -> None:
        """Show what is running as interrupted, as a `stop` event would have."""
        if self._reading.state.header:
            self._unsent = _Batch()
            self._reading.abandon(self._unsent)
            self._deliver()

    def _connect(self) -> None:
        """Find the sweep's runs, also those whose making was never answered. Doubled ones are deleted."""
        client = _client(self._uri)
        self._experiment = _experiment(client, self._uri)
        known = set(self._runs.values())
        runs = {}
        for run, copies in _runs_by_trial(client, self._experiment, self._reading.state.header["id"]).items():
            kept, *others = sorted(copies, key=lambda copy: (copy.info.run_id not in known, *_age(copy)))
            for other in others:
                client.delete_run(other.info.run_id)
            runs[run] = kept.info.run_id
        if not self._runs.items() <= runs.items():
            self._begin()  # a run was deleted meanwhile: what was in it has to be written again
        self._client, self._runs = client, runs
        self.answers += 1

    def _deliver(self) -> None:
        if self._unsent is None:
            return
        try:
            self._send(self._unsent)
        except BaseException:
            self._client = None  # MLflow may have done what it did not answer: look first, then write
            raise
        self._unsent = None

    def _send(self, batch: "_Batch") -> None:
        from mlflow.entities import Metric
        from mlflow.entities import Param
        from mlflow.entities import RunTag

        assert self._client is not None, "connected before sending"
        for run, opening in batch.opened.items():
            if run not in self._runs:
                tags = opening.tags | self._parent(run)
                created = self._client.create_run(self._experiment, _ms(opening.time), tags, opening.name)
                self._runs[run] = created.info.run_id
                self.answers += 1
        for run in batch.touched():
            opened = batch.opened.get(run)
            self._client.log_batch(
                self._runs[run],
                metrics=[Metric(name, value, at, step) for name, step, value, at in batch.points[run]],
                params=[Param(name, text) for name, text in opened.params.items()] if opened else [],
                tags=[
                    RunTag(name, text)
                    for name, text in (batch.tags[run] | (self._parent(run) if opened else {})).items()
                ],
            )
            self.answers += 1
        for run, (status, ended) in batch.status.items():
            if ended is None:
                self._client.update_run(self._runs[run], status)
            else:  # sets any status together with the time, in one request
                self._client.set_terminated(self._runs[run], status, _ms(ended))
            self.answers += 1

    def _parent(self, run: str) -> dict[str, str]:
        return {_PARENT: self._runs[""]} if run else {}


class _Reading:
    """The ledger in MLflow's terms: takes the events in order, and enters into a batch what each one brings."""

    def __init__(self) -> None:
        self.state = SweepState()
        """At the last event taken; trials that have ended are without their reports, so that it stays small."""
        self._now = 0.0
        self._best = -math.inf

    def take(self, event: Event, batch: "_Batch") -> None:
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

    def abandon(self, batch: "_Batch") -> None:
        """Enter what a `stop` event for an interruption, now, would have brought; nothing if there was one."""
        if not self.state.stop_reason:
            self._enter_work("interrupted", "interrupted", "KILLED", "KILLED", self._now, batch)

    def _enter_work(
        self, state: str, trial_status: str, parent: str, child: str, ended: float | None, batch: "_Batch"
    ) -> None:
        """Work on the sweep begins, goes on or ends: the parent's state, and that of the trials under way."""
        batch.tags[""]["state"] = state
        batch.status[""] = (parent, ended)
        for record in self.state.running():
            if record.key.arm == SEARCH:
                batch.tags[str(record.key.number)]["trial_status"] = trial_status
                batch.status[str(record.key.number)] = (child, ended)

    def _enter_end(self, event: Event, batch: "_Batch") -> None:
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
class _Opening:
    """What a run is made with."""

    name: str
    time: float
    params: dict[str, str]
    tags: dict[str, str]


class _Batch:
    """What some events of the ledger bring for each run ("" is the parent), to be sent in few requests."""

    def __init__(self) -> None:
        self.opened: dict[str, _Opening] = {}
        self.points: dict[str, list[tuple[str, int, float, int]]] = defaultdict(list)
        """Metric rows: name, step, value, milliseconds since 1970."""
        self.tags: dict[str, dict[str, str]] = defaultdict(dict)
        self.status: dict[str, tuple[str, float | None]] = {}
        """MLflow's word, and the end in Unix seconds."""

    def open(self, run: str, event: Event, params: Mapping[str, Any], tags: dict[str, str]) -> None:
        """A run begins."""
        name = _run_name(run) if run else tags["sweep"]
        self.opened[run] = _Opening(name, event.time, {n: str(v) for n, v in params.items()}, tags)
        self.tags[run] |= tags

    def metrics(self, run: str, event: Event, values: Mapping[str, float | str], *, step: int) -> None:
        """A run has metrics at a step."""
        points = [(n, step, float(v), _ms(event.time)) for n, v in values.items()]
        self.points[run] += [p for p in points if math.isfinite(p[2])]  # stores disagree on NaN; the ledger has it

    def touched(self) -> Iterable[str]:
        """The runs that have something new besides their status."""
        return [run for run in {**self.tags, **self.points} if self.tags[run] or self.points[run]]


_MLFLOW_STATUS = {
    TrialStatus.COMPLETED: "FINISHED",
    TrialStatus.PRUNED: "KILLED",
    TrialStatus.FAILED: "FAILED",
}
_MLFLOW_END = {"finished": "FINISHED", "time_budget": "FINISHED", "failed": "FAILED"}
_PARENT = "mlflow.parentRunId"
_LONGEST_TAG = 5000


def _differences(
    found: Any, run: str, should_be: _Batch, abandoned: _Batch, rows: "Counter[_Row]", parents: set[str]
) -> Iterator[str]:
    """What is wrong with a run, a line each."""
    opening, tags = should_be.opened[run], should_be.tags[run]
    status, ended = should_be.status.get(run, ("RUNNING", None))
    if run in abandoned.status and found.info.status == abandoned.status[run][0]:
        (status, ended), tags = abandoned.status[run], tags | abandoned.tags[run]
    if found.info.status != status:
        yield f"status is {found.info.status}, should be {status}"
    elif status != "RUNNING" and ended is not None and found.info.end_time != _ms(ended):
        yield f"end time is {found.info.end_time}, should be {_ms(ended)}"
    if found.info.start_time != _ms(opening.time):
        yield f"start time is {found.info.start_time}, should be {_ms(opening.time)}"
    for what, has, wants in (("param", found.data.params, opening.params), ("tag", found.data.tags, tags)):
        for name, text in wants.items():
            if name not in has:
                yield f"{what} {name} is missing"
            elif has[name] != text:
                yield f"{what} {name} is {has[name][:80]!r}, should be {text[:80]!r}"
    if run and found.data.tags.get(_PARENT) not in parents:
        yield "is not under the sweep's run"
    wanted = Counter(should_be.points[run])
    for what, lines in (("missing", wanted - rows), ("too many", rows - wanted)):
        for name in sorted({name for name, *_ in lines}):
            steps = sorted(step for n, step, *_ in lines.elements() if n == name)
            yield f"metric {name}: {len(steps)} rows {what}, the first at step {steps[0]}"


_Row = tuple[str, int, float, int]


def _rows(client: _Client, run: Any, names: set[str]) -> "Counter[_Row]":
    """The metric rows of a run in MLflow, with one request for each name."""
    names = names | set(run.data.metrics)
    history = [point for name in sorted(names) for point in client.get_metric_history(run.info.run_id, name)]
    return Counter((point.key, point.step, point.value, point.timestamp) for point in history)


def _client(uri: str) -> _Client:
    from mlflow import MlflowClient  # costs seconds: only where MLflow is used

    for handler in logging.getLogger("mlflow").handlers:
        handler.addFilter(_mask_record)
    if uri.startswith(("postgresql", "mysql", "mssql")):
        import sqlalchemy

        # MLflow tries a database that is down for minutes before it says so.
        sqlalchemy.create_engine(uri, poolclass=sqlalchemy.NullPool).connect().close()
    client: _Client = MlflowClient(tracking_uri=uri)
    return client


def _mask_record(record: logging.LogRecord) -> bool:
    """Mask what MLflow logs by itself, which includes the errors of its database."""
    trace = "\n" + "".join(traceback.format_exception(*record.exc_info)) if record.exc_info else ""
    record.msg, record.args, record.exc_info = masked(record.getMessage() + trace), (), None
    return True


def _experiment_name() -> str:
    return os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT


def _experiment(client: _Client, uri: str) -> str:
    """The id of the experiment, which is created if need be."""
    experiment = client.get_experiment_by_name(_experiment_name())
    if experiment:
        return str(experiment.experiment_id)
    location = None
    if uri.startswith("sqlite:///"):  # by default artifacts would go to the working directory
        location = (Path(uri.removeprefix("sqlite:///")).resolve().parent / "mlartifacts").as_uri()
    return client.create_experiment(_experiment_name(), artifact_location=location)


def _runs_by_trial(client: _Client, experiment: str, sweep_id: str) -> dict[str, list[Any]]:
    """The sweep's runs by trial number, the parent's under ""; more than one where a run is doubled."""
    runs: dict[str, list[Any]] = defaultdict(list)
    token = None
    while True:
        page = client.search_runs([experiment], f"tags.sweep_id = '{sweep_id}'", max_results=1000, page_token=token)
        for run in page:
            runs[run.data.tags.get("trial_number", "")].append(run)
        token = page.token
        if not token:
            return dict(runs)


def _age(run: Any) -> tuple[int, int, str]:
    """Sorts copies of a run: first the one that was written to. Copies are made with the same time."""
    return (-len(run.data.metrics) - len(run.data.params), run.info.start_time, run.info.run_id)


def _run_name(run: str) -> str:
    return f"trial {int(run):04d}"


def _sweep_params(header: Mapping[str, Any]) -> dict[str, Any]:
    names = ("dataset", "teacher", "student", "method", "trials", "epochs", "seed", "digest", "git_commit")
    return {name: header[name] for name in names if header.get(name) is not None}


def _ms(seconds: float) -> int:
    return round(seconds * 1000)
