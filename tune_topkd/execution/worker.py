"""One trial, where Ray put it: calls the train function, hands its reports to the driver, keeps its checkpoints.

A trial's folder has one worker at a time. A killed driver or a lost node can leave one at work; the next waits for its end,
and ends it if it can.
"""

import contextlib
import faulthandler
import json
import os
import signal
import socket
import time
import traceback
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from typing import Protocol

from tune_topkd.config import TrialConfig
from tune_topkd.config import placements
from tune_topkd.config import value_at
from tune_topkd.errors import ProcessLostError
from tune_topkd.errors import TuneTopKDError
from tune_topkd.execution.checkpoints import StorageError
from tune_topkd.execution.checkpoints import clear_up
from tune_topkd.execution.checkpoints import jsonable
from tune_topkd.execution.checkpoints import newest_checkpoint
from tune_topkd.execution.checkpoints import read_report
from tune_topkd.execution.checkpoints import write_checkpoint
from tune_topkd.execution.remote import Attempt
from tune_topkd.execution.remote import OutdatedAttemptError
from tune_topkd.execution.remote import RemoteSweep
from tune_topkd.ledger import LEDGER_FILE
from tune_topkd.ledger import LedgerError
from tune_topkd.ledger import read_header
from tune_topkd.storage import FileError
from tune_topkd.storage import Lock
from tune_topkd.storage import StoreError
from tune_topkd.storage import disk_trouble
from tune_topkd.storage import file_hash
from tune_topkd.storage import lock

MESSAGE = "message"
"""The one key of what a worker reports to Ray: our message as JSON."""

HANG_FILE = "hang.txt"
"""Where the stacks of a trial that hangs are written, by itself, as it ends."""
LONGEST_WAIT_FOR_ANOTHER_WORKER = 90.0
"""Seconds: Ray ends a worker whose node was cut off after about a minute."""
PATIENCE_WITH_ANOTHER_WORKER = 15.0
"""Seconds after which a worker on the same machine that holds the folder is killed: Ray may have forgotten it."""

_LOCK_FILE = ".worker"
_SHARED = "--runs-dir must be on storage that all nodes share"


class Reporter(Protocol):
    """What a train function calls after each epoch; epochs are absolute and start at 1."""

    def __call__(self, epoch: int, metrics: Mapping[str, float], save: Callable[[Path], None], /) -> None:
        """Take one epoch's metrics; `save(folder)` writes a checkpoint if it is called."""


class TrainFunction(Protocol):
    """A training that does not know who calls it, and goes on from the checkpoint in `resume_from`."""

    def __call__(self, config: TrialConfig, report: Reporter, resume_from: Path | None, /) -> Any:
        """Train to the last epoch of the recipe."""


class ChangedFileError(TuneTopKDError):
    """A file that the sweep's results depend on is not what it was when the sweep began."""


class NotTheFolderError(StorageError):
    """The sweep's folder is not here: this node does not see the storage that the others share."""


class FolderBusyError(RuntimeError):
    """Another worker is still at work in the trial's folder."""


@dataclass(frozen=True)
class Worker:
    """What runs in a Ray worker for one trial; picklable if `train` is."""

    train: TrainFunction

    def __call__(self, trial: Mapping[str, Any]) -> None:
        """Run the trial that the driver described.

        An exception of the train function is reported as the trial's failure: it would come again, so it is no crash to
        be retried. A worker that dies is Ray's to see.
        """
        import ray
        from ray import tune  # only a worker needs it

        place = {"pid": os.getpid(), "node": ray.get_runtime_context().get_node_id()}

        def send(message: Mapping[str, Any]) -> None:
            tune.report({MESSAGE: json.dumps({**message, **place})})

        folder, described, attempt = Path(trial["folder"]), trial["config"], None
        remote = RemoteSweep(**trial["remote"]) if trial.get("remote") else None
        try:
            if trouble := sweep_trouble(folder.parents[1], remote, trial["sweep_id"]):
                raise NotTheFolderError(trouble)
            hashes = trial["hashes"]
            if remote is not None:
                described, hashes = remote.located(described), remote.hashes_here(hashes)
                attempt = Attempt(remote.open(), remote.trial(folder.name), trial["attempt"])
                folder = remote.folder_of(folder.name)
            config = TrialConfig.model_validate(described)
            _check_unchanged(hashes)
            run_trial(self.train, config, folder, send, trial["timeout"], attempt)
        except Exception as error:  # noqa: BLE001 (whatever the train function raises is the trial's end)
            send(_failure(error, folder) | {"is_surroundings": _is_surroundings(error, described)})


