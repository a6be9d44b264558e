"""Ray: the cluster, and Ray Tune scheduling the trials that `search` proposes.

Ray Tune starts, packs and stops trials; what to start, what to start again and what to stop comes from `Search`, through a
searcher and a scheduler that only translate. Ray's own experiment folder is scratch, in the system's temporary folder:
nothing is ever read back from it.
"""

import contextlib
import gc
import json
import logging
import math
import os
import re
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from dataclasses import replace
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
from ray.tune.stopper import Stopper
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tune_topkd.config import SweepConfig
from tune_topkd.sweep.search import OBJECTIVE
from tune_topkd.sweep.search import Search
from tune_topkd.sweep.worker import HANG_FILE
from tune_topkd.sweep.worker import MESSAGE
from tune_topkd.sweep.worker import TrainFunction
from tune_topkd.sweep.worker import Worker
from tune_topkd.sweep.worker import checkpoints
from tune_topkd.trials import LEDGER_FILE
from tune_topkd.trials import Decision
from tune_topkd.trials import LedgerError
from tune_topkd.trials import Share
from tune_topkd.trials import TrialKey
from tune_topkd.trials import TrialRecord
from tune_topkd.trials import TrialStatus

LONGEST_WAIT_FOR_ROOM = 30.0
"""Seconds that a sweep waits, with no trial at work, for a node that could hold one."""

_GRACE_AFTER_TIMEOUT = 30.0  # for a worker that can still end itself, and so tell where it hung
_SECONDS_BETWEEN_CHECKS = 2.0
_LONGEST_START_OF_A_WORKER = 120.0

_log = logging.getLogger(__name__)


class ResourceError(ValueError):
    """The cluster can never give a trial what it asks for, or cannot be reached."""


class SweepTroubleError(ValueError):
    """Something outside the sweep keeps it from going on; what it has is safe, and it can be resumed."""


