"""Ray: the cluster, and Ray Tune scheduling the trials that `search` proposes.

Ray Tune starts, packs, retries and stops trials; what to start and what to stop comes from `Search`, through a searcher and
a scheduler that only translate. Ray's own experiment folder is scratch: nothing is ever read back from it.
"""

import contextlib
import gc
import json
import logging
import math
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Ray reads these at import or start; what the user has set wins.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # no CSV, JSON and TensorBoard copies of the ledger
os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "3600")  # its snapshots are of no use to us
os.environ.setdefault("TUNE_MAX_PENDING_TRIALS_PG", "1")  # a proposal is made when there is room for it, not before
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # a trial without a GPU leaves CUDA_VISIBLE_DEVICES

import ray
from ray import tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher

from tune_topkd.config import SweepConfig
from tune_topkd.sweep.search import OBJECTIVE
from tune_topkd.sweep.search import Search
from tune_topkd.sweep.worker import MESSAGE
from tune_topkd.sweep.worker import TrainFunction
from tune_topkd.sweep.worker import Worker
from tune_topkd.trials import Decision
from tune_topkd.trials import TrialKey
from tune_topkd.trials import TrialStatus

_log = logging.getLogger(__name__)


class ResourceError(ValueError):
    """The cluster can never give a trial what it asks for, or cannot be reached."""


@dataclass(frozen=True)
class Cluster:
    """A running Ray that this process is attached to, as CPUs and GPUs per node."""

    nodes: tuple[tuple[float, float], ...]

    @classmethod
    @contextmanager
    def attached(cls, address: str | None = None) -> Iterator["Cluster"]:
        """Start a private Ray on this machine, or attach to the one at `address`; let go of it at the end.

        Raises:
            ResourceError: nothing answers at `address`.
        """
        if address:
            check_address(address)
        scratch = None if address or os.environ.get("RAY_TMPDIR") else _scratch_folder()
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if address:
            options |= {"address": address}
        else:
            options |= {"address": "local", "include_dashboard": False, "_temp_dir": scratch}
        try:
            ray.init(**options)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise ResourceError(f"--address {address}: no Ray cluster answers there: {error}") from error
        try:
            yield cls(tuple(_resources(node) for node in ray.nodes() if node["Alive"]))
        finally:
            _shutdown()
            if scratch:
                shutil.rmtree(scratch, ignore_errors=True)

    def room(self, config: SweepConfig) -> int:
        """How many trials fit at once.

        Raises:
            ResourceError: not even one does.
        """
        cpus, gpus = config.sweep.cpus_per_trial, config.sweep.gpus_per_trial
        room = sum(_fitting(node, cpus, gpus) for node in self.nodes)
        if room == 0:
            most_cpus, most_gpus = (max(column, default=0) for column in zip(*self.nodes, strict=True))
            key = "gpus_per_trial" if gpus > most_gpus else "cpus_per_trial"
            rule = f"no node has room for a trial: the largest has {most_cpus:g} CPUs and {most_gpus:g} GPUs"
            raise ResourceError(f"sweep.{key} = {getattr(config.sweep, key):g}: {rule}")
        return min(room, config.sweep.max_concurrent or room)


def run_sweep(
    search: Search, *, cluster: Cluster, folder: Path, train: TrainFunction, teacher_checkpoint: str | None
) -> str:
    """Run what is left of a sweep and return why it stopped: the reason of the ledger's `stop` event.

    Ctrl-C ends it cleanly: running trials stay without an end in the ledger and go on from their checkpoints at the next
    call.

    Args:
        search: the sweep's brain, made from its ledger.
        cluster: the Ray to run on.
        folder: the sweep's folder, absolute, on storage that all nodes see.
        train: what runs a trial; must be importable on the workers.
        teacher_checkpoint: absolute path of the teacher's weights.

    Raises:
        ResourceError: a trial can never be placed, or the workers cannot import the train function.
        OSError: the ledger cannot be written.
    """
    room = cluster.room(search.config)
    settings = search.config.sweep
    worker = Worker(train)
    _check_import(worker)

    def trial(config: dict[str, Any]) -> None:
        worker(config)

    scratch = folder / "ray"
    shutil.rmtree(scratch, ignore_errors=True)
    bridge = _Bridge(search, folder, teacher_checkpoint, room)
    tuner = tune.Tuner(
        tune.with_resources(trial, {"cpu": settings.cpus_per_trial, "gpu": settings.gpus_per_trial}),
        tune_config=tune.TuneConfig(
            search_alg=_AskSearch(bridge),
            scheduler=_TellSearch(bridge),
            num_samples=-1,
            reuse_actors=True,
            trial_dirname_creator=lambda t: t.config["label"],
            trial_name_creator=lambda t: t.config["label"],
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(scratch),
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=settings.max_failures),
            callbacks=[_Lives(bridge)],
        ),
    )
    tuner.fit()
    return search.stopped()


