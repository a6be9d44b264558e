"""One trial, where Ray put it: calls the train function, hands its reports to the driver, keeps its checkpoints.

Checkpoints are a trial's own folder: `epoch-0003/` with what `save` wrote and `report.json` (that epoch's metrics and the
files' SHA-256). A folder appears under its name only when it is whole; the two newest are kept; one that is not as it was
written is passed over for the other.
"""

import hashlib
import json
import os
import shutil
import traceback
from collections.abc import Callable
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from typing import Protocol

from tune_topkd.config import TrialConfig

MESSAGE = "message"
"""The one key of what a worker reports to Ray: our message as JSON."""

GENERATIONS = 2
_REPORT_FILE = "report.json"


class Reporter(Protocol):
    """What a train function calls after each epoch; epochs are absolute and start at 1."""

    def __call__(self, epoch: int, metrics: Mapping[str, float], save: Callable[[Path], None], /) -> None:
        """Take one epoch's metrics; `save(folder)` writes a checkpoint if it is called."""


class TrainFunction(Protocol):
    """A training that does not know who calls it, and goes on from the checkpoint in `resume_from`."""

    def __call__(self, config: TrialConfig, report: Reporter, resume_from: Path | None, /) -> Any:
        """Train to the last epoch of the recipe."""


@dataclass(frozen=True)
class Worker:
    """What runs in a Ray worker for one trial; picklable if `train` is."""

    train: TrainFunction

    def __call__(self, trial: Mapping[str, Any]) -> None:
        """Run the trial that `tuning` described.

        An exception of the train function is reported as the trial's failure: it would come again, so it is no crash to
        be retried. A worker that dies is Ray's to see.
        """
        from ray import tune  # only a worker needs it

        def send(message: Mapping[str, Any]) -> None:
            tune.report({MESSAGE: json.dumps(message)})

        try:
            run_trial(self.train, TrialConfig.model_validate(trial["config"]), Path(trial["folder"]), send)
        except Exception as error:  # noqa: BLE001 (whatever the train function raises is the trial's end)
            send(_failure(error))


def run_trial(
    train: TrainFunction, config: TrialConfig, folder: Path, send: Callable[[Mapping[str, Any]], None]
) -> None:
    """Train, from the newest whole checkpoint in `folder` if there is one; `send` blocks until the driver decided."""
    newest = newest_checkpoint(folder)
    if newest is not None:
        epoch, metrics = _read_report(newest)
        send({"kind": "report", "epoch": epoch, "metrics": metrics})  # a kill may have come before the driver had it

    def report(epoch: int, metrics: Mapping[str, float], save: Callable[[Path], None]) -> None:
        write_checkpoint(folder, epoch, metrics, save)
        send({"kind": "report", "epoch": epoch, "metrics": _jsonable(metrics)})

    train(config, report, newest)


def write_checkpoint(folder: Path, epoch: int, metrics: Mapping[str, float], save: Callable[[Path], None]) -> None:
    """Write the checkpoint of one epoch, whole or not at all, and drop the ones before the last two."""
    partial = folder / f".epoch-{epoch:04d}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save(partial)
    files = {p.name: _sha256(p) for p in sorted(partial.iterdir())}
    report = {"epoch": epoch, "metrics": _jsonable(metrics), "files": files}
    with open(partial / _REPORT_FILE, "w") as stream:
        json.dump(report, stream)
        stream.flush()
        os.fsync(stream.fileno())
    final = folder / f"epoch-{epoch:04d}"
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    for old in _checkpoints(folder)[GENERATIONS:]:
        shutil.rmtree(old, ignore_errors=True)


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that is as it was written, if any."""
    return next((path for path in _checkpoints(folder) if _is_whole(path)), None)


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("epoch-[0-9]*"), key=lambda p: int(p.name.partition("-")[2]), reverse=True)


def _is_whole(path: Path) -> bool:
    try:
        report = json.loads((path / _REPORT_FILE).read_bytes())
        return all(_sha256(path / name) == digest for name, digest in report["files"].items())
    except (OSError, ValueError, KeyError):
        return False


def _read_report(path: Path) -> tuple[int, dict[str, Any]]:
    report = json.loads((path / _REPORT_FILE).read_bytes())
    return report["epoch"], report["metrics"]


def _sha256(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _jsonable(metrics: Mapping[str, float]) -> dict[str, Any]:
    return {name: float(value) for name, value in metrics.items()}


def _failure(error: Exception) -> dict[str, Any]:
    out_of_memory = type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError)
    text = " ".join(str(error).split())
    return {
        "kind": "failed",
        "reason": "oom" if out_of_memory else "error",
        "error": f"{type(error).__name__}: {text}"[:500],
        "traceback": "".join(traceback.format_exception(error)),
    }
