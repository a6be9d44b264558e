"""Which of Ray's nodes trials may go to: each is looked at before the first, and one that only fails them is set aside.

A node can lack what the others have: the shared folder, the data, the code, a GPU that works. It fails its trials within
seconds, is free again at once, and would draw all the rest of the sweep. So what a trial fails of where no trial has yet
got anywhere, or what is the surroundings' by its kind, counts against the node as long as there is another one to try.
"""

import contextlib
import os
import re
import signal
import socket
import time
from collections import defaultdict
from collections.abc import Callable
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tune_topkd.config import SweepConfig
from tune_topkd.execution.cluster import Cluster
from tune_topkd.execution.cluster import ResourceError
from tune_topkd.execution.cluster import resources
from tune_topkd.execution.growth import LONGEST_WAIT_FOR_A_NODE
from tune_topkd.execution.growth import Growth
from tune_topkd.execution.growth import Selector
from tune_topkd.execution.remote import RemoteSweep
from tune_topkd.execution.worker import Worker
from tune_topkd.execution.worker import sweep_trouble
from tune_topkd.ledger import Share
from tune_topkd.ledger import TrialKey

LONGEST_START_OF_A_WORKER = 120.0
"""Seconds that a node has for its first worker, if the sweep does not say."""
PATIENCE_WITH_THE_REST = 5.0
"""Seconds that a sweep waits, once a node is ready, for those that have not yet answered: they may be about to die."""
MOST_MOVES = 3
"""How often one trial is tried elsewhere for what it failed of."""

_SECONDS_BETWEEN_LOOKS = 30.0  # at a node that was not as it must be: its disks may be mounted after Ray has started
_SECONDS_BETWEEN_LOOKS_FOR_ONE = 1.0  # where there is none
_SECONDS_BEFORE_ANOTHER_TRY = 2.0  # at one that could not be asked
_NODE_ID_LABEL = "ray.io/node-id"
_NO_WORKER = "it cannot start a worker"
_BUSY = "the machine may be too busy, or the disk slow that its packages are on"


