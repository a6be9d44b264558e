"""Trials that are formulas or recorded curves, on a virtual clock: a sweep's decisions without Ray, networks or waiting.

The search, the ledger and the rules are those of a real sweep, so what a sampler or a scheduler does to thousands of trials
is seen in seconds. The same search, formula and number of trials at once give the same ledger.
"""

import heapq
import itertools
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import field

from tune_topkd.config import SweepConfig
from tune_topkd.config import TrialConfig
from tune_topkd.execution.executor import Work
from tune_topkd.execution.packing import Packed
from tune_topkd.execution.packing import Probe
from tune_topkd.ledger import Share
from tune_topkd.ledger import TrialRecord
from tune_topkd.search import Search


@dataclass
class VirtualClock:
    """A clock that stands still until it is set. For a ledger whose times are to be the simulation's."""

    now: float = 0.0
    """Seconds since the simulation began."""

    def __call__(self) -> float:
        """What time it is."""
        return self.now


@dataclass(frozen=True)
class SimulatedTrial:
    """A trial at work."""

    record: TrialRecord
    """What the ledger tells of it."""
    config: TrialConfig
    """What its training would get."""


class WorkerLostError(Exception):
    """Raised by a formula: the trial's worker is lost, and the trial may be started again."""

    def __init__(self, reason: str = "crash", error: str = "", larger: Share | None = None) -> None:
        super().__init__(error)
        self.reason = reason
        self.larger = larger


Formula = Callable[[SimulatedTrial, int], Mapping[str, float]]
"""The metrics of a trial at an epoch, the first being 1. What it raises fails the trial."""


def simulate(
    search: Search,
    formula: Formula,
    *,
    at_once: int,
    clock: VirtualClock | None = None,
    seconds: Callable[[SimulatedTrial, int], float] = lambda trial, epoch: 1.0,
    reports: int | None = None,
) -> str:
    """Run the trials of a search to the sweep's end.

    A trial is let go at its next report once a limit of the sweep is reached, as by a real executor. Of epochs that end at
    the same time, the one that began first reports first.

    Args:
        search: decides; its ledger gets the lines that a real sweep would write.
        formula: the metrics of a trial at an epoch.
        at_once: trials at work at the same time, at most.
        clock: is set to the time of each report; give the ledger the same.
        seconds: how long an epoch of a trial takes on that clock, above 0.
        reports: epochs after which the driver lets go, as if interrupted; by default it never does.

    Returns:
        Why it stopped: the `stop` event's reason.
    """
    if at_once < 1:
        raise ValueError(f"at_once must be at least 1, but got {at_once}")
    simulation = _Simulation(search, formula, at_once, clock or VirtualClock(), seconds)
    for _ in itertools.islice(simulation.epochs(), reports):
        pass
    return search.stopped()


@dataclass
class _Simulation:
    search: Search
    formula: Formula
    at_once: int
    clock: VirtualClock
    seconds: Callable[[SimulatedTrial, int], float]
    at_work: list[tuple[float, int, SimulatedTrial]] = field(default_factory=list)
    """A heap: when the epoch of each ends, in which order they began."""
    begun: "itertools.count[int]" = field(default_factory=itertools.count)

    def epochs(self) -> Iterator[None]:
        """Run one epoch at a time until no trial is left."""
        self._fill()
        while self.at_work:
            self.clock.now, _, trial = heapq.heappop(self.at_work)
            self._end_epoch(trial)
            self._fill()
            yield

    def _fill(self) -> None:
        while len(self.at_work) < self.at_once and (record := self.search.next_trial()) is not None:
            self.search.started(record.key)
            self._begin_epoch(SimulatedTrial(record, self.search.trial_config(record)))

    def _begin_epoch(self, trial: SimulatedTrial) -> None:
        ends = self.clock.now + self.seconds(trial, trial.record.epoch + 1)
        heapq.heappush(self.at_work, (ends, next(self.begun), trial))

    def _end_epoch(self, trial: SimulatedTrial) -> None:
        record = trial.record
        try:
            metrics = self.formula(trial, record.epoch + 1)
        except WorkerLostError as lost:
            self.search.lost(record.key, lost.reason, str(lost), lost.larger)
            return
        except Exception as error:  # noqa: BLE001 (it is the trial's failure, as in a worker)
            self.search.failed(record.key, "error", f"{type(error).__name__}: {error}")
            return
        self.search.reported(record.key, record.epoch + 1, metrics)
        if not record.status.is_end and not self.search.lets_go:
            self._begin_epoch(trial)


class SimulatedExecutor:
    """Runs a sweep's trials as formulas, without Ray or training: `Sweep.run(executor=SimulatedExecutor(formula))`."""

    def __init__(self, formula: Formula, at_once: int = 1) -> None:
        self._formula = formula
        self._at_once = at_once

    def measure(self, config: SweepConfig, trial: TrialConfig, probe: Probe) -> list[Packed]:
        """A CPU for each: there is nothing to measure."""
        return [Packed(Share(1.0, 0.0), self._at_once, 0.0, 0.0)]

    def run(self, search: Search, work: Work) -> str:
        """Run the trials on a virtual clock."""
        return simulate(search, self._formula, at_once=self._at_once)