def _shutdown() -> None:
    """Let go of Ray with no garbage left that holds references into it.

    A reference that another thread's garbage collection drops while Ray shuts down ends the whole process from C++.
    """
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        ray.shutdown()
    finally:
        if was_enabled:
            gc.enable()


def check_address(address: str) -> None:
    """Knock at the door: Ray itself waits more than a minute for a cluster that is not there.

    Raises:
        ResourceError: no address, or nothing answers there.
    """
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not host or not port.isdecimal():
        if address != "auto":
            raise ResourceError(f"--address {address}: must be HOST:PORT of a Ray head, or auto")
        return
    try:
        socket.create_connection((host, int(port)), timeout=3).close()
    except (OSError, OverflowError) as error:
        raise ResourceError(f"--address {address}: no Ray cluster answers there: {error}") from error


def _check_import(worker: Worker) -> None:
    """Load the train function on a worker before trials are spent on it."""

    def load(pickled: bytes) -> str:
        try:
            ray.cloudpickle.loads(pickled)
        except Exception as error:  # noqa: BLE001 (whatever importing raises is the answer)
            return f"{type(error).__name__}: {error}"
        return ""

    pickled = ray.cloudpickle.dumps(worker)
    trouble = ray.get(ray.remote(num_cpus=0)(load).remote(pickled))
    if trouble:
        raise ResourceError(
            f"the train function {worker.train!r} cannot be imported on the cluster's workers: {trouble}"
        )


class _Bridge:
    """What searcher, scheduler and callback share: Ray's trials against ours."""

    def __init__(self, search: Search, folder: Path, teacher_checkpoint: str | None, room: int) -> None:
        self.search = search
        self._folder = folder
        self._teacher_checkpoint = teacher_checkpoint
        self._room = room
        self._live: set[TrialKey] = set()

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Bridge":
        return self  # Ray copies its configuration

    def __reduce__(self) -> tuple[Any, ...]:
        return (object, ())  # Ray pickles it into its scratch, from where it is never read

    def next_config(self) -> dict[str, Any] | str | None:
        if len(self._live) >= self._room:
            return None
        record = self.search.next_trial()
        if record is None:
            return str(Searcher.FINISHED)
        self._live.add(record.key)
        config = self.search.trial_config(record, self._teacher_checkpoint)
        return {
            "label": str(record.key),
            "key": list(record.key),
            "folder": str(self._trial_folder(record.key)),
            "config": config.model_dump(mode="json"),
        }

    def on_start(self, trial: Trial) -> None:
        self.search.started(_key(trial))

    def on_message(self, trial: Trial, message: dict[str, Any]) -> str:
        key = _key(trial)
        if message["kind"] == "failed":
            self._failed(key, message["reason"], message["error"], message["traceback"])
        elif OBJECTIVE not in message["metrics"]:
            self._failed(key, "error", f"KeyError: the train function reported no {OBJECTIVE}", "")
        else:
            decision = self.search.reported(key, message["epoch"], message["metrics"])
            if decision is Decision.CONTINUE and not self.search.out_of_time and not self.search.fatal:
                return str(TrialScheduler.CONTINUE)
        self._let_go(key)
        return str(TrialScheduler.STOP)

    def on_end(self, trial: Trial) -> None:
        """Ray is done with the trial: the train function returned, or it was stopped."""
        key = _key(trial)
        if key in self._live and not self.search.state.trials[key].status.is_end:
            epochs = f"{self.search.state.trials[key].epoch} of {self.search.config.recipe.epochs} epochs"
            self._failed(key, "error", f"RuntimeError: the train function returned after {epochs}", "")
        self._let_go(key)

    def on_crash(self, trial: Trial) -> None:
        """The trial's worker died, more often than `max_failures`."""
        told = ""
        with contextlib.suppress(OSError):
            told = Path(trial.error_file).read_text()
        told = told or "the worker died, and Ray does not know why"
        reason = "oom" if "OutOfMemoryError" in told or "running low on memory" in told else "crash"
        last = told.rpartition("Failure # ")[2].partition(")\n")[2] or told
        self._failed(_key(trial), reason, " ".join(last.split())[:300], told)
        self._let_go(_key(trial))

    def _failed(self, key: TrialKey, reason: str, error: str, traceback: str) -> None:
        folder = self._trial_folder(key)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "error.txt").write_text(traceback or error)
        self.search.failed(key, reason, error)

    def _let_go(self, key: TrialKey) -> None:
        if key in self._live:
            self._live.discard(key)
            if self.search.state.trials[key].status in (TrialStatus.PRUNED, TrialStatus.FAILED):
                for checkpoint in self._trial_folder(key).glob("*epoch-*"):
                    shutil.rmtree(checkpoint, ignore_errors=True)

    def _trial_folder(self, key: TrialKey) -> Path:
        return self._folder / "trials" / str(key)