class Nodes:
    """The nodes of the cluster that this process is attached to, as far as trials are concerned.

    **Threads.** Not thread-safe: one thread calls it.
    """

    def __init__(
        self,
        worker: Worker,
        folder: Path,
        sweep_id: str,
        share: Share,
        note: Callable[[str], None],
        remote: RemoteSweep | None = None,
        longest_start: float | None = None,
    ) -> None:
        """Nothing is looked at yet.

        Args:
            worker: what runs the trials.
            folder: the sweep's, which all nodes must see, but with `remote`.
            sweep_id: of the sweep, by its ledger.
            share: the least that a trial is given.
            note: is told of each node that trials do not go to, and why.
            remote: where the sweep lies, if that is a store.
            longest_start: seconds that a node has for its first worker; by default `LONGEST_START_OF_A_WORKER`.
        """
        self._longest_start = longest_start or LONGEST_START_OF_A_WORKER
        self._arguments = ray.cloudpickle.dumps(worker), str(folder), sweep_id, remote
        self._share = share
        self._note = note
        self._asked: dict[str, tuple[Any, float]] = {}
        self._ready: set[str] = set()
        self._not_ready: dict[str, str] = {}
        self._next_look: dict[str, float] = {}
        self._aside: dict[str, str] = {}
        self._names: dict[str, str] = {}
        self._blame = _Blame()

    def wait_for_one(
        self, growth: Growth | None = None, places: int = 1, is_over: Callable[[], bool] = lambda: False
    ) -> None:
        """Look at all nodes until one is ready, and the others are too or have had their time.

        Args:
            growth: asks for nodes as long as there is none; None waits for none.
            places: that it asks for.
            is_over: whether there is nothing to wait for any more.

        Raises:
            ResourceError: none is; with the reason of one.
        """
        if growth is not None:
            self._wait_until_one_comes(growth, places, is_over)
        began = gave_way = time.monotonic()
        ready_since = None
        while not is_over():
            alive = self.look()
            now = time.monotonic()
            if growth is not None and now - gave_way > _SECONDS_BETWEEN_LOOKS_FOR_ONE:
                growth.give_way()
                gave_way = now
            if self._ready and ready_since is None:
                ready_since = now
            if ready_since is not None and (not self._asked or now - ready_since > PATIENCE_WITH_THE_REST):
                return
            answers = [self._not_ready.get(node, _NO_WORKER) for node in alive]
            has_hope = any(answer.startswith(_NO_WORKER) for answer in answers)
            if not self._ready and (not has_hope or now - began > self._longest_start):
                late = f"no node starts a worker in {self._longest_start:g} s (sweep.start_timeout); {_BUSY}"
                raise ResourceError(self.set_aside or late)
            time.sleep(0.05)

    def _wait_until_one_comes(self, growth: Growth, places: int, is_over: Callable[[], bool]) -> None:
        began = time.monotonic()
        while not (self._alive() or is_over()):
            if time.monotonic() - began > LONGEST_WAIT_FOR_A_NODE:
                raise ResourceError(no_node_came(self._share))
            growth.want(places, [])
            time.sleep(_SECONDS_BETWEEN_LOOKS_FOR_ONE)

    def look(self) -> list[str]:
        """Ask each node that has not been asked, or is to be asked again, and take the answers that are there.

        Returns:
            The ids of the nodes that are large enough for a trial.
        """
        now = time.monotonic()
        alive = self._alive()
        self._ready &= set(alive)
        for node in alive:
            if node in self._ready or node in self._asked or now < self._next_look.get(node, 0.0):
                continue
            there = NodeAffinitySchedulingStrategy(node, soft=False)
            self._asked[node] = ray.remote(num_cpus=0, scheduling_strategy=there)(_look).remote(*self._arguments), now
        for node, (answer, since) in list(self._asked.items()):
            if ray.wait([answer], timeout=0)[0] or now - since > self._longest_start:
                del self._asked[node]
                self._take(node, answer)
        return list(alive)

    @property
    def cluster(self) -> Cluster:
        """What the nodes have that trials may go to."""
        return Cluster(tuple(resources(entry) for node, entry in self._alive().items() if node in self._usable))

    @property
    def placement(self) -> list[dict[str, str]] | None:
        """The label selector that keeps a trial's one bundle off the nodes it may not go to; None if it may go to all."""
        return _without(sorted(set(self._alive()) - self._usable)) or None

    @property
    def hoped_for(self) -> tuple[Cluster, Selector]:
        """The nodes that trials may go to, or may when they have answered; and the selector of nodes like these."""
        alive = self._alive()
        lacking = {node for node, why in self._not_ready.items() if not why.startswith(_NO_WORKER)}
        avoided = sorted(alive.keys() & (lacking | self._aside.keys()))
        return Cluster(tuple(resources(alive[node]) for node in alive.keys() - avoided)), _without(avoided)

    @property
    def set_aside(self) -> str:
        """The nodes that trials do not go to, and why; empty if there is none."""
        reasons = {n: why for n, why in (self._not_ready | self._aside).items() if n not in self._usable}
        return "; ".join(f"node {self._names[node]}: {why}" for node, why in reasons.items() if node in self._names)

    def reported(self, node: str) -> None:
        """A trial has got somewhere on this node."""
        self._blame.proven.add(node)

    def is_to_blame(self, key: TrialKey, node: str, error: str, *, is_surroundings: bool) -> bool:
        """Whether what a trial failed of counts against its node, which is then set aside, and not against the trial.

        Args:
            key: the trial.
            node: where it failed.
            error: in one line.
            is_surroundings: it is by its kind nothing that a trial's parameters bring about: a file that is missing.
        """
        others = self._usable - {node}
        if node not in self._names or not others:
            self._released(self._blame.is_the_trials(error))
            return False
        if not self._blame.counts(key, node, error, is_surroundings=is_surroundings):
            self._released(self._blame.is_the_trials(error))
            return False
        if node not in self._aside:
            self._aside[node] = error
            self._note(f"node {self._names[node]} is set aside, its trials go elsewhere: {error}")
        return True

    def name(self, node: str) -> str:
        """What Ray calls a node."""
        return self._names.get(node, node)

    @property
    def _usable(self) -> set[str]:
        return self._ready - set(self._aside)

    def _released(self, nodes: set[str]) -> None:
        for node in nodes & set(self._aside):
            del self._aside[node]
            self._note(f"node {self._names[node]} is used again: its trials fail of the same elsewhere")

    def _alive(self) -> dict[str, Any]:
        nodes = {n["NodeID"]: n for n in ray.nodes() if n["Alive"] and self._share.times_on(resources(n))}
        self._names |= {node: entry["NodeName"] for node, entry in nodes.items()}
        return nodes

    def _take(self, node: str, answer: Any) -> None:
        pause = _SECONDS_BETWEEN_LOOKS
        try:
            why = str(ray.get(answer, timeout=0))
        except (ray.exceptions.RayError, TimeoutError) as error:
            why = why_no_answer(error, self._longest_start)
            if not isinstance(error, ray.exceptions.RuntimeEnvSetupError):
                pause = _SECONDS_BEFORE_ANOTHER_TRY
        if not why:
            self._ready.add(node)
            if self._not_ready.pop(node, None) is not None:
                self._note(f"node {self._names[node]} is ready")
            return
        self._next_look[node] = time.monotonic() + pause
        was_told = self._not_ready.get(node)
        self._not_ready[node] = why
        if was_told is None and not why.startswith(_NO_WORKER):
            self._note(f"node {self._names[node]} gets no trials: {why}")


