"""Ray: what its nodes have, and whether trials can be had there."""

import contextlib
import fcntl
import gc
import logging
import math
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Ray reads these at import or start; what the user has set wins.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # no CSV, JSON and TensorBoard copies of the ledger
os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "3600")  # its snapshots are of no use to us
os.environ.setdefault("TUNE_MAX_PENDING_TRIALS_PG", "1000")  # how many are out is ours to say; with fewer, workers idle
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # a trial without a GPU leaves CUDA_VISIBLE_DEVICES

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tune_topkd.config import SweepConfig
from tune_topkd.sweep.worker import Worker
from tune_topkd.trials import LEDGER_FILE
from tune_topkd.trials import Share

LONGEST_START_OF_A_WORKER = 120.0
"""Seconds that a node has for its first worker."""
LONGEST_SILENCE_OF_THE_HEAD = 25.0
"""Seconds without an answer after which Ray's head counts as lost."""

_SECONDS_BETWEEN_KNOCKS = 2.0
_SCRATCH_PREFIX = "ttk-"
_OWNER_FILE = "owner"


class ResourceError(ValueError):
    """The cluster can never give a trial what it asks for, or cannot be reached."""


@dataclass(frozen=True)
class Cluster:
    """A running Ray that this process is attached to, as what its nodes have."""

    nodes: tuple[Share, ...]

    @classmethod
    @contextmanager
    def attached(cls, address: str | None = None, on_loss: Callable[[str], None] | None = None) -> Iterator["Cluster"]:
        """Start a private Ray on this machine, or attach to the one at `address`; let go of it at the end.

        Args:
            address: HOST:PORT of a Ray head.
            on_loss: called on a thread, with what happened, when Ray's head is gone: every call of Ray then blocks, and
                after a minute it ends this process without a word, so this has to end it. By default the message goes
                to stderr, and the exit code is 2.

        Raises:
            ResourceError: nothing answers at `address`.
        """
        if address:
            check_address(address)
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        with scratch_folder() as scratch:
            if address:
                options |= {"address": address}
            else:
                own = os.environ.get("RAY_TMPDIR") or scratch
                options |= {"address": "local", "include_dashboard": False, "_temp_dir": own}
            try:
                ray.init(**options)
            except (ConnectionError, ValueError, RuntimeError) as error:
                what = f"--address {address}: no Ray cluster answers there" if address else "Ray cannot be started"
                raise ResourceError(f"{what}: {error}") from error
            watch = _HeadWatch(on_loss or _die)
            try:
                yield cls.now()
            finally:
                watch.stop()
                _shutdown()

    @classmethod
    def now(cls) -> "Cluster":
        """The nodes there are at this moment."""
        return cls(tuple(resources(node) for node in ray.nodes() if node["Alive"]))

    def room(self, config: SweepConfig) -> int:
        """How many trials fit at once.

        Raises:
            ResourceError: not even one does.
        """
        share = share_of(config)
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
        return sum(fitting(node, share) for node in self.nodes)

    def larger(self, share: Share) -> Share | None:
        """The next larger share of a node: twice as much of what a trial shares with others; none if it has all.

        Trials on a node share its memory, or a GPU's, in proportion to what they were given.
        """
        cpus, gpus = 2 * share.cpus, min(2 * share.gpus, 1.0) if share.gpus < 1 else share.gpus
        candidates = [Share(cpus, gpus), Share(share.cpus, gpus), *(Share(n.cpus, gpus) for n in self.nodes)]
        return next((c for c in candidates if c > share and self.room_for(c)), None)


def share_of(config: SweepConfig) -> Share:
    """What each trial is given of a node."""
    cpus, gpus = config.sweep.cpus_per_trial, config.sweep.gpus_per_trial
    assert not isinstance(cpus, str), "auto is measured before a sweep begins"
    assert not isinstance(gpus, str), "auto is measured before a sweep begins"
    return Share(cpus, gpus)


def trial_part(share: Share) -> dict[str, Any]:
    """What a trial is told of its share: the fields of a `TrialConfig`."""
    return {"threads": max(int(share.cpus), 1), "gpu_share": min(share.gpus, 1.0)}


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


def check_nodes(worker: Worker, folder: Path, share: Share) -> None:
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

    nodes = [node for node in ray.nodes() if node["Alive"] and fitting(resources(node), share)]
    arguments = ray.cloudpickle.dumps(worker), str(folder), LEDGER_FILE
    answers = {}
    for node in nodes:
        there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        answers[ray.remote(num_cpus=0, scheduling_strategy=there)(look).remote(*arguments)] = node["NodeName"]
    try:
        for answer, node in zip(
            ray.get(list(answers), timeout=LONGEST_START_OF_A_WORKER), answers.values(), strict=True
        ):
            if answer:
                raise ResourceError(f"node {node}: {answer}")
    except (ray.exceptions.RayError, TimeoutError) as error:
        raise ResourceError(f"a node cannot start a worker: {' '.join(str(error).split())[:300]}") from error


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


class _HeadWatch:
    """A thread that knocks at Ray's head now and then."""

    def __init__(self, on_loss: Callable[[str], None]) -> None:
        self._head = ray.get_runtime_context().gcs_address
        self._on_loss = on_loss
        self._stopping = threading.Event()
        threading.Thread(target=self._watch, name="ray-head-watch", daemon=True).start()

    def stop(self) -> None:
        """Look no more."""
        self._stopping.set()

    def _watch(self) -> None:
        host, _, port = self._head.rpartition(":")
        answered = time.monotonic()
        while not self._stopping.wait(_SECONDS_BETWEEN_KNOCKS):
            try:
                socket.create_connection((host.strip("[]"), int(port)), timeout=3).close()
                answered = time.monotonic()
            except OSError as error:
                if time.monotonic() - answered > LONGEST_SILENCE_OF_THE_HEAD and not self._stopping.is_set():
                    self._on_loss(f"Ray's head at {self._head} is gone: {error.strerror or error}")
                    return


def _die(message: str) -> None:
    sys.stderr.write(f"error: {message}\n")
    sys.stderr.flush()
    os._exit(2)


@contextmanager
def scratch_folder() -> Iterator[str]:
    """A folder in the system's temporary folder for as long as this lasts; those that killed processes left are removed."""
    base = tempfile.gettempdir()  # Ray's sockets lie below it, and their paths have at most 107 bytes
    base = base if len(base) <= 30 else "/tmp"  # noqa: S108
    for left in Path(base).glob(f"{_SCRATCH_PREFIX}*/{_OWNER_FILE}"):
        with contextlib.suppress(OSError), open(left, "rb") as stream:  # another user's, or one just removed
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(left.parent, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=_SCRATCH_PREFIX, dir=base))
    try:
        with open(folder / "claim", "wb") as owner:
            fcntl.flock(owner, fcntl.LOCK_EX)  # held until this process is gone
            (folder / "claim").rename(folder / _OWNER_FILE)  # nobody sees it unlocked
            yield str(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


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


def resources(node: dict[str, Any]) -> Share:
    """What one of Ray's nodes has."""
    return Share(node["Resources"].get("CPU", 0.0), node["Resources"].get("GPU", 0.0))


def fitting(node: Share, share: Share) -> int:
    """How many trials of this share fit on a node at once."""
    by_cpu = math.floor(node.cpus / share.cpus + 1e-9)
    if share.gpus == 0:
        return by_cpu
    by_gpu = node.gpus * math.floor(1 / share.gpus + 1e-9) if share.gpus <= 1 else node.gpus // share.gpus
    return min(by_cpu, int(by_gpu))
