"""`python -m benchmarks.scale [--trials N] [--slots N] [--concurrent N] [--quick] [--write]`: how large a sweep may get.

**Many short trials.** Formula trials that sleep for one second and report once, on so many slots, here and with plain Ray
Tune, one after the other on the same private Ray, with Optuna's TPE over the same axes in both. Here: ledger, a checkpoint
of each trial, MLflow in SQLite caught up. Plain: `OptunaSearch`, actors reused, nothing that tracks. The floor is
trials / slots seconds: what a scheduler that costs nothing would take from the first trial on.

**Trials shorter than their workers' start.** Workers that take five seconds to start, and trials of one second. The floor
is one start and trials / slots seconds, from the first proposal on: what is lost if a worker is begun twice, or one works
while others start, is what is above it.

**Many trials at once.** Trials on four Ray nodes, all on this machine, that begin to report when all are there, each report
with a checkpoint, at rates that rise. A driver that keeps up takes as many reports a second as are sent. In the end each
trial reports as soon as its last report was answered: what is taken then is what the driver saturates at. CPU and memory are
the driver's process alone, MLflow's thread included; here it shares the machine's cores with all the workers. The first
quarter of the time at each rate is left out.
"""

import argparse
import contextlib
import io
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from collections.abc import Sequence
from contextlib import contextmanager
from contextlib import redirect_stdout
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import psutil
import ray.cluster_utils
from ray import tune

from benchmarks import formula
from benchmarks.__main__ import cores
from benchmarks.__main__ import machine
from benchmarks.memory import every
from benchmarks.memory import peak_megabytes
from benchmarks.pages import give
from benchmarks.slow_to_start import VARIABLE
from benchmarks.slow_to_start import Slow
from benchmarks.sweep_overhead import STARTUP
from benchmarks.sweep_overhead import driven
from benchmarks.sweep_overhead import plain_tuner
from benchmarks.sweep_overhead import tracked
from tune_topkd.config import SweepConfig
from tune_topkd.execution import Cluster
from tune_topkd.ledger import LEDGER_FILE
from tune_topkd.ledger import read_events
from tune_topkd.tracking import check_uri

TRIALS, PLAIN, SLOTS = 10_000, 1_000, 16
NODES, CONCURRENT = 4, 200
RATES = (0.1, 0.2, 0.4, 0.8, math.inf)
"""Reports a second that each of many trials at once sends."""
AT_A_RATE = 20.0
"""Seconds."""
SHORT, SHORT_SLOTS, TO_START = 60, 3, 5.0
"""Trials of one second, on so many slots, whose workers take so many seconds to start."""


@dataclass(frozen=True)
class Swept:
    """A sweep of formulas that has ended."""

    first: float
    """When the first trial began, in seconds since 1970."""
    ended: float
    cpu: float
    """Seconds of the driver's process between the two."""
    megabytes: float
    """The most that the driver's process took."""


def swept(config: SweepConfig, train: formula.Train, folder: Path, store: Path) -> Swept:
    """Run a sweep on the Ray that this process is attached to, with a fresh MLflow."""
    folder.mkdir()
    shutil.copy(store, folder / "mlflow.db")
    cpu = time.process_time()
    with peak_megabytes(psutil.Process(), 0.5) as megabytes:
        tracked(config, train, folder, Cluster.now())
        ended = time.time()
    events = read_events(folder / LEDGER_FILE)[0]
    first = next(event.time for event in events if event.name == "start")
    return Swept(first, ended, time.process_time() - cpu, megabytes[0])


def plainly(config: SweepConfig, folder: Path) -> float:
    """The same trials of one report by Ray Tune alone: seconds from the first one's start on."""
    starts = _Starts()
    results = plain_tuner(config, formula.trainable_of_a_second, folder, [starts]).fit()
    ended = time.time()
    assert len(results) == config.sweep.trials
    assert not results.errors
    return ended - starts.first


class _Starts(tune.Callback):
    """When the first trial began."""

    first = 0.0

    def on_trial_start(self, iteration: int, trials: object, trial: object, **info: object) -> None:
        self.first = self.first or time.time()


