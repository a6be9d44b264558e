"""Who may watch a sweep: the `Callback` class, and what tells all callbacks of a run."""

import contextlib
import logging
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING
from typing import Any

from tune_topkd.config import SweepConfig
from tune_topkd.ledger import End
from tune_topkd.ledger import Event
from tune_topkd.ledger import Report
from tune_topkd.ledger import SweepState
from tune_topkd.ledger import TrialRecord

if TYPE_CHECKING:
    from tune_topkd.sweep.result import Result

_log = logging.getLogger(__name__)


class Kind(StrEnum):
    """What a message is to its reader."""

    INFO = "info"
    """What has been done."""
    NOTE = "note"
    """What should be known, and need not be acted on at once."""
    ERROR = "error"
    """The process ends."""


class Callback:
    """Watches a sweep: a subclass overrides the methods that it wants to hear of, and is handed to `Sweep.run`.

    A trial may be one of the search's, of a baseline (`trial.key.arm`), or of a finalist on a fresh seed (`trial.of_trial`).

    **Threads.** Methods are called on the sweep's own thread, which waits for them: they should return at once. A message
    of the kind `error` may come on another.
    **Failures.** A callback that raises is named in the log and not called again in this run; the sweep goes on. What it
    missed is in the ledger.
    """

    def on_message(self, text: str, kind: Kind) -> None:
        """There is something to tell a person."""

    def on_phase(self, text: str) -> None:
        """The sweep prepares something that takes a while: what it does just now; empty once that is done."""

    def on_trials_begin(self, config: SweepConfig, folder: Path, state: SweepState) -> None:
        """Trials are about to run.

        Args:
            config: the sweep's, complete.
            folder: the sweep's.
            state: what its ledger tells so far; must not be changed.
        """

    def on_event(self, event: Event) -> None:
        """A line is in the ledger, on the disk: the start of a trial, a decision, a retry."""

    def on_report(self, trial: TrialRecord) -> None:
        """A trial has reported an epoch: `trial.epoch`, its metrics in `trial.reports[trial.epoch]`."""

    def on_trial_end(self, trial: TrialRecord) -> None:
        """A trial was completed, pruned or has failed, as its `status` says."""

    def on_trials_end(self) -> None:
        """No trial runs any more, whatever ended them."""

    def on_end(self, result: "Result") -> None:
        """The run is over, and the answer, if there is one, written."""


class Watchers:
    """The callbacks of a run; a `Tracker` of the ledger's events. One that raises is dropped."""

    def __init__(self, callbacks: Sequence[Callback] = ()) -> None:
        self._callbacks = list(callbacks)
        self._state: SweepState | None = None

    def info(self, text: str) -> None:
        """Say what has been done."""
        self._tell("on_message", text, Kind.INFO)

    def note(self, text: str) -> None:
        """Say what should be known."""
        self._tell("on_message", text, Kind.NOTE)

    def error(self, text: str) -> None:
        """Say why the process ends."""
        self._tell("on_message", text, Kind.ERROR)

    @contextlib.contextmanager
    def phase(self, text: str) -> Iterator[Callable[[str], None]]:
        """Say what is being done as long as it lasts; gives what changes the text."""

        def show(words: str) -> None:
            self._tell("on_phase", words)

        show(text)
        try:
            yield show
        finally:
            show("")

    @contextlib.contextmanager
    def trials(self, config: SweepConfig, folder: Path, state: SweepState) -> Iterator[None]:
        """While trials run."""
        self._state, begun = state, list(self._callbacks)
        try:
            self._tell("on_trials_begin", config, folder, state)
            yield
        finally:
            self._tell("on_trials_end", among=begun)

    def notify(self, event: Event) -> None:
        """An event has been written."""
        self._tell("on_event", event)
        assert self._state is not None, "trials run"
        match event.content:
            case Report(key=key):
                self._tell("on_report", self._state.trials[key])
            case End(key=key):
                self._tell("on_trial_end", self._state.trials[key])

    def close(self) -> None:
        """Nothing is left to do: `trials` and `ended` tell of the end."""

    def ended(self, result: "Result") -> None:
        """The run is over."""
        self._tell("on_end", result)

    def _tell(self, method: str, *arguments: Any, among: Sequence[Callback] | None = None) -> None:
        """Call a method of each."""
        for callback in list(self._callbacks if among is None else among):
            try:
                getattr(callback, method)(*arguments)
            except Exception as error:  # noqa: BLE001 (observing may fail, work goes on)
                name = type(callback).__name__
                _log.error("%s.%s raised, and is not called again in this run: %r", name, method, error, exc_info=error)
                if callback in self._callbacks:
                    self._callbacks.remove(callback)


SILENT = Watchers()
"""Nobody watches."""
