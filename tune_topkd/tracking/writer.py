"""Writing to MLflow: beside a sweep on a thread that follows its ledger, or once, afterwards."""

import logging
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tune_topkd.ledger import Event
from tune_topkd.ledger import read_events
from tune_topkd.tracking.documents import Author
from tune_topkd.tracking.documents import SkippedError
from tune_topkd.tracking.documents import line_in
from tune_topkd.tracking.documents import send
from tune_topkd.tracking.masking import masked
from tune_topkd.tracking.masking import reason_of
from tune_topkd.tracking.projection import NOTE_TAG
from tune_topkd.tracking.projection import PARENT_TAG
from tune_topkd.tracking.projection import Batch
from tune_topkd.tracking.projection import Images
from tune_topkd.tracking.projection import Projection
from tune_topkd.tracking.projection import Row
from tune_topkd.tracking.projection import milliseconds
from tune_topkd.tracking.projection import run_name
from tune_topkd.tracking.projection import run_of
from tune_topkd.tracking.sending import KnownRun
from tune_topkd.tracking.sending import dataset_input
from tune_topkd.tracking.sending import entities
from tune_topkd.tracking.sending import is_refusal
from tune_topkd.tracking.sending import log_entities
from tune_topkd.tracking.sending import rows_lacking
from tune_topkd.tracking.store import Client
from tune_topkd.tracking.store import client_of
from tune_topkd.tracking.store import experiment_id
from tune_topkd.tracking.store import masked_errors
from tune_topkd.tracking.store import one_transaction
from tune_topkd.tracking.store import runs_by_trial

EVENTS_PER_CHUNK = 2000  # what is held while MLflow is down; some 200 trials of 9 epochs
RUNS_PER_TRANSACTION = 25  # others wait for a database's lock for about a second
SECONDS_BETWEEN_LOOKS = 1.0
LONGEST_RETRY_SECONDS = 30.0
LONGEST_SILENCE_SECONDS = 15.0  # at the end of a sweep; longer than one request may take

_log = logging.getLogger(__name__)


class MlflowTracker:
    """Follows a sweep's ledger into MLflow, on a thread of its own; a `tune_topkd.ledger.Tracker`."""

    def __init__(self, ledger: Path, uri: str, author: Author | None = None) -> None:
        """Start following.

        Args:
            ledger: the sweep's ledger file.
            uri: MLflow's tracking URI; credentials in it are never shown.
            author: makes what people read of the sweep; without one its run has no artifacts.
        """
        self.uri = uri
        self.trouble = ""
        """What MLflow last failed with, if it did; empty once it answers again."""
        self._writer = _Writer(ledger, uri, author)
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
        answers = self._writer.answers
        while self._thread.is_alive() and time.monotonic() - began < patience:
            self._thread.join(0.05)
            if answers != self._writer.answers or self._writer.is_at_documents:
                answers, heard = self._writer.answers, time.monotonic()
            # Before the first answer the time may go into imports and into making tables, not into waiting.
            if (answers or self.trouble) and time.monotonic() - heard > LONGEST_SILENCE_SECONDS:
                break
        if self._thread.is_alive() and not self.trouble:
            self.trouble = f"not done after {time.monotonic() - began:.0f} s"

    @property
    def is_caught_up(self) -> bool:
        """Whether MLflow has all that the ledger tells."""
        return not self._thread.is_alive() and not self.trouble

    @property
    def skipped(self) -> str:
        """Why the sweep's run has not got its newest artifacts, if it has all else; empty if it has them."""
        return self._writer.skipped

    def _follow(self) -> None:
        wait = SECONDS_BETWEEN_LOOKS
        while True:
            last_look = self._closing.is_set()
            try:
                self._writer.catch_up()
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


def catch_up(ledger: Path, uri: str, *, abandoned: bool = False, author: Author | None = None) -> str:
    """Bring MLflow to where the ledger is, once; any number of times gives the same runs.

    Args:
        ledger: the sweep's ledger file.
        uri: MLflow's tracking URI.
        abandoned: nobody drives the sweep. If its driver was killed, so that the ledger does not say so, what is running
            is shown as interrupted since the ledger's last event. When the sweep goes on, this is as if never said.
        author: makes what people read of the sweep, which is brought to the ledger's last line too.

    Returns:
        Why the sweep's run has not got its newest artifacts, if it has all else; empty if it has them.

    Raises:
        LedgerError: the ledger is damaged.
        TrackingError: MLflow fails; what it has taken until then is kept.
    """
    with masked_errors(uri):
        writer = _Writer(ledger, uri, author)
        writer.catch_up(to_the_end=True)
        if abandoned:
            writer.abandon()
    return writer.skipped


