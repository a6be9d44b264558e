"""How sweeps share a cluster: how many trials each may have at once.

It is stride scheduling (Waldspurger and Weihl 1995), a kind of weighted fair queuing. Each sweep has a clock, which
advances by the part of the cluster that its trials hold, times seconds, divided by its priority; a place goes to the
sweep whose clock is furthest behind. So what a sweep misses because it is late is made up: shares hold for what was
used, not for what was offered. A place is charged the length of a trial in advance, or all places that come free at
one moment would go to one sweep.

The rule, `rooms`, is a function of what the cluster has and of what each sweep asks for. A `Broker` applies it: a Ray actor,
to which each sweep reports every second. Nothing is pre-empted: a sweep that has more trials at work than its room starts
none until enough of them have ended.

The broker's process is sent this module as it is, so it imports nothing but the standard library, and Ray where it runs.
"""

import math
import time
from collections.abc import Callable
from collections.abc import Collection
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field
from typing import Any

Size = tuple[float, float]
"""CPUs and GPUs, of a node or a trial."""
Answer = tuple[int, int, float, bool]
"""Trials at once that a sweep may have; how many sweeps there are; how far its clock is ahead, see `Book`; whether it is to
have a place more as soon as one comes free."""

SILENCE = 3.0
"""Seconds without a report after which the broker looks whether the sweep's driver is there."""
LEASE = 30.0
"""Seconds without a report after which a sweep whose driver is there keeps only the places of its trials at work."""
SETTLING = 10.0
"""Seconds that a broker which was begun again waits for all sweeps to say what they have."""
SHORTEST_HORIZON = 5.0
"""Seconds within which the clocks are brought together, where trials are shorter."""

_MEMORY = 4.0  # horizons' worth of its part: a sweep is owed at most so much
_STAYS = 0.5  # of a place: as much more must another sweep be owed to take one, since a worker has to start there
_SECONDS_BETWEEN_LOOKS = 2.0
_SLACK = 1e-9


@dataclass(frozen=True)
class Claim:
    """What a sweep asks for."""

    size: Size
    """What one of its trials takes."""
    priority: float
    """Above 0; of two sweeps that can use all they get, one of priority 3 has three times what one of 1 has."""
    most: int
    """Trials at once that it can use."""
    held: int = 0
    """Places that it has."""
    ahead: float = 0.0
    """How far its clock is ahead of the one furthest behind: what it has had more, in places for the horizon."""


def rooms(nodes: Sequence[Size], claims: Sequence[Claim]) -> list[int]:
    """How many trials each sweep may have at once.

    Every sweep gets one place, if there are enough, those that are furthest behind first. Each further place goes to
    the sweep that is furthest behind once those that it has got are charged, measured by the resource of which its
    trials take the largest part of the cluster. It ends when nobody can use what is left.

    Args:
        nodes: what each node has.
        claims: of all sweeps.

    Returns:
        Trials at once by claim; all of them fit on the nodes together.
    """
    free = [_Node(*node) for node in nodes]
    found = [0] * len(claims)
    sizes = [_dominant(nodes, claim.size) for claim in claims]

    def clock(number: int) -> tuple[float, int]:
        """Where a sweep's clock is in the middle of the next place that it would get."""
        claim, places = claims[number], found[number]
        stays = _STAYS if places < claim.held else 0.0
        return (claim.ahead + places + 0.5 - stays) * sizes[number] / claim.priority, number

    for number in sorted((n for n, claim in enumerate(claims) if claim.most > 0), key=clock):
        found[number] = int(_placed(free, claims[number].size))
    able = {number for number, claim in enumerate(claims) if 0 < found[number] < claim.most}
    while able:
        number = min(able, key=clock)
        if _placed(free, claims[number].size):
            found[number] += 1
        else:
            able.discard(number)
        if found[number] >= claims[number].most:
            able.discard(number)
    return found


def _dominant(nodes: Sequence[Size], size: Size) -> float:
    """The part of the cluster that a trial takes, of the resource of which it takes the largest part."""
    totals = [sum(column) for column in zip(*nodes, strict=True)] or [0.0, 0.0]
    return max((part / total for part, total in zip(size, totals, strict=True) if total), default=0.0) or 1.0


