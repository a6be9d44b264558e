"""A sweep's side of the broker that shares a cluster among sweeps; `sharing` has the rule and the broker itself.

The broker is a detached actor in a namespace of its own: the first sweep begins it, and whoever misses it begins it again.
No sweep depends on it: one that gets no answer for `PATIENCE` seconds goes on as if it were alone.
"""

import logging
import threading
import time
from collections.abc import Callable
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray

from tune_topkd.execution import sharing
from tune_topkd.ledger import Share

NAMESPACE, NAME = "tune_topkd", "broker-1"
"""Of the actor; the number is that of what it is asked and answers."""
PATIENCE = 10.0
"""Seconds without an answer after which a sweep takes what it finds."""

_SECONDS_BETWEEN_REPORTS = 1.0
_LONGEST_ANSWER = 4.0
_LONGEST_END = 8.0
_log = logging.getLogger(__name__)


class Client:
    """What a sweep is told by the broker: whether there is room for another trial of it.

    **Threads.** One of its own reports to the broker; the sweep's own calls the methods and never waits for the broker.
    """

    def __init__(self, sweep: str, share: Share, priority: float, note: Callable[[str], None]) -> None:
        """Nothing is asked yet.

        Args:
            sweep: its id.
            share: what one of its trials takes.
            priority: above 0.
            note: is told of other sweeps that come and go, on the thread that calls `tell`.
        """
        self._about = sweep, tuple(share), priority
        self._note = note
        self._lock = threading.Lock()
        self._news, self._is_closing = threading.Event(), threading.Event()
        self._at_work = self._most = 0
        self._room: int | None = 0
        """Trials at once; None without a broker."""
        self._told: int | None = None
        """What the sweep has said of its trials, while the answer is on its way: it starts no more until that is here."""
        self._had: int | None = None
        self._sweeps = self._sweeps_noted = 1
        self._answered_at = time.monotonic()
        self._handle: Any = None
        self._thread = threading.Thread(target=self._run, name="broker-client", daemon=True)

    @contextmanager
    def reporting(self) -> Iterator["Client"]:
        """As long as this lasts, report to the broker; then give back all room."""
        self._thread.start()
        try:
            yield self
        finally:
            self._is_closing.set()
            self._news.set()
            self._thread.join(_LONGEST_END)
            self._handle = None

    def tell(self, at_work: int, most: int) -> None:
        """Say how the sweep stands.

        Args:
            at_work: trials that it has, those included that are starting.
            most: trials at once that it can use.
        """
        with self._lock:
            can_give = self._room is not None and at_work < self._at_work and at_work >= self._room
            wants = most > self._most
            gives = (most < self._most and most <= at_work) or can_give
            self._at_work, self._most = at_work, most
            sweeps, room = self._sweeps, self._room
        if wants or gives:
            self._news.set()  # others may be waiting for a place, or this sweep for one
        if sweeps != self._sweeps_noted and room is not None:
            self._sweeps_noted = sweeps
            who = f"{sweeps} sweeps share the cluster" if sweeps > 1 else "alone on the cluster"
            self._note(f"{who}; trials at once: {room}")

    def has_room(self) -> bool:
        """Whether another trial may be started."""
        with self._lock:
            return self._has_room()

    def take(self) -> bool:
        """Take a place, if there is one, before a trial is proposed for it; `tell` says what has become of it."""
        with self._lock:
            has_room = self._has_room()
            self._at_work += has_room
            return has_room

    def _has_room(self) -> bool:
        if self._room is None:
            return True
        return self._at_work < (self._room if self._told is None else min(self._room, self._told))

    def is_full(self) -> bool:
        """Whether the sweep has all that it may have, or can use: then the place of a trial that ends is another sweep's."""
        with self._lock:
            is_shared = self._sweeps > 1 and self._room is not None
            return is_shared and self._at_work >= min(self._room or 0, self._most)

    def _run(self) -> None:
        while not self._is_closing.is_set():
            self._report()
            self._news.wait(_SECONDS_BETWEEN_REPORTS)
            self._news.clear()
        try:
            if self._handle is not None:
                ray.get(self._handle.leave.remote(self._about[0]), timeout=_LONGEST_ANSWER)
        except Exception as error:  # noqa: BLE001 (the room is given back all the same)
            _log.info("the broker was not told of the end and sees it in %g s: %r", sharing.LEASE, error)

    def _report(self) -> None:
        with self._lock:
            state = self._at_work, self._most, self._had
            self._told = self._at_work
        try:
            if self._handle is None:
                self._handle = _broker()
            room, sweeps = ray.get(self._handle.report.remote(*self._about, *state), timeout=_LONGEST_ANSWER)
        except Exception as error:  # noqa: BLE001 (a sweep never depends on the broker)
            self._handle = None
            with self._lock:
                self._told = None
                is_lost = self._room is not None and time.monotonic() - self._answered_at > PATIENCE
                if is_lost:
                    self._room = None
            if is_lost:
                _log.warning("no broker answers; the sweep takes what room it finds: %r", error)
            return
        with self._lock:
            self._told = None
            self._room, self._sweeps, self._had = room, sweeps, room
            self._answered_at = time.monotonic()


def _broker() -> Any:
    """The cluster's broker, begun if there is none."""
    ray.cloudpickle.register_pickle_by_value(sharing)  # its process need not load all of this package
    try:
        options = {"name": NAME, "namespace": NAMESPACE, "lifetime": "detached", "get_if_exists": True, "num_cpus": 0}
        on_the_head = {"node:__internal_head__": 0.001}  # a node that goes away would take it along
        return ray.remote(sharing.Broker).options(**options, resources=on_the_head).remote()
    finally:
        ray.cloudpickle.unregister_pickle_by_value(sharing)
