"""A sweep for another program: a JSON object in a line of stdout for each thing that happens."""

import json
import math
import time
from pathlib import Path
from typing import Any

from tune_topkd.cli.standing import entry_of
from tune_topkd.config import SweepConfig
from tune_topkd.export import TUNED_FILE
from tune_topkd.ledger import SEARCH
from tune_topkd.ledger import TEST
from tune_topkd.ledger import Event
from tune_topkd.ledger import Retry
from tune_topkd.ledger import SweepState
from tune_topkd.ledger import TrialRecord
from tune_topkd.ledger import finalists_done
from tune_topkd.ledger import measured_done
from tune_topkd.ledger import winner_of
from tune_topkd.sweep import Callback
from tune_topkd.sweep import Kind
from tune_topkd.sweep import Result
from tune_topkd.sweep.api import status_of
from tune_topkd.sweep.workspace import stopped_as
from tune_topkd.terminal import Lines


class JsonCallback(Callback):
    """Writes JSON lines; each has `event`, `sweep` and `time` (Unix seconds).

    - `phase`: something that takes a while begins: `text`.
    - `message`: there is something to tell: `kind` (`info`, `note` or `error`) and `text`.
    - `begin`: trials are about to run: `folder`, `trials`, `ended`, `epochs`, `rungs`.
    - `rung`: a trial of the search has come to a rung: `trial`, `epoch`, `value`, `decision`.
    - `retry`: a trial's worker was lost: `trial`, `reason`, `error`.
    - `trial`: a training has ended: `trial`, `arm`, `status`, `reason`, `error`, `epoch`, `metric`, `value` (percent),
      `params`; `repeats` and `seed` of one that repeats a trial; `best`, the answer so far.
    - `finalists`, `test`: a training on a fresh seed, or for the test set, has ended: `done`, `of`.
    - `answer`: the run is over: what `status --json` gives, `reason`, `tuned` (a path), `mlflow_trouble`.

    A value that is not finite is null.
    """

    def __init__(self, sweep: str, lines: Lines) -> None:
        self._sweep = sweep
        self._lines = lines
        self._config: SweepConfig | None = None
        self._state = SweepState()

    def on_message(self, text: str, kind: Kind) -> None:
        """`message`."""
        self._write("message", kind=kind.value, text=text)

    def on_phase(self, text: str) -> None:
        """`phase`; that it is over goes unsaid."""
        if text:
            self._write("phase", text=text)

    def on_trials_begin(self, config: SweepConfig, folder: Path, state: SweepState) -> None:
        """`begin`."""
        self._config, self._state = config, state
        ended = sum(record.status.is_end for record in state.trials.values())
        about = {"folder": str(folder), "trials": state.target, "ended": ended, "epochs": config.recipe.epochs}
        self._write("begin", **about, rungs=self._rungs())

    def on_event(self, event: Event) -> None:
        """`retry`."""
        if isinstance(event.content, Retry):
            retry = event.content
            self._write("retry", trial=str(retry.key), reason=retry.reason, error=retry.error)

    def on_report(self, trial: TrialRecord) -> None:
        """`rung`."""
        if self._config is not None and trial.key.arm == SEARCH and trial.epoch in self._rungs():
            value, decision = trial.reports[trial.epoch].get(self._config.rung_metric), trial.decision
            known = value if value is not None and math.isfinite(value) else None
            self._write("rung", trial=str(trial.key), epoch=trial.epoch, value=known, decision=decision)

    def on_trial_end(self, trial: TrialRecord) -> None:
        """`trial`, and how far the finalists are."""
        winner = winner_of(self._state)
        about: dict[str, Any] = {
            "trial": str(trial.key),
            "arm": trial.origin.arm,
            "status": trial.status.value,
            "reason": trial.reason,
            "error": trial.error,
            "epoch": trial.epoch,
            "metric": trial.key.metric,
            "value": trial.value,
            "params": trial.params,
            "repeats": None if trial.of_trial is None else str(trial.of_trial),
            "seed": trial.seed,
        }
        best = None if winner is None else {"trial": str(winner.record.key), "top1": winner.value}
        self._write("trial", **about, best=best)
        if trial.of_trial is not None:
            for name, done in (("finalists", finalists_done(self._state)), ("test", measured_done(self._state))):
                if done is not None and (name == "test") == (trial.key.arm == TEST):
                    self._write(name, done=done[0], of=done[1])

    def on_end(self, result: Result) -> None:
        """`answer`."""
        entry = entry_of(status_of(result.name, result.folder, result.state)) | {"state": stopped_as(result.state)}
        tuned = result.folder / TUNED_FILE
        about = {"reason": result.reason, "tuned": str(tuned) if result.best is not None else None}
        self._write("answer", **entry, **about, mlflow_trouble=result.mlflow_trouble)

    def _rungs(self) -> list[int]:
        if self._config is None or self._config.sweep.asha is None:
            return []
        return list(self._config.sweep.asha.rungs(self._config.recipe.epochs))

    def _write(self, event: str, **about: Any) -> None:
        content = {"event": event, "sweep": self._sweep, "time": round(time.time(), 3), **about}
        self._lines.put(json.dumps(content, allow_nan=False))