@dataclass(frozen=True)
class Cluster:
    """A running Ray that this process is attached to, as what its nodes have."""

    nodes: tuple[Share, ...]

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
            yield cls.now()
        finally:
            _shutdown()
            if scratch:
                shutil.rmtree(scratch, ignore_errors=True)

    @classmethod
    def now(cls) -> "Cluster":
        """The nodes there are at this moment."""
        return cls(tuple(_resources(node) for node in ray.nodes() if node["Alive"]))

    def room(self, config: SweepConfig) -> int:
        """How many trials fit at once.

        Raises:
            ResourceError: not even one does.
        """
        share = _share(config)
        room = self.room_for(share)
        if room == 0:
            columns = zip(*self.nodes, strict=True) if self.nodes else ((0.0,), (0.0,))
            most = Share(*map(max, columns))
            key = "gpus_per_trial" if share.gpus > most.gpus else "cpus_per_trial"
            rule = f"no node has room for a trial: the largest has {most.cpus:g} CPUs and {most.gpus:g} GPUs"
            raise ResourceError(f"sweep.{key} = {getattr(config.sweep, key):g}: {rule}")
        return min(room, config.sweep.max_concurrent or room)

    def room_for(self, share: Share) -> int:
        """How many trials of this share fit at once."""
        return sum(_fitting(node, share) for node in self.nodes)

    def larger(self, share: Share) -> Share | None:
        """The next larger share of a node: twice as much of what a trial shares with others; none if it has all.

        Trials on a node share its memory, or a GPU's, in proportion to what they were given.
        """
        cpus, gpus = 2 * share.cpus, min(2 * share.gpus, 1.0) if share.gpus < 1 else share.gpus
        candidates = [Share(cpus, gpus), Share(share.cpus, gpus), *(Share(n.cpus, gpus) for n in self.nodes)]
        return next((c for c in candidates if c > share and self.room_for(c)), None)


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
        ResourceError: a trial can never be placed, or the workers cannot import the train function or see the folder.
        SweepTroubleError: the disk is full or read-only, or the cluster has no room any more; the sweep can be resumed.
    """
    cluster.room(search.config)
    worker = Worker(train)
    _check_nodes(worker, folder, _share(search.config))

    def trial(config: dict[str, Any]) -> None:
        worker(config)

    def resources(config: dict[str, Any]) -> tune.PlacementGroupFactory:
        return tune.PlacementGroupFactory([{"CPU": config["share"][0], "GPU": config["share"][1]}])

    bridge = _Bridge(search, folder, teacher_checkpoint)
    with tempfile.TemporaryDirectory(prefix="ttk-tune-", ignore_cleanup_errors=True) as scratch:
        _tuner(trial, resources, bridge, scratch).fit()
    if bridge.trouble:
        with contextlib.suppress(OSError, LedgerError):  # the trouble may be the ledger's own
            search.stopped(bridge.trouble)
        sweep = search.state.header["sweep"]
        raise SweepTroubleError(f"{bridge.trouble}; the sweep has stopped, nothing is lost: `resume {sweep}` goes on")
    return search.stopped()


def _tuner(trial: Any, resources: Any, bridge: "_Bridge", scratch: str) -> tune.Tuner:
    return tune.Tuner(
        tune.with_resources(trial, resources),
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
            storage_path=scratch,
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=0),  # what is started again is for the ledger to say
            stop=_StopAll(bridge),
            callbacks=[_Lives(bridge)],
        ),
    )


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


def _check_nodes(worker: Worker, folder: Path, share: Share) -> None:
    """On each node that trials can come to: load the train function, and look for the sweep's folder.

    Raises:
        ResourceError: one cannot, or does not answer.
    """

    def look(pickled: bytes, folder: str, ledger: str) -> str:
        try:
            ray.cloudpickle.loads(pickled)
        except Exception as error:  # noqa: BLE001 (whatever importing raises is the answer)
            return f"the train function cannot be imported on the cluster's workers: {type(error).__name__}: {error}"
        if not os.path.exists(os.path.join(folder, ledger)):
            return f"{folder} is not there: --runs-dir must be on storage that all nodes share"
        if not os.access(folder, os.W_OK):
            return f"{folder} cannot be written to"
        return ""

    nodes = [node for node in ray.nodes() if node["Alive"] and _fitting(_resources(node), share)]
    arguments = ray.cloudpickle.dumps(worker), str(folder), LEDGER_FILE
    answers = {}
    for node in nodes:
        there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        answers[ray.remote(num_cpus=0, scheduling_strategy=there)(look).remote(*arguments)] = node["NodeName"]
    try:
        for answer, node in zip(
            ray.get(list(answers), timeout=_LONGEST_START_OF_A_WORKER), answers.values(), strict=True
        ):
            if answer:
                raise ResourceError(f"node {node}: {answer}")
    except (ray.exceptions.RayError, TimeoutError) as error:
        raise ResourceError(f"a node cannot start a worker: {' '.join(str(error).split())[:300]}") from error


class _Bridge:
    """What searcher, scheduler and callbacks share: Ray's trials against ours.

    What goes wrong outside the trials is `trouble`: it ends the sweep, and every trial at work stays without an end.
    """

    def __init__(self, search: Search, folder: Path, teacher_checkpoint: str | None) -> None:
        self.search = search
        self.trouble = ""
        self._folder = folder
        self._teacher_checkpoint = teacher_checkpoint
        self._room = Cluster.now().room(search.config)
        self._live: set[TrialKey] = set()
        self._at_work: dict[TrialKey, _Place] = {}
        self._checked = self._last_room = time.monotonic()

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Bridge":
        return self  # Ray copies its configuration

    def __reduce__(self) -> tuple[Any, ...]:
        return (object, ())  # Ray pickles it into its scratch, from where it is never read

    def next_config(self) -> dict[str, Any] | str | None:
        if self.trouble:
            return str(Searcher.FINISHED)
        self.check()
        if len(self._live) >= self._room:
            return None
        with self._ends_the_sweep():
            record = self.search.next_trial()
            if record is None:
                return None if self._live else str(Searcher.FINISHED)  # one at work may have to be started again
            return self._started_with(record)
        return str(Searcher.FINISHED)

    def _started_with(self, record: TrialRecord) -> dict[str, Any]:
        self._live.add(record.key)
        config = self.search.trial_config(record, self._teacher_checkpoint)
        share = record.share
        if share is None or not Cluster.now().room_for(share):  # the node that had room for the larger one is gone
            share = _share(self.search.config)
        return {
            "label": f"{record.key}-{len(record.retries)}" if record.retries else str(record.key),
            "key": list(record.key),
            "folder": str(self._trial_folder(record.key)),
            "share": list(share),
            "timeout": self.search.config.sweep.trial_timeout,
            "config": config.model_dump(mode="json"),
        }

    def on_start(self, trial: Trial) -> None:
        self._at_work[_key(trial)] = _Place(time.monotonic())
        with self._ends_the_sweep():
            self.search.started(_key(trial))

    def on_message(self, trial: Trial, message: dict[str, Any]) -> str:
        key = _key(trial)
        self._at_work[key] = _Place(time.monotonic(), message["node"], message["pid"])
        with self._ends_the_sweep():
            match message["kind"]:
                case "storage":
                    self.trouble = self.trouble or message["error"]
                    return str(TrialScheduler.STOP)
                case "lost":
                    self._lost(key, message["reason"], message["error"], message["traceback"])
                case "failed":
                    self._failed(key, message["reason"], message["error"], message["traceback"])
                case "report" if OBJECTIVE not in message["metrics"]:
                    self._failed(key, "error", f"KeyError: the train function reported no {OBJECTIVE}", "")
                case "report":
                    decision = self.search.reported(key, message["epoch"], message["metrics"])
                    if decision is Decision.CONTINUE and not self.search.out_of_time and not self.search.fatal:
                        return str(TrialScheduler.CONTINUE)
        self._let_go(key)
        return str(TrialScheduler.STOP)

    def on_end(self, trial: Trial) -> None:
        """Ray is done with the trial: the train function returned, or it was stopped."""
        key = _key(trial)
        if key in self._live and not self.trouble and not self.search.state.trials[key].status.is_end:
            epochs = f"{self.search.state.trials[key].epoch} of {self.search.config.recipe.epochs} epochs"
            with self._ends_the_sweep():
                self._failed(key, "error", f"RuntimeError: the train function returned after {epochs}", "")
        self._let_go(key)

    def on_crash(self, trial: Trial) -> None:
        """The trial's worker is gone."""
        key = _key(trial)
        if key not in self._live:  # its end was decided before
            return
        place = self._at_work.get(key, _Place(0.0))
        told = ""
        with contextlib.suppress(OSError):
            told = Path(trial.error_file).read_text()
        told = told or "the worker died, and Ray does not know why"
        last = " ".join((told.rpartition("Failure # ")[2].partition(")\n")[2] or told).split())
        with self._ends_the_sweep():
            if (stacks := self._stacks(key)) or place.is_hung:
                timeout = self.search.config.sweep.trial_timeout
                epoch = self.search.state.trials[key].epoch
                what = f"TimeoutError: no report for {timeout:g} s (sweep.trial_timeout) after epoch {epoch}"
                self._failed(key, "timeout", what, stacks)
            elif "OutOfMemoryError" in told or "running low on memory" in told:
                self._lost(key, "oom", last[:300], told)
            elif _is_node_loss(told, place.node):
                self._lost(key, "node", last[:300], told)
            else:
                self._lost(key, "crash", _without_ids(last)[:300], told)
        self._let_go(key)

    def check(self) -> None:
        """Look for what would otherwise be waited for without a word: called often, does its work now and then."""
        now = time.monotonic()
        if now - self._checked < _SECONDS_BETWEEN_CHECKS or self.trouble:
            return
        self._checked = now
        cluster = Cluster.now()
        fitting = cluster.room_for(_share(self.search.config))
        self._room = min(fitting, self.search.config.sweep.max_concurrent or fitting)
        if fitting or self._at_work:
            self._last_room = now
        elif now - self._last_room > LONGEST_WAIT_FOR_ROOM:
            try:
                cluster.room(self.search.config)
            except ResourceError as error:
                self.trouble = str(error)
        for key, place in self._at_work.items():
            limit = self.search.config.sweep.trial_timeout + _GRACE_AFTER_TIMEOUT
            if now - place.heard_at > limit and not place.is_hung and place.node:
                _log.error("trial %s says nothing and did not end itself: its worker %d is killed", key, place.pid)
                self._at_work[key] = place.hung()
                there = NodeAffinitySchedulingStrategy(place.node, soft=False)
                ray.remote(num_cpus=0, scheduling_strategy=there)(_kill_worker).remote(place.pid)

    @contextmanager
    def _ends_the_sweep(self) -> Iterator[None]:
        """A ledger that cannot be written ends the sweep; Ray's loop would hide the exception in one of its own."""
        try:
            yield
        except OSError as error:
            self.trouble = self.trouble or f"{error.filename or self.search.ledger.path}: {error.strerror or error}"
        except LedgerError as error:
            self.trouble = self.trouble or str(error)

    def _lost(self, key: TrialKey, reason: str, error: str, traceback: str) -> None:
        record = self.search.state.trials[key]
        larger = Cluster.now().larger(record.share or _share(self.search.config)) if reason == "oom" else None
        self._keep(key, traceback or error)
        if self.search.lost(key, reason, error, larger):
            more = f" with {larger.cpus:g} CPUs and {larger.gpus:g} GPUs" if larger else ""
            _log.warning(
                "trial %s lost its worker (%s: %s); it goes on from its checkpoint%s", key, reason, error, more
            )

    def _failed(self, key: TrialKey, reason: str, error: str, traceback: str) -> None:
        self._keep(key, traceback or error)
        self.search.failed(key, reason, error)

    def _keep(self, key: TrialKey, text: str) -> None:
        folder = self._trial_folder(key)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with open(folder / "error.txt", "a") as stream:
                stream.write(text.rstrip() + "\n")
        except OSError as refused:
            _log.error("the trace of trial %s is kept nowhere else: %s\n%s", key, refused, text)

    def _stacks(self, key: TrialKey) -> str:
        path = self._trial_folder(key) / HANG_FILE
        try:
            return path.read_text()
        except OSError:
            return ""

    def _let_go(self, key: TrialKey) -> None:
        if key in self._live:
            self._live.discard(key)
            self._at_work.pop(key, None)
            if self.search.state.trials[key].status in (TrialStatus.PRUNED, TrialStatus.FAILED):
                for checkpoint in [*checkpoints(self._trial_folder(key)), *self._trial_folder(key).glob(".epoch-*")]:
                    shutil.rmtree(checkpoint, ignore_errors=True)

    def _trial_folder(self, key: TrialKey) -> Path:
        return self._folder / "trials" / str(key)