def sweep_trouble(folder: Path, remote: RemoteSweep | None, sweep_id: str) -> str:
    """What is wrong with the place where a sweep lies, as this node sees it; empty if nothing is.

    Args:
        folder: the sweep's.
        remote: where it lies, if that is a store.
        sweep_id: what its ledger must say.
    """
    return folder_trouble(folder, sweep_id) if remote is None else remote.trouble(sweep_id)


def folder_trouble(folder: Path, sweep_id: str) -> str:
    """What is wrong with a sweep's folder as this node sees it; empty if nothing is.

    Args:
        folder: the sweep's, with its ledger in it.
        sweep_id: what the ledger must say.
    """
    try:
        found = read_header(folder / LEDGER_FILE).id
    except FileNotFoundError:
        return f"{folder} is not there: {_SHARED}"
    except (OSError, LedgerError) as error:
        return f"{folder} cannot be read: {error}: {_SHARED}"
    if found != sweep_id:
        return f"{folder} is another sweep's there: {_SHARED}"
    return "" if os.access(folder, os.W_OK) else f"{folder} cannot be written to"


def place_trouble(mark: Path) -> str:
    """What is wrong with the place where sweeps are to lie as this node sees it, before there is one; empty if nothing is.

    Args:
        mark: a file that was just put there from elsewhere.
    """
    if not os.path.exists(mark):  # also where a folder above cannot be looked into
        return f"{mark.parent} is not there, or another folder: {_SHARED}"
    return "" if os.access(mark.parent, os.W_OK) else f"{mark.parent} cannot be written to"


def _check_unchanged(hashes: Mapping[str, str]) -> None:
    """Look that files are still what they were: a trial with another teacher could not be compared with the others.

    Raises:
        ChangedFileError: one is not; names it.
    """
    for path, expected in hashes.items():
        try:
            found = file_hash(Path(path))
        except FileError as error:
            raise ChangedFileError(f"{path} was there when the sweep began: {error.reason}") from error
        if found != expected:
            raise ChangedFileError(f"{path} has been changed since the sweep began")


def run_trial(
    train: TrainFunction,
    config: TrialConfig,
    folder: Path,
    send: Callable[[Mapping[str, Any]], None],
    timeout: float | None = None,
    attempt: Attempt | None = None,
) -> None:
    """Train, from the newest whole checkpoint in `folder` if there is one; `send` blocks until the driver decided.

    Args:
        train: the train function.
        config: the trial's.
        folder: the trial's; made if need be, in one that is there.
        send: takes a message to the driver.
        timeout: seconds without a report after which this process writes all its stacks to `HANG_FILE` and ends.
        attempt: of a sweep in a store: where checkpoints come from and go to; `folder` has copies of them.

    Raises:
        StorageError: a checkpoint cannot be written because of the disk.
        StoreError: the store cannot be reached.
        FolderBusyError: another worker holds the folder for too long.
        OutdatedAttemptError: a later attempt has begun elsewhere.
    """
    with _only_worker(folder), _ends_when_hung(folder, timeout) as awaited:
        if attempt is not None:
            with awaited():
                attempt.begin(folder)
        newest = newest_checkpoint(folder)
        clear_up(folder, newest)
        if newest is not None:
            epoch, metrics = read_report(newest)
            with awaited():  # a kill may have come before the driver had it
                send({"kind": "report", "epoch": epoch, "metrics": metrics})

        def report(epoch: int, metrics: Mapping[str, float], save: Callable[[Path], None]) -> None:
            with awaited():
                checkpoint = write_checkpoint(folder, epoch, metrics, save)
                if attempt is not None:
                    attempt.keep(checkpoint)  # before the driver hears of the epoch
                send({"kind": "report", "epoch": epoch, "metrics": jsonable(metrics)})

        train(config, report, newest)


