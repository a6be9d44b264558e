"""Ray Tune scheduling the trials that `search` proposes, on a `cluster`.

Ray Tune starts, packs and stops trials; what to start, what to start again and what to stop comes from `Search`, through a
searcher and a scheduler that only translate. Ray's own experiment folder is scratch, in the system's temporary folder:
nothing is ever read back from it.
"""

import contextlib
import json
import logging
import os
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ray import tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher
from ray.tune.stopper import Stopper

from tune_topkd.config import NO_FILES
from tune_topkd.config import SharedFiles
from tune_topkd.errors import TuneTopKDError
from tune_topkd.execution.bridge import Bridge
from tune_topkd.execution.bridge import Interruption
from tune_topkd.execution.bridge import most_at_once
from tune_topkd.execution.broker import Client
from tune_topkd.execution.cluster import Cluster
from tune_topkd.execution.cluster import share_of
from tune_topkd.execution.gpus import GpuWatch
from tune_topkd.execution.growth import Growth
from tune_topkd.execution.nodes import Nodes
from tune_topkd.execution.nodes import longest_start
from tune_topkd.execution.remote import RemoteSweep
from tune_topkd.execution.scratch import scratch_folder
from tune_topkd.execution.worker import MESSAGE
from tune_topkd.execution.worker import TrainFunction
from tune_topkd.execution.worker import Worker
from tune_topkd.ledger import LedgerError
from tune_topkd.machine import NodeGpus
from tune_topkd.search.search import Search

_NO_SIGINT_HANDLER = "TUNE_DISABLE_SIGINT_HANDLER"
_MOST_PENDING = "TUNE_MAX_PENDING_TRIALS_PG"
_ANY_NUMBER = 10**6

_log = logging.getLogger(__name__)


class SweepTroubleError(TuneTopKDError):
    """Something outside the sweep keeps it from going on; what it has is safe, and it can be resumed."""


def run_sweep(
    search: Search,
    *,
    cluster: Cluster,
    folder: Path,
    train: TrainFunction,
    files: SharedFiles = NO_FILES,
    test_files: SharedFiles = NO_FILES,
    hashes: Mapping[str, str] = MappingProxyType({}),
    interruption: Interruption | None = None,
    note: Callable[[str], None] = _log.warning,
    priority: float | None = None,
    remote: RemoteSweep | None = None,
    on_gpus: Callable[[Sequence[NodeGpus]], None] | None = None,
) -> str:
    """Run what is left of a sweep and return why it stopped: the reason of the ledger's `stop` event.

    An interruption ends it cleanly: running trials stay without an end in the ledger and go on from their checkpoints at
    the next call.

    Args:
        search: the sweep's brain, made from its ledger.
        cluster: the Ray to run on.
        folder: the sweep's folder, absolute, on storage that all nodes see; with `remote` the driver's alone.
        train: what runs a trial; must be importable on the workers.
        files: what all trials share, where all nodes see it, but for those of the arm `test`.
        test_files: what these share.
        hashes: SHA-256 by path of files that must still be what they were; a trial that finds another ends the sweep.
        interruption: asks the sweep to end; by default Ctrl-C does.
        note: is told of nodes that trials do not go to, and why, and of other sweeps on the cluster.
        priority: the sweep's among others on this cluster, above 0; None where there can be none.
        remote: where the sweep lies, if that is a store.
        on_gpus: is told every few seconds, on another thread, what the GPUs are doing of the nodes on which trials are at
            work, if trials have GPUs.

    Raises:
        TakenOverError: another process drives the sweep by now.
        ResourceError: a trial can never be placed, or on no node the train function can be imported or the folder seen.
        SweepTroubleError: the disk is full or read-only, or the cluster has no room any more; the sweep can be resumed.
    """
    share = share_of(search.config)
    asks = priority is not None and search.config.sweep.autoscale_to is not None
    growth = Growth(share, note) if asks else None
    if growth is None:
        cluster.room(search.config)
    worker = Worker(train)
    patience = longest_start(search.config)
    nodes = Nodes(worker, folder, search.state.header.id, share, note, remote, patience)
    broker = None if priority is None else Client(search.state.header.id, share, priority, note)
    gpus = None if on_gpus is None or not share.gpus else GpuWatch(on_gpus)

    def trial(config: dict[str, Any]) -> None:
        worker(config)

    def resources(config: dict[str, Any]) -> tune.PlacementGroupFactory:
        bundle = {"CPU": config["share"][0], "GPU": config["share"][1]}
        return tune.PlacementGroupFactory([bundle], bundle_label_selector=config["placement"])

    def is_over() -> bool:
        return search.lets_go or (interruption is not None and interruption.is_asked)

    with contextlib.ExitStack() as stack:
        if broker is not None:
            stack.enter_context(broker.reporting())  # while the nodes are looked at
        if growth is not None:
            stack.enter_context(contextlib.closing(growth))
        nodes.wait_for_one(growth, most_at_once(search, 0), is_over)
        if is_over():
            return search.stopped()
        (folder / "trials").mkdir(exist_ok=True)
        bridge = Bridge(search, folder, files, test_files, hashes, interruption, nodes, broker, remote, gpus, growth)
        with (
            contextlib.closing(bridge),
            contextlib.nullcontext() if gpus is None else gpus.asking(),
            scratch_folder() as scratch,
            _listening(interruption),
            bridge.ends_the_sweep(),  # what ends Ray's loop is trouble of the sweep, not a trace in the user's terminal
            _workers_starting_together(),
        ):
            bridge.wait_for_room()
            _tuner(trial, resources, bridge, scratch).fit()
    if bridge.taken_over is not None:
        raise bridge.taken_over
    if bridge.trouble:
        with contextlib.suppress(OSError, LedgerError):  # the trouble may be the ledger's own
            search.stopped(bridge.trouble)
        sweep = search.state.header.sweep
        raise SweepTroubleError(f"{bridge.trouble}; the sweep has stopped, nothing is lost: `resume {sweep}` goes on")
    return search.stopped()