@dataclass(frozen=True)
class _Place:
    """Where a trial is at work, as far as it has said, and when it was last heard of."""

    heard_at: float
    node: str = ""
    pid: int = 0
    is_hung: bool = False

    def hung(self) -> "_Place":
        return replace(self, is_hung=True)


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
        """A worker died; the callback takes it, which comes when Ray has written down why."""


class _StopAll(Stopper):  # type: ignore[misc]  # ray is untyped
    """Ray's stopper: ends all trials at once when the sweep cannot go on."""

    def __init__(self, bridge: _Bridge) -> None:
        self._bridge = bridge

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return bool(self._bridge.trouble)


class _Lives(tune.Callback):  # type: ignore[misc]  # ray is untyped
    """Ray's callback: notes each start of a trial and each loss of a worker, and looks around now and then."""

    def __init__(self, bridge: _Bridge) -> None:
        self._bridge = bridge

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._bridge.on_start(trial)

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._bridge.on_crash(trial)

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        self._bridge.check()


def _key(trial: Trial) -> TrialKey:
    arm, number = trial.config["key"]
    return TrialKey(arm, number)


def _share(config: SweepConfig) -> Share:
    return Share(config.sweep.cpus_per_trial, config.sweep.gpus_per_trial)


def _resources(node: dict[str, Any]) -> Share:
    return Share(node["Resources"].get("CPU", 0.0), node["Resources"].get("GPU", 0.0))