@contextlib.contextmanager
def _only_worker(folder: Path) -> Iterator[None]:
    """Hold the trial's folder; the kernel lets go of it when this process dies, however it does."""
    folder.mkdir(exist_ok=True)  # never the sweep's: where that is not, its storage is not
    with open(folder / _LOCK_FILE, "a+b") as stream:
        began = time.monotonic()
        while lock(stream) is Lock.BUSY:
            waited = time.monotonic() - began
            if waited > LONGEST_WAIT_FOR_ANOTHER_WORKER:
                raise FolderBusyError(f"{folder}: another worker is still at work there")
            if waited > PATIENCE_WITH_ANOTHER_WORKER:
                _kill_holder(stream)
            time.sleep(0.05)
        stream.truncate(0)
        stream.write(json.dumps(_identity(os.getpid())).encode())
        stream.flush()
        yield


def _identity(pid: int) -> list[Any]:
    """Names a process for those who see the same processes: nothing else has this identity, now or later.

    Raises:
        OSError: there is no such process.
    """
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return [socket.gethostname(), os.stat("/proc/self/ns/pid").st_ino, pid, int(fields[19])]  # when it was started


def _kill_holder(stream: Any) -> None:
    """Kill the worker that holds the lock, if it is on this machine; it is no longer the trial's."""
    stream.seek(0)
    with contextlib.suppress(OSError, ValueError, IndexError):  # it is just gone, or has not yet said who it is
        holder = json.loads(stream.read())
        if holder == _identity(holder[2]):
            os.kill(holder[2], signal.SIGKILL)


@contextlib.contextmanager
def _ends_when_hung(
    folder: Path, timeout: float | None
) -> Iterator[Callable[[], contextlib.AbstractContextManager[None]]]:
    """End this process when the training says nothing for `timeout` seconds, even if it holds the interpreter's lock.

    Yields:
        A context that pauses the watchdog.
    """
    path = folder / HANG_FILE
    with contextlib.ExitStack() as stack:
        stream = stack.enter_context(open(path, "w")) if timeout is not None else None

        def begin() -> None:
            if stream is not None and timeout is not None:
                faulthandler.dump_traceback_later(timeout, exit=True, file=stream)

        @contextlib.contextmanager
        def awaited() -> Iterator[None]:
            faulthandler.cancel_dump_traceback_later()
            yield
            begin()

        begin()
        try:
            yield awaited
        finally:
            faulthandler.cancel_dump_traceback_later()
            path.unlink(missing_ok=True)


def _is_surroundings(error: BaseException, config: Mapping[str, Any]) -> bool:
    """Whether an error is by its kind the machine's: no parameters of a trial lead to it."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError | ImportError) or (isinstance(cause, RuntimeError) and "CUDA" in str(cause)):
            return True
        cause = cause.__cause__ or cause.__context__
    needed = [value_at(config, key) for key, mark in placements(TrialConfig).items() if mark.must_exist]
    return any(path is not None and not os.path.exists(path) for path in needed)


def _failure(error: Exception, folder: Path) -> dict[str, Any]:
    out_of_memory = type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError)
    text = " ".join(str(error).split())
    is_trouble = isinstance(error, StorageError | StoreError | ChangedFileError)
    if trouble := str(error) if is_trouble else disk_trouble(error, folder):
        kind, reason, text = "storage", "", trouble
    elif isinstance(error, FolderBusyError | ProcessLostError | OutdatedAttemptError):
        kind, reason = "lost", "crash"
    elif out_of_memory:
        kind, reason = "lost", "oom"
    else:
        kind, reason = "failed", "error"
    return {
        "kind": kind,
        "reason": reason,
        "error": text if kind == "storage" else f"{type(error).__name__}: {text}"[:500],
        "traceback": "".join(traceback.format_exception(error)),
    }
