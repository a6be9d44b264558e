"""What an MLflow that is killed costs a sweep: the same sweep beside a server that stays, comes back, or is gone for good.

Formula trials of 9 epochs, 5 ms each, one at a time and without Ray: proposals by Optuna's TPE, the ledger, the tracker's
thread. Behind `mlflow server` with one worker, which keeps its runs in SQLite, or in PostgreSQL where that is installed.
The server is SIGKILLed after a sixth of the epochs. "Down for a while" ends when the server answers again, which includes
its start on the same machine. The time of a sweep ends with its last trial; closing is what the tracker takes from then on,
to catch up or to give up. A server that was gone for good is started again afterwards and caught up, outside of the times.
In the end MLflow has in every case exactly what the ledger says, or the benchmark fails.
"""

import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from benchmarks import formula
from benchmarks.ratio import Ratio
from benchmarks.ratio import in_turns
from tests.servers import mlflow_server  # run from the repository's root, as all benchmarks are
from tests.servers import postgres_binaries
from tests.servers import postgres_server
from tune_topkd.execution.simulated import SimulatedTrial
from tune_topkd.execution.simulated import simulate
from tune_topkd.ledger import LEDGER_FILE
from tune_topkd.ledger import Driver
from tune_topkd.ledger import Header
from tune_topkd.ledger import Ledger
from tune_topkd.search import Search
from tune_topkd.tracking import MlflowTracker
from tune_topkd.tracking import catch_up
from tune_topkd.tracking import check_uri
from tune_topkd.tracking import disagreements

EPOCH_SECONDS = 0.005
STAYS, RETURNS, GONE = "undisturbed", "server down for a while", "server killed for good"
GOAL = "≤ 1.1"


def run(quick: bool) -> list[Ratio]:
    """Sweeps of 260 trials with the server killed for 6 s, then started (quick: of 20 trials, 1 s)."""
    size = _Size(trials=20, away=1.0, turns=1) if quick else _Size(trials=260, away=6.0, turns=3)
    with tempfile.TemporaryDirectory() as folder:
        return [line for name, store in _stores(Path(folder)) for line in _lines(Path(folder), name, store, size)]


@dataclass(frozen=True)
class _Size:
    """How much is run: trials of a sweep, seconds until a killed server is started again, turns."""

    trials: int
    away: float
    turns: int


@dataclass(frozen=True)
class _Run:
    """One sweep: its wall time up to the last trial, that of closing the tracker, and that of the outage, in seconds."""

    sweep: float
    closing: float
    outage: float


def _stores(folder: Path) -> Iterator[tuple[str, str]]:
    """Stores with MLflow's tables in them, by name; PostgreSQL runs while its store is in use."""
    empty = folder / "empty.db"
    check_uri(f"sqlite:///{empty}")
    shutil.copy(empty, folder / "mlflow.db")
    yield "SQLite", f"sqlite:///{folder / 'mlflow.db'}"
    if postgres_binaries() is not None:
        with postgres_server() as server:
            server.run("CREATE DATABASE mlflow")
            check_uri(server.uri("mlflow"))
            yield "PostgreSQL", server.uri("mlflow")


def _lines(folder: Path, name: str, store: str, size: _Size) -> list[Ratio]:
    numbers = count()
    with mlflow_server(store) as server:

        def sweep(kind: str, trials: int) -> _Run:
            place = folder / f"{name}-{next(numbers)}"
            place.mkdir()
            return _sweep(place, server, kind, trials, size.away)

        sweep(STAYS, 2)  # imports
        runs = in_turns({kind: partial(sweep, kind, size.trials) for kind in (STAYS, RETURNS, GONE)}, size.turns)
    lines = []
    for kind in (RETURNS, GONE):
        down = f" ({' / '.join(f'{run.outage:.0f}' for run in runs[kind])} s)" if kind == RETURNS else ""
        sweeps, closings = (
            [[getattr(r, what) for r in runs[k]] for k in (kind, STAYS)] for what in ("sweep", "closing")
        )
        lines += [
            Ratio(f"wall time of {size.trials} trials, {name}, {kind}{down}", STAYS, *sweeps, "s", GOAL),
            Ratio(f"closing afterwards, {name}, {kind}", STAYS, *closings, "s", "seconds, not minutes"),
        ]
    return lines


def _sweep(folder: Path, server: Any, kind: str, trials: int, away: float) -> _Run:
    config = formula.sweep_config(trials, {}, asha=None, max_concurrent=1)
    header = Header(sweep="outage", id=folder.name, seed=config.sweep.seed, trials=trials)
    with Ledger.create(folder / LEDGER_FILE, header) as ledger:
        ledger.append(Driver.here(trials=trials))
        tracker = MlflowTracker(ledger.path, server.uri)
        search = Search(config, ledger, [tracker])
        with _disturbed(server, kind, away) as disturb:
            started = time.perf_counter()
            _drive(search, at=trials * formula.EPOCHS // 6, disturb=disturb.start)
            ended = time.perf_counter()
        tracker.close()
        closed = time.perf_counter()
        if kind == GONE:
            assert not tracker.is_caught_up
            server.start()
            catch_up(ledger.path, server.uri)
        else:
            assert tracker.is_caught_up, tracker.trouble
        assert disagreements(ledger.path, server.uri) == []
    return _Run(ended - started, closed - ended - disturb.waited, disturb.outage)


@contextmanager
def _disturbed(server: Any, kind: str, away: float) -> Iterator["_Disturbance"]:
    """At the end the server is where its kind wants it; that wait belongs to nobody's time."""
    disturbance = _Disturbance(server, kind, away)
    yield disturbance
    disturbance.wait()


class _Disturbance:
    """Kills a server, and starts it again if its kind is to come back."""

    def __init__(self, server: Any, kind: str, away: float) -> None:
        self.outage = 0.0
        self.waited = 0.0
        self._server = server
        self._kind = kind
        self._away = away
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Disturb now, beside the caller."""
        if self._kind != STAYS:
            self._thread = threading.Thread(target=self._run)
            self._thread.start()

    def wait(self) -> None:
        """Wait until the server is back."""
        began = time.perf_counter()
        if self._thread is not None:
            self._thread.join()
        self.waited = time.perf_counter() - began

    def _run(self) -> None:
        began = time.perf_counter()
        self._server.kill()
        if self._kind == RETURNS:
            time.sleep(self._away)
            self._server.start()
            self.outage = time.perf_counter() - began


def _drive(search: Search, at: int, disturb: Any) -> None:
    """Run the trials one after the other; before epoch number `at` of all, disturb."""
    epochs = count()

    def epoch_of(trial: SimulatedTrial, epoch: int) -> dict[str, float]:
        if next(epochs) == at:
            disturb()
        time.sleep(EPOCH_SECONDS)
        return formula.simulated(trial, epoch)

    simulate(search, epoch_of, at_once=1)