class _AskSearch(Searcher):  # type: ignore[misc]  # ray is untyped
    """Ray's searcher: asks for the next trial when there is room for it."""

    def __init__(self, bridge: _Bridge) -> None:
        super().__init__()
        self._bridge = bridge

    def set_search_properties(self, *_: Any, **__: Any) -> bool:
        return True

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        return self._bridge.next_config()

    def on_trial_complete(self, *_: Any, **__: Any) -> None:
        """Ends come through the scheduler, which sees every report."""

    def save(self, checkpoint_path: str) -> None:
        """The ledger is the state."""

    def restore(self, checkpoint_path: str) -> None:
        raise AssertionError("a sweep is resumed from its ledger, never by Ray")


class _TellSearch(FIFOScheduler):  # type: ignore[misc]  # ray is untyped
    """Ray's scheduler: hands every report to `Search` and its decision back."""

    _supports_buffered_results = False

    def __init__(self, bridge: _Bridge) -> None:
        super().__init__()
        self._bridge = bridge

    def set_search_properties(self, *_: Any, **__: Any) -> bool:
        return True

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        if result.get("done") or MESSAGE not in result:  # the train function returned: its last result comes again
            self._bridge.on_end(trial)
            return str(TrialScheduler.STOP)
        return self._bridge.on_message(trial, json.loads(result[MESSAGE]))

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        self._bridge.on_end(trial)

    def on_trial_error(self, tune_controller: Any, trial: Trial) -> None:
        """A worker died; Ray says so here also when it will start the trial again."""


class _Lives(tune.Callback):  # type: ignore[misc]  # ray is untyped
    """Ray's callback: notes each start of a trial, the first and those after a crash, and the last crash."""

    def __init__(self, bridge: _Bridge) -> None:
        self._bridge = bridge

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._bridge.on_start(trial)

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._bridge.on_crash(trial)


def _key(trial: Trial) -> TrialKey:
    arm, number = trial.config["key"]
    return TrialKey(arm, number)


def _resources(node: dict[str, Any]) -> tuple[float, float]:
    return node["Resources"].get("CPU", 0.0), node["Resources"].get("GPU", 0.0)


def _fitting(node: tuple[float, float], cpus: float, gpus: float) -> int:
    by_cpu = math.floor(node[0] / cpus + 1e-9)
    if gpus == 0:
        return by_cpu
    by_gpu = node[1] * math.floor(1 / gpus + 1e-9) if gpus <= 1 else node[1] // gpus
    return min(by_cpu, int(by_gpu))


def _scratch_folder() -> str:
    base = tempfile.gettempdir()  # Ray's sockets lie below it, and their paths have at most 107 bytes
    return tempfile.mkdtemp(prefix="ttk-", dir=base if len(base) <= 30 else "/tmp")  # noqa: S108