def many_short(folder: Path, store: Path, trials: int, plain: int, slots: int) -> Iterator[str]:
    """The table of so many short trials here, and so many with plain Ray Tune."""
    settings = {
        "asha": None,
        "startup_trials": STARTUP,
        "max_concurrent": slots,
        "cpus_per_trial": float(cores()) / slots,
    }

    def row(name: str, trials: int, seconds: float, *cells: str) -> str:
        floor = trials / slots
        times = [f"{trials:,}", f"{floor:.0f}", f"{seconds:.0f}", f"{seconds / floor:.2f}", f"{trials / seconds:.1f}"]
        print(name, *times, file=sys.stderr, flush=True)
        return f"| {' | '.join([name, *times, *cells])} |"

    yield f"{slots} slots; seconds from the first trial's start on."
    yield ""
    yield "| | trials | floor, s | seconds | × the floor | trials a second | driver's CPU ms a trial | its peak MB |"
    yield "|---|--:|--:|--:|--:|--:|--:|--:|"
    with Cluster.attached(), redirect_stdout(io.StringIO()):  # Ray Tune prints
        config = formula.sweep_config(trials, formula.MORE_AXES, epochs=1, **settings)
        here = swept(config, formula.Paced(1.0), folder / "here", store)
        cpu = f"{1e3 * here.cpu / trials:.0f}"
        yield row("this project", trials, here.ended - here.first, cpu, f"{here.megabytes:.0f}")
        if plain:
            config = formula.sweep_config(plain, formula.MORE_AXES, epochs=1, **settings)
            yield row("plain Ray Tune, which tracks nothing", plain, plainly(config, folder), "–", "–")


def shorter_than_a_start(folder: Path, store: Path, trials: int, slots: int, start: float, turns: int) -> Iterator[str]:
    """The table of trials that are shorter than the start of their workers, each turn on a Ray of its own."""
    yield f"{trials} trials of one second on {slots} slots; workers take {start:g} s to start."
    yield ""
    yield "| turn | floor, s | seconds | × the floor | workers |"
    yield "|--:|--:|--:|--:|--:|"
    floor = start + trials / slots
    settings = {"asha": None, "max_concurrent": slots, "cpus_per_trial": float(cores()) / slots}
    config = formula.sweep_config(trials, formula.MORE_AXES, epochs=1, **settings)
    for turn in range(turns):
        os.environ[VARIABLE] = f"{start:g}"
        try:
            with Cluster.attached(), redirect_stdout(io.StringIO()):
                here = folder / f"slow-{turn}"
                swept(config, Slow(1.0), here, store)
                workers = len({actor["Pid"] for actor in ray._private.state.actors().values() if actor["Pid"]})
        finally:
            del os.environ[VARIABLE]
        events = read_events(here / LEDGER_FILE)[0]
        began = next(event.time for event in events if event.name == "suggest")
        seconds = max(event.time for event in events if event.name == "end") - began
        cells = [f"{turn + 1}", f"{floor:.1f}", f"{seconds:.1f}", f"{seconds / floor:.2f}", f"{workers}"]
        yield f"| {' | '.join(cells)} |"
        print(*cells, file=sys.stderr, flush=True)


@contextmanager
def nodes(cpus: float) -> Iterator[None]:
    """A Ray of several nodes on this machine, each with so many CPUs to give away, that this process is attached to."""
    cluster = ray.cluster_utils.Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False}
    )
    try:
        for _ in range(NODES):
            cluster.add_node(num_cpus=cpus)
        ray.init(address=cluster.address, log_to_driver=False)
        yield
    finally:
        ray.shutdown()
        cluster.shutdown()


