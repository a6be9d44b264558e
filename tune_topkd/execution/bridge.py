"""Ray's trials against ours: what becomes of a trial under Ray is told to the search, and what it decides to Ray."""

import contextlib
import errno
import logging
import math
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from contextlib import contextmanager
from dataclasses import dataclass
from dataclasses import replace
from pathlib import Path
from typing import Any
from typing import Protocol

from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher

from tune_topkd.config import SharedFiles
from tune_topkd.execution.broker import Client
from tune_topkd.execution.checkpoints import checkpoints
from tune_topkd.execution.cluster import ResourceError
from tune_topkd.execution.cluster import share_of
from tune_topkd.execution.cluster import trial_part
from tune_topkd.execution.gpus import GpuWatch
from tune_topkd.execution.growth import LONGEST_WAIT_FOR_A_NODE
from tune_topkd.execution.growth import Growth
from tune_topkd.execution.nodes import Nodes
from tune_topkd.execution.nodes import is_node_loss
from tune_topkd.execution.nodes import kill_worker
from tune_topkd.execution.nodes import longest_start
from tune_topkd.execution.nodes import no_node_came
from tune_topkd.execution.nodes import whereabouts
from tune_topkd.execution.remote import RemoteSweep
from tune_topkd.execution.remote import drop_checkpoints
from tune_topkd.execution.worker import HANG_FILE
from tune_topkd.execution.worker import sweep_trouble
from tune_topkd.ledger import TEST
from tune_topkd.ledger import Decision
from tune_topkd.ledger import LedgerError
from tune_topkd.ledger import TakenOverError
from tune_topkd.ledger import TrialKey
from tune_topkd.ledger import TrialRecord
from tune_topkd.ledger import TrialStatus
from tune_topkd.search.search import Search
from tune_topkd.search.search import UndecidedError

LONGEST_WAIT_FOR_ROOM = 30.0
"""Seconds that a sweep waits, with no trial at work, for a node that could hold one."""

_GRACE_AFTER_TIMEOUT = 30.0  # for a worker that can still end itself, and so tell where it hung
_SECONDS_BETWEEN_CHECKS = 2.0
_SECONDS_BETWEEN_ASKING = 0.1
_log = logging.getLogger(__name__)


class Interruption(Protocol):
    """What asks a sweep to end, such as a signal."""

    @property
    def is_asked(self) -> bool:
        """Whether the sweep is to end."""

    def deferred(self) -> AbstractContextManager[None]:
        """While this lasts, being asked only sets `is_asked`; otherwise it raises `KeyboardInterrupt`."""

    def check(self) -> None:
        """Raise `KeyboardInterrupt` if it was asked while it was deferred."""


@dataclass(frozen=True)
class _Place:
    """Where a trial is at work, as far as it has said, and when it was last heard of."""

    heard_at: float
    actor: Any = None
    node: str = ""
    pid: int = 0
    """0 before the first message."""
    is_hung: bool = False


