"""A ratio of two measurements that were taken turn by turn, so that both saw the same machine."""

import statistics
import time
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Ratio:
    """One line of the table: what was measured against what, a value of each for every turn."""

    what: str
    against: str
    values: Sequence[float]
    baseline: Sequence[float]
    unit: str
    goal: str = ""
    """What the ratio is to be, in words."""

    @property
    def by_turn(self) -> list[float]:
        """The ratio of each turn."""
        return [value / base for value, base in zip(self.values, self.baseline, strict=True)]

    @property
    def median(self) -> float:
        """The median of the turns' ratios."""
        return statistics.median(self.by_turn)


def in_turns(measures: Mapping[str, Callable[[], T]], turns: int) -> dict[str, list[T]]:
    """Take every measurement once in each turn; every second turn goes the other way round."""
    values: dict[str, list[T]] = {name: [] for name in measures}
    for turn in range(turns):
        for name in reversed(measures) if turn % 2 else measures:
            values[name].append(measures[name]())
    return values


def cpu_seconds(call: Callable[[], object], times: int) -> float:
    """The median CPU seconds of a call in this process: what others do on the machine does not count."""
    taken = []
    for _ in range(times):
        started = time.process_time()
        call()
        taken.append(time.process_time() - started)
    return statistics.median(taken)