class _Node:
    """What is free on a node. A trial's part of a GPU lies on one GPU."""

    def __init__(self, cpus: float, gpus: float) -> None:
        self.cpus = cpus
        self.gpus = [1.0] * int(gpus)

    @property
    def left(self) -> tuple[float, float]:
        return sum(self.gpus), self.cpus

    def takes(self, size: Size) -> bool:
        cpus, gpus = size
        if self.cpus < cpus - _SLACK:
            return False
        if gpus > 1:
            return sum(gpu > 1 - _SLACK for gpu in self.gpus) >= gpus
        return not gpus or any(gpu >= gpus - _SLACK for gpu in self.gpus)

    def take(self, size: Size) -> None:
        cpus, gpus = size
        self.cpus -= cpus
        part = min(gpus, 1.0)
        for _ in range(math.ceil(gpus)):
            fullest = min(gpu for gpu in self.gpus if gpu >= part - _SLACK)
            self.gpus[self.gpus.index(fullest)] -= part


def _placed(free: Sequence[_Node], size: Size) -> bool:
    """Put a trial on the fullest node that has room for it, so that large ones find room too; whether there is one."""
    node = min((node for node in free if node.takes(size)), key=lambda node: node.left, default=None)
    if node is not None:
        node.take(size)
    return node is not None


@dataclass
class _Entry:
    """What is known of a sweep, as of its last report."""

    clock: float
    """What it has had for its priority: the sum of its trials' parts of the cluster, times seconds."""
    used: float
    """Place-seconds that are in the clock."""
    job: str = ""
    size: Size = (1.0, 0.0)
    part: float = 1.0
    """Of the cluster, that a trial takes."""
    priority: float = 1.0
    most: int = 0
    at_work: int = 0
    ended: int = 0
    heard_at: float = 0.0
    granted: int = 0
    """Places that it may use as far as it knows, and those that it uses."""

    def now(self, now: float) -> float:
        """Its clock: trials that are at work are so until the next report says that they are not."""
        return self.clock + self.at_work * (now - self.heard_at) * self.part / self.priority

    @property
    def length(self) -> float:
        """Seconds that a trial of it holds a place, on average."""
        return self.used / max(self.ended + self.at_work, 1)

    @property
    def is_wanting(self) -> bool:
        return self.at_work < self.most