class Bridge:
    """What searcher, scheduler and callbacks share: Ray's trials against ours.

    What goes wrong outside the trials is `trouble`: it ends the sweep, and every trial at work stays without an end.
    """

    def __init__(
        self,
        search: Search,
        folder: Path,
        files: SharedFiles,
        test_files: SharedFiles,
        hashes: Mapping[str, str],
        interruption: Interruption | None,
        nodes: Nodes,
        broker: Client | None = None,
        remote: RemoteSweep | None = None,
        gpus: GpuWatch | None = None,
        growth: Growth | None = None,
    ) -> None:
        self.search = search
        self.trouble = ""
        self.controller: Any = None
        """Ray Tune's loop, once it has a trial."""
        self.taken_over: TakenOverError | None = None
        """That another process drives the sweep by now, if that is the trouble."""
        self._folder = folder
        self._files, self._test_files = files, test_files
        self._hashes = dict(hashes)
        self._interruption = interruption
        self._nodes = nodes
        self._broker = broker
        self._gpus = gpus
        self._growth = growth
        self._is_idle = False
        """Whether there was no trial to start, and none has ended since."""
        self._remote = remote
        self._handed_out: Counter[TrialKey] = Counter()
        self._removals = ThreadPoolExecutor(1, thread_name_prefix="removing checkpoints")
        self._room = nodes.cluster.room(search.config)
        self._live: set[TrialKey] = set()
        self._at_work: dict[TrialKey, _Place] = {}
        self._checked = self._last_room = time.monotonic()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Bridge":
        return self  # Ray copies its configuration

    def __reduce__(self) -> tuple[Any, ...]:
        return (object, ())  # Ray pickles it into its scratch, from where it is never read

    @property
    def is_ending(self) -> bool:
        """Whether the sweep ends now, and its trials at work stay without an end."""
        return bool(self.trouble) or (self._interruption is not None and self._interruption.is_asked)

    def next_config(self) -> dict[str, Any] | str | None:
        """The next trial to start, as Ray is to have it; None if none can be just now; Ray's word that there is none."""
        if self.is_ending:
            return str(Searcher.FINISHED)
        self.check()
        if len(self._live) >= self._room or (self._broker is not None and not self._broker.take()):
            return None
        with self.ends_the_sweep():
            record = self.search.next_trial()
            self._is_idle = record is None
            if record is None:
                self._tell_broker()
                return None if self._live else str(Searcher.FINISHED)  # one at work may have to be started again
            return self._started_with(record)
        return str(Searcher.FINISHED)

    def wait_for_room(self) -> None:
        """On a cluster that others use too: wait for the first place, or for what ends the sweep."""
        if self._broker is None:
            return
        self._tell_broker()
        while not (self._broker.has_room() or self.is_ending or self.search.lets_go):
            self.check()
            time.sleep(_SECONDS_BETWEEN_ASKING)

    @property
    def is_full(self) -> bool:
        """Whether a worker whose trial has ended is of no use to this sweep, while others wait for its place."""
        return self._broker is not None and self._broker.is_full()

    @property
    def is_waiting(self) -> bool:
        """Whether all trials have ended, and there is no place for another one."""
        return self.controller is not None and not self._live and self.is_full

    def _tell_broker(self) -> None:
        if self._broker is not None:
            self._broker.tell(len(self._live), len(self._live) if self._is_idle else self._room)

    def _started_with(self, record: TrialRecord) -> dict[str, Any]:
        self._live.add(record.key)
        self._tell_broker()
        if self._growth is not None:
            self._growth.give_way()
        share = record.share
        if share is None or not self._nodes.cluster.room_for(share):  # the node with room for the larger one is gone
            share = share_of(self.search.config)
        files = self._test_files if record.key.arm == TEST else self._files
        config = self.search.trial_config(record, files).model_copy(update=trial_part(share))
        return {
            "label": f"{record.key}-{len(record.retries)}" if record.retries else str(record.key),
            "key": list(record.key),
            "remote": None if self._remote is None else self._remote.as_json(),
            "attempt": self._attempt(record.key),
            "folder": str(self._trial_folder(record.key)),
            "share": list(share),
            "placement": self._nodes.placement,
            "sweep_id": self.search.state.header.id,
            "timeout": self.search.config.sweep.trial_timeout,
            "hashes": self._hashes,
            "config": config.model_dump(mode="json"),
        }

    def _attempt(self, key: TrialKey) -> str:
        """A name that no other attempt at this trial has, whichever process drove it: a later one's is greater."""
        self._handed_out[key] += 1
        return f"{self.search.state.drivers:04d}-{self._handed_out[key]:04d}"

    def on_start(self, trial: Trial) -> None:
        """A worker has begun the trial."""
        self._at_work[key_of(trial)] = _Place(time.monotonic(), trial.temporary_state.ray_actor)
        with self.ends_the_sweep():
            self.search.started(key_of(trial))

    def on_message(self, trial: Trial, message: dict[str, Any]) -> str:
        """Take what a trial's worker says; whether the trial is to go on, in Ray's words."""
        key = key_of(trial)
        self._at_work[key] = _Place(time.monotonic(), node=message["node"], pid=message["pid"])
        with self.ends_the_sweep():
            match message["kind"]:
                case "storage" if not self._is_one_node_s(key, message):
                    self.trouble = self.trouble or message["error"]
                    return str(TrialScheduler.STOP)
                case "storage":
                    self._lost(key, "node", self._at(message["node"], message["error"]), message["traceback"])
                case "lost":
                    self._lost(key, message["reason"], message["error"], message["traceback"])
                case "failed":
                    what = message["reason"], message["error"], message["traceback"]
                    self._failed_or_moved(key, *what, message["node"], is_surroundings=message["is_surroundings"])
                case "report" if lacking := self.search.needed(key, message["epoch"]) - message["metrics"].keys():
                    told = ", ".join(sorted(lacking))
                    self._failed(key, "error", f"KeyError: the train function reported no {told}", "")
                case "report":
                    self._nodes.reported(message["node"])
                    decision = self.search.reported(key, message["epoch"], message["metrics"])
                    if decision is Decision.CONTINUE and not self.search.lets_go:
                        return str(TrialScheduler.CONTINUE)
        self._let_go(key)
        return str(TrialScheduler.STOP)

    def on_end(self, trial: Trial) -> None:
        """Ray is done with the trial: the train function returned, or it was stopped."""
        key = key_of(trial)
        if key in self._live and not self.is_ending and not self.search.state.trials[key].status.is_end:
            epochs = f"{self.search.state.trials[key].epoch} of {self.search.config.recipe.epochs} epochs"
            with self.ends_the_sweep():
                self._failed(key, "error", f"RuntimeError: the train function returned after {epochs}", "")
        self._let_go(key)

    def on_crash(self, trial: Trial) -> None:
        """The trial's worker is gone."""
        key = key_of(trial)
        if key not in self._live or self.is_ending:  # its end was decided before, or it is to have none
            return
        place = self._at_work.get(key, _Place(0.0))
        if not place.node and (there := whereabouts(place.actor)) is not None:
            place = replace(place, node=there[0])
        told = ""
        with contextlib.suppress(OSError):
            told = Path(trial.error_file).read_text()
        told = told or "the worker died, and Ray does not know why"
        last = " ".join((told.rpartition("Failure # ")[2].partition(")\n")[2] or told).split())
        with self.ends_the_sweep():
            if (stacks := self._stacks(key)) or place.is_hung or self._was_silent(place):
                timeout = self.search.config.sweep.trial_timeout
                epoch = self.search.state.trials[key].epoch
                what = f"TimeoutError: no report for {timeout:g} s (sweep.trial_timeout) after epoch {epoch}"
                self._failed_or_moved(key, "timeout", what, stacks, place.node)
            elif "OutOfMemoryError" in told or "running low on memory" in told:
                self._lost(key, "oom", last[:300], told)
            elif is_node_loss(told, place.node):
                self._lost(key, "node", last[:300], told)
            elif self._nodes.is_to_blame(key, place.node, _without_ids(last), is_surroundings=False):
                self._lost(key, "node", self._at(place.node, _without_ids(last)), told)
            else:
                self._lost(key, "crash", _without_ids(last)[:300], told)
        self._let_go(key)

    def _was_silent(self, place: _Place) -> bool:
        """Whether a worker on another node ended itself, as one that hangs does: its stacks are not seen from here."""
        return self._remote is not None and time.monotonic() - place.heard_at > self.search.config.sweep.trial_timeout

    def check(self) -> None:
        """Detect silent stalls: called often, it looks every few seconds."""
        now = time.monotonic()
        if now - self._checked < _SECONDS_BETWEEN_CHECKS or self.trouble:
            return
        self._checked = now
        self._nodes.look()
        self._look_at_gpus()
        cluster = self._nodes.cluster
        fitting = cluster.room_for(share_of(self.search.config))
        self._room = min(fitting, self.search.config.sweep.max_concurrent or fitting)
        self._tell_broker()
        self._ask_for_nodes()
        if fitting or self._at_work:
            self._last_room = now
        elif now - self._last_room > (LONGEST_WAIT_FOR_ROOM if self._growth is None else LONGEST_WAIT_FOR_A_NODE):
            try:
                cluster.room(self.search.config)
            except ResourceError as error:
                why = str(error) if self._growth is None else no_node_came(share_of(self.search.config))
                self.trouble = "; ".join(filter(None, [why, self._nodes.set_aside]))
        for key, place in list(self._at_work.items()):
            limit = self.search.config.sweep.trial_timeout + _GRACE_AFTER_TIMEOUT
            limit += 0 if place.pid else longest_start(self.search.config)
            if now - place.heard_at <= limit or place.is_hung:
                continue
            there = (place.node, place.pid) if place.pid else whereabouts(place.actor)
            if there is not None:
                _log.error("trial %s says nothing and did not end itself: its worker is killed", key)
                self._at_work[key] = replace(place, is_hung=True)
                kill_worker(*there)

    def _ask_for_nodes(self) -> None:
        """Ask an autoscaler for the room that is lacking, if the sweep is to."""
        if self._growth is None:
            return
        may_have = math.inf if self._broker is None else self._broker.room
        if may_have is None:  # the broker has not yet said what others leave
            return self._growth.give_way()
        cluster, selector = self._nodes.hoped_for
        there = min(cluster.room_for(share_of(self.search.config)), may_have)
        self._growth.want(max(most_at_once(self.search, len(self._live)) - int(there), 0), selector)

    def _look_at_gpus(self) -> None:
        """Say on which nodes trials are at work. One that has not yet reported, as epochs may be long, is looked up."""
        if self._gpus is None:
            return
        for key, place in self._at_work.items():
            if not place.node and (there := whereabouts(place.actor)) is not None:
                self._at_work[key] = replace(place, node=there[0])
        nodes = {place.node for place in self._at_work.values() if place.node}
        self._gpus.look_at({node: self._nodes.name(node) for node in nodes})

    @contextmanager
    def ends_the_sweep(self) -> Iterator[None]:
        """Whatever goes wrong outside the trials ends the sweep; Ray's loop would hide the exception in one of its own."""
        try:
            yield
        except OSError as error:
            self.trouble = self.trouble or f"{error.filename or self.search.ledger.path}: {error.strerror or error}"
        except LedgerError as error:
            self.taken_over = error if isinstance(error, TakenOverError) else None
            self.trouble = self.trouble or str(error)
        except Exception as error:  # noqa: BLE001 (it is told, and its trace is in the log)
            _log.exception("the sweep ends")
            self.trouble = self.trouble or str(UndecidedError.of(error))

    def _lost(self, key: TrialKey, reason: str, error: str, traceback: str) -> None:
        record = self.search.state.trials[key]
        larger = self._nodes.cluster.larger(record.share or share_of(self.search.config)) if reason == "oom" else None
        self._keep(key, traceback or error)
        if self.search.lost(key, reason, error, larger):
            more = f" with {larger.cpus:g} CPUs and {larger.gpus:g} GPUs" if larger else ""
            _log.warning(
                "trial %s lost its worker (%s: %s); it goes on from its checkpoint%s", key, reason, error, more
            )

    def _failed(self, key: TrialKey, reason: str, error: str, traceback: str) -> None:
        self._keep(key, traceback or error)
        self.search.failed(key, reason, error)

    def _failed_or_moved(
        self, key: TrialKey, reason: str, error: str, traceback: str, node: str, *, is_surroundings: bool = False
    ) -> None:
        """A trial has failed, unless it is the node's doing: then it is to be tried on another."""
        if self._nodes.is_to_blame(key, node, error, is_surroundings=is_surroundings):
            self._lost(key, "node", self._at(node, error), traceback)
        else:
            self._failed(key, reason, error, traceback)

    def _is_one_node_s(self, key: TrialKey, message: dict[str, Any]) -> bool:
        """Whether trouble with the sweep's folder is one node's, as far as can be seen from here."""
        is_full = any(os.strerror(number) in message["error"] for number in (errno.ENOSPC, errno.EDQUOT))
        if is_full or sweep_trouble(self._folder, self._remote, self.search.state.header.id):
            return False
        return self._nodes.is_to_blame(key, message["node"], message["error"], is_surroundings=True)

    def _at(self, node: str, error: str) -> str:
        return f"node {self._nodes.name(node)}: {error}"[:300]

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
            self._is_idle = False
            self._tell_broker()
            self._at_work.pop(key, None)
            is_lost = self.search.state.trials[key].status in (TrialStatus.PRUNED, TrialStatus.FAILED)
            if is_lost and not self.trouble:  # in trouble, the end may not have reached the disk
                for checkpoint in [*checkpoints(self._trial_folder(key)), *self._trial_folder(key).glob(".epoch-*")]:
                    shutil.rmtree(checkpoint, ignore_errors=True)
                if self._remote is not None:
                    self._removals.submit(_remove_from_store, self._remote, str(key))

    def close(self) -> None:
        """Wait until nothing is being removed any more."""
        self._removals.shutdown()

    def _trial_folder(self, key: TrialKey) -> Path:
        return self._folder / "trials" / str(key)


def _remove_from_store(remote: RemoteSweep, label: str) -> None:
    """Remove the checkpoints of a trial that is lost to the search: nothing is ever decided by them."""
    try:
        drop_checkpoints(remote.open(), remote.sweep, label)
    except (OSError, ValueError) as error:
        _log.warning("the checkpoints of trial %s stay in the store: %s", label, error)


def most_at_once(search: Search, at_work: int) -> int:
    """Trials at once that a sweep could have, were there room, with so many at work now."""
    settings = search.config.sweep
    limits = [limit for limit in (settings.autoscale_to, settings.max_concurrent) if limit is not None]
    return min([at_work + search.startable(), *limits])


def key_of(trial: Trial) -> TrialKey:
    """Which of the sweep's trials one of Ray's is."""
    arm, number = trial.config["key"]
    return TrialKey(arm, number)


def _without_ids(text: str) -> str:
    """What Ray says of a dead worker, the same for every worker that died of the same."""
    return re.sub(r"\b(pid|actor_id|ip|namespace|name): \S+ ?|\b[0-9a-f]{16,}\b", "", text)
