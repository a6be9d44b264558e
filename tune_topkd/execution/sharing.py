"""How sweeps share a cluster: how many trials each may have at once.

The rule, `rooms`, is a function of what the cluster has and of what each sweep asks for. A `Broker` applies it: a Ray actor,
to which each sweep reports every second. Nothing is pre-empted: a sweep that has more trials at work than its room starts
none until enough of them have ended.

The broker's process is sent this module as it is, so it imports nothing but the standard library, and Ray where it runs.
"""

import math
import time
from collections.abc import Callable
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field
from typing import Any

Size = tuple[float, float]
"""CPUs and GPUs, of a node or a trial."""

LEASE = 6.0
"""Seconds without a report after which a sweep's room is given to the others."""
TURN = 60.0
"""Seconds by which a trial's place may be owed before rounding goes the other way."""

_STAYS = 0.2  # of a place: as much more must another sweep be owed to take one, or workers would start for nothing
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
    at_work: int = 0
    """Trials that it has."""
    behind: float = 0.0
    """What it has had less than its part so far, in places for `TURN` seconds; below 0 if more."""


def rooms(nodes: Sequence[Size], claims: Sequence[Claim]) -> list[int]:
    """How many trials each sweep may have at once: weighted max-min in whole trials.

    Every sweep gets one place, if there are enough, those that are most behind first. Each further place goes to the sweep
    that has the least for its priority, measured by the resource of which its trials take the largest part of the cluster.
    It ends when nobody can use what is left. Rounding is in favour of sweeps that are behind.

    Args:
        nodes: what each node has.
        claims: of all sweeps.

    Returns:
        Trials at once by claim; all of them fit on the nodes together.
    """
    free = [_Node(*node) for node in nodes]
    found = [0] * len(claims)
    sizes = [_dominant(nodes, claim.size) for claim in claims]

    def need(number: int) -> float:
        claim = claims[number]
        return claim.behind + (_STAYS if claim.at_work else 0.0)

    for number in sorted(range(len(claims)), key=lambda n: (-need(n), n)):
        if claims[number].most > 0 and _placed(free, claims[number].size):
            found[number] = 1

    def cost(number: int) -> tuple[float, int]:
        claim, places = claims[number], found[number]
        favour = min(max(claim.behind, -1.0), 1.0) / 2 + (_STAYS if places < claim.at_work else 0.0)
        return (places + 0.5 - favour) * sizes[number] / claim.priority, number

    able = {number for number, claim in enumerate(claims) if 0 < found[number] < claim.most}
    while able:
        number = min(able, key=cost)
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
    """What is known of a sweep."""

    size: Size
    priority: float
    most: int = 0
    at_work: int = 0
    heard_at: float = 0.0
    granted: int = 0
    """Places that it may use as far as it knows, and those that it uses."""
    served: float = 0.0
    """What it has had for its priority: the sum of its trials' parts of the cluster, times seconds."""


@dataclass
class Book:
    """Who has how much room. **Threads.** Not thread-safe."""

    clock: Callable[[], float] = time.monotonic
    _entries: dict[str, _Entry] = field(default_factory=dict)
    _accrued_at: float = 0.0
    _settled_at: float = -math.inf

    def report(
        self,
        nodes: Sequence[Size],
        sweep: str,
        size: Size,
        priority: float,
        at_work: int,
        most: int,
        had: int | None = None,
    ) -> tuple[int, int]:
        """Take how a sweep stands; what it has reported holds for `LEASE` seconds.

        The sum of what sweeps have been told never is more than the cluster has, but for trials that are at work already.

        Args:
            nodes: what each of the cluster's nodes has.
            sweep: its id.
            size: what one of its trials takes.
            priority: the sweep's.
            at_work: trials that it has, those included whose workers are still starting.
            most: trials at once that it can use.
            had: the room that an earlier broker gave it, if that is how it comes here.

        Returns:
            How many trials it may have at once, and how many sweeps there are.
        """
        now = self.clock()
        self._accrue(nodes, now)
        for other in [name for name, entry in self._entries.items() if now - entry.heard_at > LEASE]:
            del self._entries[other]
        if not self._entries and had is not None:
            self._settled_at = now + LEASE  # the others are on their way here, and nothing is known of their trials
        entry = self._entries.setdefault(sweep, _Entry(size, priority, served=self._mean()))
        entry.size, entry.priority, entry.most, entry.at_work, entry.heard_at = size, priority, most, at_work, now
        names = list(self._entries)
        targets = dict(zip(names, rooms(nodes, [self._claim(nodes, name) for name in names]), strict=True))
        allowed = targets[sweep]
        others = [(name, other) for name, other in self._entries.items() if name != sweep]
        if any(other.granted > targets[name] for name, other in others):
            allowed = min(allowed, _beside(nodes, [(other.size, other.granted) for _, other in others], size))
        if now < self._settled_at:
            allowed = min(allowed, at_work if had is None else had)
        entry.granted = max(at_work, allowed)
        return allowed, len(names)

    def leave(self, sweep: str) -> None:
        """A sweep has ended: its room is the others'."""
        self._entries.pop(sweep, None)

    def _accrue(self, nodes: Sequence[Size], now: float) -> None:
        """Add what each sweep has had since the last time; one that has all that it can use is owed nothing."""
        seconds, self._accrued_at = now - self._accrued_at, now
        for entry in self._entries.values():
            entry.served += seconds * entry.at_work * _dominant(nodes, entry.size) / entry.priority
        mean = self._mean()
        for entry in self._entries.values():
            if entry.at_work >= entry.most:
                entry.served = max(entry.served, mean)

    def _mean(self) -> float:
        total = sum(entry.priority for entry in self._entries.values())
        return sum(entry.priority * entry.served for entry in self._entries.values()) / total if total else 0.0

    def _claim(self, nodes: Sequence[Size], name: str) -> Claim:
        entry = self._entries[name]
        owed = (self._mean() - entry.served) * entry.priority / _dominant(nodes, entry.size) / TURN
        return Claim(entry.size, entry.priority, entry.most, entry.at_work, owed)


def _beside(nodes: Sequence[Size], others: Sequence[tuple[Size, int]], size: Size) -> int:
    """How many trials of a size fit beside those of others."""
    free = [_Node(*node) for node in nodes]
    for other, count in sorted(others, key=lambda item: _dominant(nodes, item[0]), reverse=True):
        for _ in range(count):
            _placed(free, other)
    found = 0
    while _placed(free, size):
        found += 1
    return found


class Broker:
    """The book as a Ray actor, with the nodes that its cluster has."""

    def __init__(self) -> None:
        self._book = Book()
        self._nodes: list[Size] = []
        self._looked_at = -math.inf

    def report(self, *words: Any) -> tuple[int, int]:
        """As `Book.report`, without the nodes."""
        import ray

        now = time.monotonic()
        if now - self._looked_at > _SECONDS_BETWEEN_LOOKS:
            alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
            self._nodes = [(node.get("CPU", 0.0), node.get("GPU", 0.0)) for node in alive]
            self._looked_at = now
        return self._book.report(self._nodes, *words)

    def leave(self, sweep: str) -> None:
        """As `Book.leave`."""
        self._book.leave(sweep)