def _fitting(node: Share, share: Share) -> int:
    by_cpu = math.floor(node.cpus / share.cpus + 1e-9)
    if share.gpus == 0:
        return by_cpu
    by_gpu = node.gpus * math.floor(1 / share.gpus + 1e-9) if share.gpus <= 1 else node.gpus // share.gpus
    return min(by_cpu, int(by_gpu))


def _is_node_loss(told: str, node: str) -> bool:
    """Whether a worker is gone because its node is: Ray says so, or the node's raylet does not answer any more."""
    if "node has died" in told or "node was terminated" in told or "preempt" in told:
        return True
    entry = next((n for n in ray.nodes() if n["NodeID"] == node), None)
    if entry is None:
        return "is unavailable" in told  # it had not yet reported from where
    try:
        socket.create_connection((entry["NodeManagerAddress"], entry["NodeManagerPort"]), timeout=3).close()
    except OSError:
        return True
    return not entry["Alive"]


def _without_ids(text: str) -> str:
    """What Ray says of a dead worker, the same for every worker that died of the same."""
    return re.sub(r"\b(pid|actor_id|ip|namespace|name): \S+ ?|\b[0-9a-f]{16,}\b", "", text)


def _kill_worker(pid: int) -> None:
    """Kill a worker of this node that does not end itself."""
    with contextlib.suppress(OSError):
        if b"ray" in Path(f"/proc/{pid}/cmdline").read_bytes():
            os.kill(pid, signal.SIGKILL)


def _scratch_folder() -> str:
    base = tempfile.gettempdir()  # Ray's sockets lie below it, and their paths have at most 107 bytes
    return tempfile.mkdtemp(prefix="ttk-", dir=base if len(base) <= 30 else "/tmp")  # noqa: S108
