"""Writing to MLflow: beside a sweep on a thread that follows its ledger, or once, afterwards."""

import logging
import math
import threading
import time
import traceback
from collections.abc import Mapping
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tune_topkd.tracking.masking import masked
from tune_topkd.tracking.masking import reason_of
from tune_topkd.tracking.reading import PARENT_TAG
from tune_topkd.tracking.reading import Batch
from tune_topkd.tracking.reading import Reading
from tune_topkd.tracking.reading import milliseconds
from tune_topkd.tracking.store import Client
from tune_topkd.tracking.store import client_of
from tune_topkd.tracking.store import experiment_id
from tune_topkd.tracking.store import masked_errors
from tune_topkd.tracking.store import runs_by_trial
from tune_topkd.trials import Event
from tune_topkd.trials import read_events

EVENTS_PER_CHUNK = 2000  # what is held while MLflow is down; some 200 trials of 9 epochs
SECONDS_BETWEEN_LOOKS = 1.0
LONGEST_RETRY_SECONDS = 30.0
LONGEST_SILENCE_SECONDS = 15.0  # at the end of a sweep; longer than one request may take

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
                self.trouble = reason_of(error, self.uri)
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
    with masked_errors(uri):
        follower = _Follower(ledger, uri)
        follower.catch_up()
        if abandoned:
            follower.abandon()


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

        client = client_of(uri)
        run = client.create_run(experiment_id(client, uri), milliseconds(started), dict(tags), name).info.run_id
        points = [
            Metric(n, v, milliseconds(at), epoch)
            for epoch, at, metrics in history
            for n, v in metrics.items()
            if math.isfinite(v)
        ]
        client.log_batch(run, metrics=points, params=[Param(n, str(v)) for n, v in params.items()])
        client.set_terminated(run, status)
    except Exception as error:  # noqa: BLE001 (observing may fail; the caller says so)
        return reason_of(error, uri)
    return ""


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
        self._client: Client | None = None
        self._experiment = ""
        self._runs: dict[str, str] = {}
        """Run ids by trial number, the parent's under ""."""
        self._begin()

    def _begin(self) -> None:
        self._reading = Reading()
        self._offset = 0
        self._taken = 0
        """How many events from the offset on are in MLflow or in the unsent batch."""
        self._unsent: Batch | None = None

    def catch_up(self) -> None:
        """Write what the ledger has beyond the last time."""
        if self._unsent is not None:
            if self._client is None:
                self._connect()
            self._deliver()
        events, end = read_events(self._ledger, self._offset)
        while self._taken < len(events):
            self._unsent = Batch()
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
            self._unsent = Batch()
            self._reading.abandon(self._unsent)
            self._deliver()

    def _connect(self) -> None:
        """Find the sweep's runs, also those whose making was never answered. Doubled ones are deleted."""
        client = client_of(self._uri)
        self._experiment = experiment_id(client, self._uri)
        known = set(self._runs.values())
        runs = {}
        for run, copies in runs_by_trial(client, self._experiment, self._reading.state.header["id"]).items():
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

    def _send(self, batch: "Batch") -> None:
        from mlflow.entities import Metric
        from mlflow.entities import Param
        from mlflow.entities import RunTag

        assert self._client is not None, "connected before sending"
        for run, opening in batch.opened.items():
            if run not in self._runs:
                tags = opening.tags | self._parent(run)
                created = self._client.create_run(self._experiment, milliseconds(opening.time), tags, opening.name)
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
                self._client.set_terminated(self._runs[run], status, milliseconds(ended))
            self.answers += 1

    def _parent(self, run: str) -> dict[str, str]:
        return {PARENT_TAG: self._runs[""]} if run else {}


def _age(run: Any) -> tuple[int, int, str]:
    """Sorts copies of a run: first the one that was written to. Copies are made with the same time."""
    return (-len(run.data.metrics) - len(run.data.params), run.info.start_time, run.info.run_id)