class _Ends:
    """Ends a sweep when its trials have reported at all rates."""

    def __init__(self, trials: formula.Together) -> None:
        self._trials = trials

    @property
    def is_asked(self) -> bool:
        begins = self._trials.begins()
        return begins is not None and time.time() > begins + len(self._trials.rates) * self._trials.seconds

    def deferred(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def check(self) -> None:
        """Nothing is asked for while it is deferred."""


@contextmanager
def sampled(seconds: float) -> Iterator[list[tuple[float, float]]]:
    """The time, and the CPU seconds that this process has taken until then, every so many seconds."""
    found = [(time.time(), time.process_time())]
    with every(seconds, lambda: found.append((time.time(), time.process_time()))):
        yield found


def many_at_once(folder: Path, store: Path, count: int, rates: Sequence[float], seconds: float) -> Iterator[str]:
    """The table of many trials at once, a row for each rate at which they report."""
    yield f"{count} trials at once on {NODES} nodes, {seconds:g} s at each rate."
    yield ""
    yield "| reports a second sent | taken | driver's CPU s a second | its peak MB |"
    yield "|--:|--:|--:|--:|"
    here, there = folder / "at-once", folder / "there"
    here.mkdir()
    there.mkdir()
    shutil.copy(store, here / "mlflow.db")
    settings = {"asha": None, "max_concurrent": count, "cpus_per_trial": 1.0, "start_timeout": 600.0}
    config = formula.sweep_config(count, {}, epochs=10**6, **settings)
    trials = formula.Together(there, count, rates, seconds)
    with nodes(count // NODES), sampled(0.5) as cpu, peak_megabytes(psutil.Process(), 0.5) as megabytes:
        driven(config, trials, here, Cluster.now(), _Ends(trials))
    reports = [event.time for event in read_events(here / LEDGER_FILE)[0] if event.name == "report"]
    begins = trials.begins()
    assert begins is not None
    for number, rate in enumerate(rates):
        first, last = begins + number * seconds + seconds / 4, begins + (number + 1) * seconds
        taken = sum(first <= at < last for at in reports) / (last - first)
        of_it = [sample for sample in cpu if first <= sample[0] < last]
        (at, spent), (until, most) = of_it[0], of_it[-1]
        sent = "as fast as it goes" if math.isinf(rate) else f"{rate * count:.0f}"
        cells = [sent, f"{taken:.0f}", f"{(most - spent) / (until - at):.2f}", f"{megabytes[0]:.0f}"]
        yield f"| {' | '.join(cells)} |"
        print(*cells, file=sys.stderr, flush=True)


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(prog="benchmarks.scale", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--trials", type=int, default=TRIALS, metavar="N", help="of one second; 0 leaves them out")
    parser.add_argument("--plain", type=int, default=PLAIN, metavar="N", help="of these with plain Ray Tune")
    parser.add_argument("--slots", type=int, default=SLOTS, metavar="N", help="for these")
    parser.add_argument(
        "--short", type=int, default=SHORT, metavar="N", help="whose workers are slow to start; 0 leaves them out"
    )
    parser.add_argument("--turns", type=int, default=3, metavar="N", help="of these")
    parser.add_argument(
        "--concurrent", type=int, default=CONCURRENT, metavar="N", help="trials at once; 0 leaves them out"
    )
    parser.add_argument(
        "--rates", type=float, nargs="*", default=RATES, metavar="R", help="at which each of them reports"
    )
    parser.add_argument("--quick", action="store_true", help="small and rough: shows that it runs")
    parser.add_argument("--write", action="store_true", help="keep the page in benchmarks/results")
    args, start, at_a_rate = parser.parse_args(), TO_START, AT_A_RATE
    if args.quick:
        args.trials, args.plain, args.slots, args.concurrent, args.rates = 8, 8, 2, 4, [2.0, math.inf]
        args.short, args.turns, start, at_a_rate = 6, 1, 1.0, 4.0
    slots = min(args.slots, SHORT_SLOTS)
    lines = [f"# How large a sweep may get, {date.today()}", "", *machine(), ""]
    with tempfile.TemporaryDirectory() as scratch:
        folder, store = Path(scratch), Path(scratch) / "empty.db"
        check_uri(f"sqlite:///{store}")
        if args.trials:
            lines += ["## Many short trials", "", *many_short(folder, store, args.trials, args.plain, args.slots), ""]
        if args.short:
            table = shorter_than_a_start(folder, store, args.short, slots, start, args.turns)
            lines += ["## Trials shorter than their workers' start", "", *table, ""]
        if args.concurrent:
            table = many_at_once(folder, store, args.concurrent, args.rates, at_a_rate)
            lines += ["## Many trials at once", "", *table, ""]
    lines += (__doc__ or "").splitlines()[2:]
    give(lines, f"scale-{cores()}-cores", args.write)


if __name__ == "__main__":
    main()