@dataclass
class Book:
    """Who has how much room. **Threads.** Not thread-safe.

    Clocks are compared with the one that is furthest behind among sweeps that want more than they have. A sweep that
    comes, and one that has all that it can use, is set to that one: nobody is owed for time in which it asked for
    nothing.
    """

    clock: Callable[[], float] = time.monotonic
    _entries: dict[str, _Entry] = field(default_factory=dict)
    _last: float = 0.0
    """The clock that is furthest behind."""
    _settled_at: float = -math.inf

    @property
    def is_empty(self) -> bool:
        """Whether there is no sweep."""
        return not self._entries

    def silent(self) -> list[str]:
        """The jobs of sweeps that have not reported for a while."""
        now = self.clock()
        return [entry.job for entry in self._entries.values() if now - entry.heard_at > SILENCE]

    def gone(self, jobs: Collection[str]) -> None:
        """Jobs have ended, and all of their trials with them: their room is the others'."""
        self._entries = {name: entry for name, entry in self._entries.items() if entry.job not in jobs}

    def leave(self, sweep: str) -> None:
        """A sweep has ended: its room is the others'."""
        self._entries.pop(sweep, None)

    def report(
        self,
        nodes: Sequence[Size],
        sweep: str,
        *,
        size: Size,
        priority: float,
        at_work: int,
        most: int,
        used: float,
        ended: int,
        room: int | None = None,
        ahead: float = 0.0,
        job: str = "",
    ) -> Answer:
        """Take how a sweep stands.

        The sum of what sweeps have been told never is more than the cluster has, but for trials that are at work already.

        Args:
            nodes: what each of the cluster's nodes has.
            sweep: its id.
            size: what one of its trials takes.
            priority: the sweep's.
            at_work: trials that it has, those included whose workers are still starting.
            most: trials at once that it can use.
            used: seconds that its trials have been at work until now, added up, since it began to report.
            ended: trials that have ended since then.
            room: what it may have as far as it knows: the last answer that has come to it; None before the first.
            ahead: how far ahead its clock was by that answer.
            job: Ray's name of the process that drives it.
        """
        now = self.clock()
        if room is not None and not self._entries:
            self._settled_at = now + SETTLING  # the others are on their way here, and nothing is known of their trials
        entry = self._entries.get(sweep) or _Entry(clock=self._last + ahead, used=used)
        self._entries[sweep] = entry
        part = _dominant(nodes, size)
        entry.clock += max(used - entry.used, 0.0) * part / priority
        entry.job, entry.size, entry.part, entry.priority = job, size, part, priority
        entry.most, entry.at_work, entry.used, entry.ended, entry.heard_at = most, at_work, used, ended, now
        is_settled = now >= self._settled_at
        if len(self._entries) == 1:
            self._last = entry.clock if is_settled else self._last  # where the others' clocks were is told beside it
            allowed, target = most, most
        else:
            self._compare(now)
            target = self._target(nodes, sweep, now)
            others = [(other.size, other.granted) for name, other in self._entries.items() if name != sweep]
            allowed = min(target, _beside(nodes, others, size))
        if not is_settled:
            allowed = min(allowed, at_work if room is None else room)
        entry.granted = max(at_work, allowed, room or 0)
        return allowed, len(self._entries), entry.clock - self._last, target > allowed

    def _compare(self, now: float) -> None:
        """Find the clock that is furthest behind, and bring those that are too far from it nearer."""
        for entry in self._entries.values():
            if now - entry.heard_at > LEASE:
                entry.most = entry.granted = entry.at_work
        entries = list(self._entries.values())
        wanting = [entry.now(now) for entry in entries if entry.is_wanting]
        self._last = max(self._last, min(wanting) if wanting else max(entry.now(now) for entry in entries))
        furthest = self._last + _MEMORY * self._horizon() / sum(entry.priority for entry in entries)
        for entry in entries:
            there = entry.now(now)
            nearest = there if entry.is_wanting else self._last
            entry.clock += min(max(there, nearest), furthest) - there

    def _horizon(self) -> float:
        return max(SHORTEST_HORIZON, *(entry.length for entry in self._entries.values()))

    def _target(self, nodes: Sequence[Size], sweep: str, now: float) -> int:
        """What a sweep is to have once the others have given back what is not theirs."""
        horizon, claims = self._horizon(), []
        for entry in self._entries.values():
            ahead = (entry.now(now) - self._last) * entry.priority / entry.part / horizon
            claims.append(Claim(entry.size, entry.priority, entry.most, max(entry.granted, entry.at_work), ahead))
        return rooms(nodes, claims)[list(self._entries).index(sweep)]


def _beside(nodes: Sequence[Size], others: Sequence[tuple[Size, int]], size: Size) -> int:
    """How many trials of a size fit beside those of others."""
    free = [_Node(*node) for node in nodes]
    for other, count in sorted(others, key=lambda item: _dominant(nodes, item[0]), reverse=True):
        for _ in range(count):
            if not _placed(free, other):
                break
    found = 0
    while _placed(free, size):
        found += 1
    return found


class Broker:
    """The book as a Ray actor, with the nodes that its cluster has. It ends with the last sweep."""

    def __init__(self) -> None:
        self._book = Book()
        self._nodes: list[Size] = []
        self._looked_at = -math.inf

    def report(self, sweep: str, **stand: Any) -> Answer:
        """As `Book.report`, without the nodes."""
        import ray
        from ray._private import state

        now = time.monotonic()
        if now - self._looked_at > _SECONDS_BETWEEN_LOOKS:
            alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
            self._nodes = [(node.get("CPU", 0.0), node.get("GPU", 0.0)) for node in alive]
            self._looked_at = now
            if silent := self._book.silent():
                jobs = state.jobs()  # has no public name without the dashboard
                self._book.gone({job["JobID"] for job in jobs if job["IsDead"]} & set(silent))
        return self._book.report(self._nodes, sweep, **stand)

    def leave(self, sweep: str) -> None:
        """As `Book.leave`."""
        import ray

        self._book.leave(sweep)
        if self._book.is_empty:
            ray.actor.exit_actor()
