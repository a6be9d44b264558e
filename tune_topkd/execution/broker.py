"""A sweep's side of the broker that shares a cluster among sweeps; `sharing` has the rule and the broker itself.

The broker is a detached actor in a namespace of its own: the first sweep begins it, whoever misses it begins it again,
and it ends with the last sweep. No sweep depends on it: one that can have none goes on as if it were alone.
"""

import logging
import math
import threading
import time
from collections.abc import Callable
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray

from tune_topkd.execution import sharing
from tune_topkd.execution.cluster import in_one_line
from tune_topkd.ledger import Share

NAMESPACE, NAME = "tune_topkd", "broker-2"
"""Of the actor; the number is that of what it is asked and answers."""
PATIENCE = 30.0
"""Seconds without an answer after which a sweep takes what it finds."""

_SECONDS_BETWEEN_REPORTS = 1.0
_SECONDS_WHEN_DUE = 0.3
_LONGEST_ANSWER = 4.0
_LONGEST_END = 8.0
_LONGEST_REFUSAL = 3.0  # seconds of errors that do not pass by themselves: one may be the end of an earlier broker
_COMES_BACK = (ray.exceptions.GetTimeoutError, ray.exceptions.RayActorError)
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
            note: is told of other sweeps that come and go, and of a broker that cannot be had, on the thread that calls
                `tell`.
        """
        self._sweep = sweep
        self._about: dict[str, Any] = {"size": tuple(share), "priority": priority}
        self._note = note
        self._lock = threading.Lock()
        self._news, self._is_closing = threading.Event(), threading.Event()
        self._at_work = self._most = self._told = self._ended = 0
        self._used, self._used_at = 0.0, time.monotonic()
        self._room: int | None = 0
        """Trials at once; None without a broker."""
        self._answer: sharing.Answer | None = None
        self._sweeps_noted, self._trouble = 1, ""
        self._answered_at = time.monotonic()
        self._handle: Any = None
        self._thread = threading.Thread(target=self._run, name="broker-client", daemon=True)

    @contextmanager
    def reporting(self) -> Iterator["Client"]:
        """As long as this lasts, report to the broker; then give back all room."""
        self._about["job"] = _job()
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
            self._use()
            room = self._room
            wants = most > self._most and room is not None and at_work >= room
            has_ended = at_work < self._told and at_work >= (room or 0)
            gives = self._is_shared and (has_ended or (most < self._most and most <= at_work))
            self._ended += max(self._told - at_work, 0)
            self._at_work = self._told = at_work
            self._most = most
            sweeps = self._answer[1] if self._answer is not None else 1
            trouble, self._trouble = self._trouble, ""
        if wants or gives:
            self._news.set()  # others may be waiting for a place, or this sweep for one
        if trouble:
            self._note(f"the sweep takes what room it finds on the cluster, whatever its priority: {trouble}")
        if sweeps != self._sweeps_noted and room is not None:
            self._sweeps_noted = sweeps
            who = f"{sweeps} sweeps share the cluster" if sweeps > 1 else "alone on the cluster"
            self._note(f"{who}; trials at once: {room}")

    @property
    def room(self) -> float | None:
        """Trials at once that the sweep may have beside others; infinite without a broker, None before its first answer."""
        with self._lock:
            if self._room is None:
                return math.inf
            return self._room if self._answer is not None else None

    def has_room(self) -> bool:
        """Whether another trial may be started."""
        with self._lock:
            return self._room is None or self._at_work < self._room

    def take(self) -> bool:
        """Take a place, if there is one, before a trial is proposed for it; `tell` says what has become of it."""
        with self._lock:
            has_room = self._room is None or self._at_work < self._room
            self._use()
            self._at_work += has_room
            return has_room

    def is_full(self) -> bool:
        """Whether the sweep has all that it may have, or can use: then the place of a trial that ends is another sweep's."""
        with self._lock:
            return self._is_shared and self._at_work >= min(self._room or 0, self._most)

    @property
    def _is_shared(self) -> bool:
        return self._room is not None and self._answer is not None and self._answer[1] > 1

    def _use(self) -> None:
        """Add up what the trials at work have used until now."""
        now = time.monotonic()
        self._used += self._at_work * (now - self._used_at)
        self._used_at = now

    def _run(self) -> None:
        while not self._is_closing.is_set():
            is_due = self._report()
            self._news.wait(_SECONDS_WHEN_DUE if is_due else _SECONDS_BETWEEN_REPORTS)
            self._news.clear()
        try:
            if self._handle is not None:
                ray.get(self._handle.leave.remote(self._sweep), timeout=_LONGEST_ANSWER)
        except ray.exceptions.RayActorError:
            _log.debug("the broker has ended, as it does with its last sweep")
        except Exception as error:  # noqa: BLE001 (the room is given back all the same)
            _log.info("the broker was not told of the end and sees it when this process ends: %r", error)

    def _report(self) -> bool:
        """Report, and take the answer; whether the next report should come soon."""
        with self._lock:
            self._use()
            had = self._room if self._answer is not None else None
            stand: dict[str, Any] = {
                "at_work": self._at_work,
                "most": self._most,
                "used": self._used,
                "ended": self._ended,
            }
            stand |= {"room": had, "ahead": self._answer[2] if self._answer is not None else 0.0}
        try:
            if self._handle is None:
                self._handle = _broker()
            answer = ray.get(self._handle.report.remote(self._sweep, **self._about, **stand), timeout=_LONGEST_ANSWER)
        except Exception as error:  # noqa: BLE001 (a sweep never depends on the broker)
            if not isinstance(error, ray.exceptions.GetTimeoutError):
                self._handle = None  # the next report looks for another one
            patience = PATIENCE if isinstance(error, _COMES_BACK) else _LONGEST_REFUSAL
            is_over = time.monotonic() - self._answered_at > patience
            with self._lock:
                if self._room is not None and is_over:
                    self._room, self._trouble = None, f"no broker shares it: {in_one_line(error)}"
            return False
        with self._lock:
            self._answer, self._room, self._answered_at = answer, answer[0], time.monotonic()
            has_given = had is not None and self._room < had > self._at_work  # places that others wait for
        return answer[3] or has_given


def _job() -> str:
    """Ray's name of this process as a driver."""
    return str(ray.get_runtime_context().get_job_id())


def _broker() -> Any:
    """The cluster's broker, begun if there is none."""
    ray.cloudpickle.register_pickle_by_value(sharing)  # its process need not load all of this package
    try:
        options = {"name": NAME, "namespace": NAMESPACE, "lifetime": "detached", "get_if_exists": True, "num_cpus": 0}
        on_the_head = {"node:__internal_head__": 0.001}  # a node that goes away would take it along
        return ray.remote(sharing.Broker).options(**options, resources=on_the_head).remote()
    finally:
        ray.cloudpickle.unregister_pickle_by_value(sharing)