class _Writer:
    """Where MLflow is in the ledger. The place moves on only when MLflow has taken what lies before it.

    **Memory.** While MLflow is down one chunk of events waits, as the batch it made, and the ledger is not read on. While
    it catches up, the events that lie behind are in memory once; what they bring is sent chunk by chunk. Tags and states
    that later chunks may change are held until the last one, so that they are sent once.
    """

    def __init__(self, ledger: Path, uri: str, author: Author | None = None) -> None:
        self.answers = 0
        """How many requests MLflow has answered; another thread may look at it."""
        self.is_at_documents = False
        """Whether documents are being made and sent, which takes a limited time; likewise."""
        self.skipped = ""
        """Why the newest documents are not in MLflow."""
        self._author = author
        self._takes_datasets = True
        self._ledger = ledger
        self._uri = uri
        self._client: Client | None = None
        self._experiment = ""
        self._runs: dict[str, KnownRun] = {}
        """By trial, as `run_of` names them, the parent under ""."""
        self._said: set[str] = set()
        self._begin()

    def _begin(self) -> None:
        self._projection = Projection()
        self._offset = 0
        self._taken = 0
        """How many events from the offset on are in MLflow or in the unsent batch."""
        self._unsent: Batch | None = None
        self._held = Batch()
        self._documented = -1
        """The newest line of the ledger whose documents were sent, or given up."""

    def catch_up(self, *, to_the_end: bool = False) -> None:
        """Write what the ledger has beyond the last time, with the documents that are due, or those of its last line."""
        if self._unsent is not None:
            if self._client is None:
                self._connect()
            self._deliver()
        events, end = read_events(self._ledger, self._offset)
        while self._taken < len(events):
            self._take(events[self._taken : self._taken + EVENTS_PER_CHUNK], len(events))
            if self._client is None and self._connect():
                return self.catch_up(to_the_end=to_the_end)
            self._deliver()
        self._offset, self._taken = end, 0
        for known in self._runs.values():
            known.found = None
        if self._projection.state.has_begun:
            if self._client is None and self._connect():
                return self.catch_up(to_the_end=to_the_end)
            line = self._projection.state.last_seq if to_the_end else self._projection.milestone
            self._document(line, are_all=to_the_end or self._projection.is_over)
        return None

    def _document(self, line: int | None, *, are_all: bool) -> None:
        """Send the documents that are of a line of the ledger, once; the runs are up to date."""
        if self._author is None or line is None or line <= self._documented:
            return
        assert self._client is not None, "it is connected"
        known = self._runs[""]
        self.is_at_documents = True
        try:
            if line_in(known.tags) < line:
                known.tags |= send(self._client, self._uri, known.id, self._author, line, are_all=are_all)
            self.skipped = ""
        except SkippedError as error:
            self.skipped = masked(str(error), self._uri)
            self._say(f"the sweep's artifacts are not in MLflow: {error}")
        except BaseException:
            self._client = None
            raise
        finally:
            self.is_at_documents = False
        self._documented = line

    def _take(self, chunk: Sequence[Event], known: int) -> None:
        """Make the unsent batch of some of the `known` events."""
        self._unsent = self._held
        for event in chunk:
            self._projection.take(event, self._unsent)
            self._taken += 1
        under_way = [run_of(record.key) for record in self._projection.state.running()]
        self._held = self._unsent.put_off(["", *under_way]) if self._taken < known else Batch()

    def abandon(self) -> None:
        """Show what is running as interrupted, as a `stop` event would have."""
        if self._projection.state.has_begun:
            self._unsent = Batch()
            self._projection.abandon(self._unsent)
            self._deliver()

    def _connect(self) -> bool:
        """Find the sweep's runs, also those whose making was never answered. Doubled ones are deleted.

        Returns:
            Whether a run was deleted meanwhile, so that the writer is back at the ledger's beginning.
        """
        client = client_of(self._uri)
        self._experiment = experiment_id(client, self._uri)
        before = {run: known.id for run, known in self._runs.items()}
        runs = {}
        for run, copies in runs_by_trial(client, self._experiment, self._projection.state.header.id).items():
            kept, *others = sorted(copies, key=lambda copy: (copy.info.run_id not in before.values(), *_age(copy)))
            for other in others:
                client.delete_run(other.info.run_id)
            runs[run] = KnownRun.of(kept)
        is_back = not before.items() <= {run: known.id for run, known in runs.items()}.items()
        if is_back:
            self._begin()
        self._client, self._runs = client, runs
        self.answers += 1
        return is_back

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
        assert self._client is not None, "connected before sending"
        for (run, _), note in batch.notes.items():
            self._say(f"{run_name(run) if run else 'the sweep'}: {note}", note)
        lacking = rows_lacking(self._client, batch, self._runs)
        touched = list(batch.touched())
        for start in range(0, len(touched), RUNS_PER_TRANSACTION):
            with one_transaction(self._client):
                for run in touched[start : start + RUNS_PER_TRANSACTION]:
                    if run not in self._runs:
                        self._runs[run] = self._created(batch, run)
                    self._log(run, batch, lacking.get(run, []))
                    if run in batch.status:
                        self._set_status(self._runs[run], *batch.status[run])

    def _created(self, batch: "Batch", run: str) -> KnownRun:
        assert self._client is not None, "connected before sending"
        opening = batch.opened[run]
        made_with = (self._experiment, milliseconds(opening.time))
        least = opening.tags | self._parent(run)
        tags = least | batch.tags[run] | ({NOTE_TAG: opening.note} if opening.note else {})
        try:
            created = self._client.create_run(*made_with, tags, opening.name)
        except Exception as error:
            if not is_refusal(error):
                raise
            tags = least  # what is refused of the others is found out tag by tag
            created = self._client.create_run(*made_with, tags, opening.name)
        self.answers += 1
        return KnownRun(created.info.run_id, tags)

    def _log(self, run: str, batch: "Batch", rows: Sequence[Row]) -> None:
        assert self._client is not None, "connected before sending"
        known, opening = self._runs[run], batch.opened.get(run)
        tags = (self._parent(run) if opening else {}) | batch.tags.get(run, {})
        tags = {name: text for name, text in tags.items() if known.tags.get(name) != text}
        wanted = opening.params if opening else {}
        params = {name: text for name, text in wanted.items() if name not in known.params}
        for name in wanted.keys() & known.params.keys():
            if known.params[name] != wanted[name]:
                self._say(
                    f"{run_name(run) if run else 'the sweep'}: parameter {name} is another one in MLflow, for good"
                )
        if sent := entities(rows, params, tags):
            log_entities(self._client, known.id, sent, self._say)
            known.params |= params
            known.tags |= tags
            self.answers += 1
        self._log_dataset(run, batch.inputs.get(run))

    def _log_dataset(self, run: str, images: Images | None) -> None:
        """A run's dataset; a server that is too old for datasets is told of once."""
        known = self._runs[run]
        if images is None or not self._takes_datasets or (images.name, images.digest) in known.datasets:
            return
        assert self._client is not None, "connected before sending"
        try:
            self._client.log_inputs(known.id, datasets=[dataset_input(images)])
        except Exception as error:
            self._takes_datasets = getattr(error, "error_code", None) != "ENDPOINT_NOT_FOUND"
            if self._takes_datasets and not is_refusal(error):
                raise
            self._say(f"MLflow does not take the dataset {images.name!r}: {reason_of(error, self._uri)}", "dataset")
        known.datasets |= {(images.name, images.digest)}
        self.answers += 1

    def _set_status(self, known: KnownRun, status: str, ended: float | None) -> None:
        assert self._client is not None, "connected before sending"
        end = known.ended if ended is None else milliseconds(ended)
        if (known.status, known.ended) == (status, end):
            return
        if ended is None:
            self._client.update_run(known.id, status)
        else:  # sets any status together with the time, in one request
            self._client.set_terminated(known.id, status, end)
        known.status, known.ended = status, end
        self.answers += 1

    def _say(self, text: str, once: str = "") -> None:
        """Say what is not in MLflow as it is in the ledger, once for all runs that it is true of."""
        if (once or text) not in self._said:
            self._said.add(once or text)
            _log.warning("%s", masked(text, self._uri))

    def _parent(self, run: str) -> dict[str, str]:
        return {PARENT_TAG: self._runs[""].id} if run else {}


def _age(run: Any) -> tuple[int, int, str]:
    """Sorts copies of a run: first the one that was written to. Copies are made with the same time."""
    return (-len(run.data.metrics) - len(run.data.params), run.info.start_time, run.info.run_id)