@contextmanager
def _listening(interruption: Interruption | None) -> Iterator[None]:
    """While Ray Tune's loop runs: an interruption sets its mark only, and Ray Tune's own handler of SIGINT stays away."""
    if interruption is None:
        yield
        return
    before = os.environ.get(_NO_SIGINT_HANDLER)
    os.environ[_NO_SIGINT_HANDLER] = "1"
    try:
        with interruption.deferred():
            yield
    finally:
        os.environ.pop(_NO_SIGINT_HANDLER)
        if before is not None:
            os.environ[_NO_SIGINT_HANDLER] = before


def _tuner(trial: Any, resources: Any, bridge: "Bridge", scratch: str) -> tune.Tuner:
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


@contextmanager
def _workers_starting_together() -> Iterator[None]:
    """Have Ray ask for a trial whenever there is room: by itself it asks for none while any worker is starting."""
    before = os.environ.get(_MOST_PENDING)
    os.environ[_MOST_PENDING] = str(_ANY_NUMBER)
    try:
        yield
    finally:
        os.environ.pop(_MOST_PENDING)
        if before is not None:
            os.environ[_MOST_PENDING] = before


class _AskSearch(Searcher):  # type: ignore[misc]  # ray is untyped
    """Ray's searcher: asks for the next trial when there is room for it."""

    def __init__(self, bridge: Bridge) -> None:
        super().__init__()
        self._bridge = bridge

    def set_search_properties(self, *_: Any, **__: Any) -> bool:
        return True

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        config = self._bridge.next_config()
        if config is None and self._bridge.is_waiting:
            _let_idle_worker_go(self._bridge.controller)
            self._bridge.controller._actor_manager.next(timeout=0.1)  # Ray's loop stands still until there is a trial
        return config

    def on_trial_complete(self, *_: Any, **__: Any) -> None:
        """Ends come through the scheduler, which sees every report."""

    def save(self, checkpoint_path: str) -> None:
        """The ledger is the state."""

    def restore(self, checkpoint_path: str) -> None:
        raise AssertionError("a sweep is resumed from its ledger, never by Ray")


class _TellSearch(FIFOScheduler):  # type: ignore[misc]  # ray is untyped
    """Ray's scheduler: hands every report to `Search` and its decision back."""

    _supports_buffered_results = False

    def __init__(self, bridge: Bridge) -> None:
        super().__init__()
        self._bridge = bridge
        self._new: list[Trial] = []
        self._waiting: list[Trial] = []
        """Those that a worker has been asked for, in that order."""

    def set_search_properties(self, *_: Any, **__: Any) -> bool:
        return True

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        self._new.append(trial)
        self._bridge.controller = tune_controller._tune_controller

    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
        """The oldest new trial, else the one that was last asked a worker for: a free worker is given to what this gives.

        Ray's own choice is the trial that has waited longest. Its worker, which is starting, would be stopped, a new one
        begun for the next trial, and so on: where trials are shorter than a worker's start, one worker would do them all.
        """
        self._waiting = [trial for trial in self._waiting + self._new[:1] if trial.status == Trial.PENDING]
        del self._new[:1]
        if not self._waiting and self._bridge.is_full:
            _let_idle_worker_go(self._bridge.controller)
        return self._waiting[-1] if self._waiting else None

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        if result.get("done") or MESSAGE not in result:  # the train function returned: its last result comes again
            self._bridge.on_end(trial)
            return str(TrialScheduler.STOP)
        return self._bridge.on_message(trial, json.loads(result[MESSAGE]))

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        self._bridge.on_end(trial)

    def on_trial_error(self, tune_controller: Any, trial: Trial) -> None:
        """A worker died; the callback takes it, which comes when Ray has written down why."""


def _let_idle_worker_go(controller: Any) -> None:
    """Free the place of a worker whose trial has ended: Ray keeps one for the trial that may come next."""
    controller._cleanup_cached_actors(force_all=True)  # has no public name


class _StopAll(Stopper):  # type: ignore[misc]  # ray is untyped
    """Ray's stopper: ends all trials at once when the sweep cannot go on."""

    def __init__(self, bridge: Bridge) -> None:
        self._bridge = bridge

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self._bridge.is_ending


class _Lives(tune.Callback):  # type: ignore[misc]  # ray is untyped
    """Ray's callback: notes each start of a trial and each loss of a worker, and looks around now and then."""

    def __init__(self, bridge: Bridge) -> None:
        self._bridge = bridge

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._bridge.on_start(trial)

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._bridge.on_crash(trial)

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        self._bridge.check()