@dataclass
class _Blame:
    """What errors have been seen where: the judge between a trial and its node."""

    proven: set[str] = field(default_factory=set)
    """Nodes on which a trial has got somewhere."""
    moves: dict[tuple[TrialKey, str], list[str]] = field(default_factory=lambda: defaultdict(list))
    """The nodes that a trial has left because of an error, one for each time."""
    common: set[str] = field(default_factory=set)
    """Errors that are no node's own."""

    def counts(self, key: TrialKey, node: str, error: str, *, is_surroundings: bool) -> bool:
        """Whether an error counts against the node; it is then remembered as if the trial left it."""
        kind = _without_numbers(error)
        left = self.moves[key, kind]
        if kind in self.common or len(left) >= MOST_MOVES:
            return False
        if node in self.proven and not (is_surroundings and not left):
            return False
        left.append(node)
        return True

    def is_the_trials(self, error: str) -> set[str]:
        """Take an error as no node's own from now on: the nodes that it has counted against."""
        kind = _without_numbers(error)
        nodes = {node for (_, what), left in self.moves.items() if what == kind for node in left}
        if nodes:
            self.common.add(kind)
        return nodes


def _without(nodes: Sequence[str]) -> Selector:
    """The selector of all nodes but these."""
    return [{_NODE_ID_LABEL: f"!in({','.join(nodes)})"}] if nodes else []


def no_node_came(share: Share) -> str:
    """What a person is told when an autoscaler was asked in vain."""
    what = f"{share.cpus:g} CPUs and {share.gpus:g} GPUs"
    minutes = LONGEST_WAIT_FOR_A_NODE / 60
    return (
        f"no node with room for a trial, {what}, came within {minutes:g} minutes (sweep.autoscale_to); see what the "
        "cluster's autoscaler may add, and says: `ray status`"
    )


def longest_start(config: SweepConfig) -> float:
    """Seconds that a node has to start a worker of a sweep."""
    return config.sweep.start_timeout or LONGEST_START_OF_A_WORKER


def why_no_answer(error: Exception, patience: float) -> str:
    """What a person is told of a node whose worker was asked and gave no answer, by what Ray raised.

    Args:
        error: what Ray raised.
        patience: seconds that the worker was given.
    """
    if isinstance(error, ray.exceptions.RuntimeEnvSetupError):
        return f"Ray cannot set up the workers' runtime environment: {' '.join(str(error).split())[:300]}"
    if isinstance(error, ray.exceptions.GetTimeoutError):
        return f"{_NO_WORKER}: none was there after {patience:g} s (sweep.start_timeout); {_BUSY}"
    return f"{_NO_WORKER}: {' '.join(str(error).split())[:300]}"


def _without_numbers(error: str) -> str:
    """An error without what differs from one trial to the next: numbers, ids and addresses."""
    return re.sub(r"\b0x[0-9a-f]+\b|\b[0-9a-f]{16,}\b|\d+", "#", error)


def _look(pickled: bytes, folder: str, sweep_id: str, remote: RemoteSweep | None) -> str:
    """On a node: load the train function, and look for the place where the sweep lies. What is wrong, or nothing."""
    try:
        ray.cloudpickle.loads(pickled)
    except Exception as error:  # noqa: BLE001 (whatever importing raises is the answer)
        return f"the train function cannot be imported on the cluster's workers: {type(error).__name__}: {error}"
    return sweep_trouble(Path(folder), remote, sweep_id)


def is_node_loss(told: str, node: str) -> bool:
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


def whereabouts(actor: Any) -> tuple[str, int] | None:
    """The node and process of an actor that has not told them itself; None while Ray does not know."""
    if actor is None:
        return None
    known = ray._private.state.actors(actor._actor_id.hex())  # has no public name without the dashboard
    return (known["Address"]["NodeID"], known["Pid"]) if known.get("Pid") else None


def kill_worker(node: str, pid: int) -> None:
    """Kill a worker that does not end itself, on whichever node it is."""

    def kill() -> None:
        with contextlib.suppress(OSError):
            if b"ray" in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(pid, signal.SIGKILL)

    there = NodeAffinitySchedulingStrategy(node, soft=False)
    ray.remote(num_cpus=0, scheduling_strategy=there)(kill).remote()
