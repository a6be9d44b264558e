"""What a sweep costs beside its training: formula trials here and with plain Ray Tune, and proposing late in a sweep.

Both run on the same private Ray, one after the other in each turn, into fresh SQLite stores of MLflow that have their
tables: the same trials of 9 epochs, 2 at once, over the same axes, with Optuna's TPE in the same settings and ASHA (grace
1, factor 3). This project: ledger, a checkpoint of every epoch, MLflow caught up at the end. Plain: `OptunaSearch`,
`ASHAScheduler`, `MLflowLoggerCallback` (which also logs what Ray adds to a report), actors reused, and neither
checkpoints, snapshots of the experiment nor its files of results. "Without MLflow" is the same plain sweep with nothing
that tracks it: the floor. Seconds per trial and per epoch count from the first report on. Memory is the driver's; all
sweeps run in one process, so it does not fall from one to the next.

Proposals and ends of trials are timed in CPU seconds on a `Search` that goes on with a ledger of so many ended trials,
without Ray.
"""

import io
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import optuna
import psutil
from mlflow import MlflowClient
from optuna.distributions import BaseDistribution
from optuna.distributions import CategoricalDistribution
from optuna.distributions import FloatDistribution
from optuna.distributions import IntDistribution
from ray import tune
from ray.air.integrations.mlflow import MLflowLoggerCallback
from ray.tune.schedulers import ASHAScheduler
from ray.tune.schedulers import TrialScheduler
from ray.tune.search.optuna import OptunaSearch

from benchmarks import formula
from benchmarks.memory import peak_megabytes
from benchmarks.ratio import Ratio
from benchmarks.ratio import cpu_seconds
from benchmarks.ratio import in_turns
from tune_topkd.config import SweepConfig
from tune_topkd.execution import Cluster
from tune_topkd.execution import run_sweep
from tune_topkd.execution.bridge import Interruption
from tune_topkd.execution.simulated import simulate
from tune_topkd.ledger import LEDGER_FILE
from tune_topkd.ledger import Driver
from tune_topkd.ledger import Header
from tune_topkd.ledger import Ledger
from tune_topkd.ledger import TrialRecord
from tune_topkd.ledger import read_events
from tune_topkd.search import RandomSampler
from tune_topkd.search import Search
from tune_topkd.space import Axis
from tune_topkd.space import Space
from tune_topkd.tracking import EXPERIMENT
from tune_topkd.tracking import MlflowTracker
from tune_topkd.tracking import check_uri

CONCURRENT = 2
CPUS_PER_TRIAL = 0.5  # two fit on any machine
STARTUP = 20  # said to both: by default this project goes by the number of axes
FEW = 100
AT_ONCE = 3
HERE, PLAIN, FLOOR = "this project's sweep", "plain Ray Tune", "plain Ray Tune without MLflow"


def run(quick: bool) -> list[Ratio]:
    """Whole sweeps of 1,000 trials (quick: 20) and proposals at 10,000 told trials (quick: 1,000)."""
    with tempfile.TemporaryDirectory() as folder:
        proposals = _proposals(Path(folder), many=1000 if quick else 10_000, turns=3 if quick else 7)
        sweeps = _sweeps(Path(folder), trials=20 if quick else 1000, turns=1)
    return sweeps + proposals


@dataclass(frozen=True)
class _Run:
    """One sweep: its wall time, that after the first report, the epochs reported, the driver's peak memory."""

    seconds: float
    seconds_reporting: float
    epochs: int
    megabytes: float


def _sweeps(folder: Path, trials: int, turns: int) -> list[Ratio]:
    store = folder / "empty.db"
    check_uri(f"sqlite:///{store}")
    numbers = count()

    def sweep(kind: Callable[[SweepConfig, Path], _Run], trials: int) -> _Run:
        place = folder / f"sweep-{next(numbers)}"
        place.mkdir()
        shutil.copy(store, place / "mlflow.db")
        return kind(_config(trials), place)

    with Cluster.attached() as cluster, redirect_stdout(io.StringIO()):  # Ray Tune prints
        kinds = {
            HERE: partial(_here, cluster=cluster),
            PLAIN: partial(_plain, is_tracked=True),
            FLOOR: partial(_plain, is_tracked=False),
        }
        if trials > 100:  # workers and imports
            in_turns({name: partial(sweep, kind, CONCURRENT) for name, kind in kinds.items()}, 1)
        runs = in_turns({name: partial(sweep, kind, trials) for name, kind in kinds.items()}, turns)

    def ratio(what: str, against: str, value: Callable[[_Run], float], unit: str) -> Ratio:
        values = [[value(run) for run in runs[name]] for name in (HERE, against)]
        is_goal = against == PLAIN and what.startswith("wall time")
        return Ratio(f"{what}, {HERE}", against, *values, unit, "at most 0.8" if is_goal else "")

    return [
        *(
            line
            for against in (PLAIN, FLOOR)
            for line in (
                ratio(f"wall time of {trials} trials", against, lambda run: run.seconds, "s"),
                ratio("seconds per trial", against, lambda run: run.seconds_reporting / trials, "s"),
                ratio("seconds per epoch", against, lambda run: run.seconds_reporting / run.epochs, "s"),
            )
        ),
        ratio("epochs trained", PLAIN, lambda run: run.epochs, "epochs"),
        ratio("peak memory of the driver", PLAIN, lambda run: run.megabytes, "MB"),
    ]


def _here(config: SweepConfig, folder: Path, cluster: Cluster) -> _Run:
    with peak_megabytes(psutil.Process(), 0.05) as megabytes:
        started = time.time()
        tracked(config, formula.train, folder, cluster)
        ended = time.time()
    _check_store(store_uri(folder), EXPERIMENT, config.sweep.trials + 1)  # and the sweep's own run
    reports = [event for event in read_events(folder / LEDGER_FILE)[0] if event.name == "report"]
    return _Run(ended - started, ended - reports[0].time, len(reports), megabytes[0])


def store_uri(folder: Path) -> str:
    """MLflow's database in a sweep's folder."""
    return f"sqlite:///{folder / 'mlflow.db'}"


def tracked(config: SweepConfig, train: formula.Train, folder: Path, cluster: Cluster) -> None:
    """Run this project's sweep in a folder with an empty MLflow, until that has all of it; no trial fails."""
    search = driven(config, train, folder, cluster)
    assert search.state.size() == config.sweep.trials
    assert all(record.status.is_end and not record.error for record in search.state.trials.values())


def driven(
    config: SweepConfig,
    train: formula.Train,
    folder: Path,
    cluster: Cluster,
    interruption: Interruption | None = None,
) -> Search:
    """Run this project's sweep in a folder with an empty MLflow, until that has all of it."""
    settings = config.sweep
    header = Header(sweep="formula", id=folder.name, seed=settings.seed, trials=settings.trials)
    with Ledger.create(folder / LEDGER_FILE, header) as ledger:
        ledger.append(Driver.here(trials=settings.trials))
        tracker = MlflowTracker(ledger.path, store_uri(folder))
        search = Search(config, ledger, [tracker])
        run_sweep(search, cluster=cluster, folder=folder, train=train, interruption=interruption)
        tracker.close()
    assert tracker.is_caught_up, tracker.trouble
    return search


def plain_tuner(
    config: SweepConfig,
    trainable: Callable[[Mapping[str, Any]], None],
    folder: Path,
    callbacks: Sequence[tune.Callback],
    scheduler: TrialScheduler | None = None,
) -> tune.Tuner:
    """The same sweep by Ray Tune alone, with Optuna's TPE in the same settings and its actors reused."""
    settings = config.sweep
    sampler = optuna.samplers.TPESampler(
        seed=settings.seed, n_startup_trials=settings.startup_trials, multivariate=True, constant_liar=True
    )
    return tune.Tuner(
        tune.with_resources(trainable, {"cpu": settings.cpus_per_trial}),
        tune_config=tune.TuneConfig(
            metric=formula.OBJECTIVE,
            mode="max",
            search_alg=OptunaSearch(_distributions(config), metric=formula.OBJECTIVE, mode="max", sampler=sampler),
            scheduler=scheduler,
            num_samples=settings.trials,
            max_concurrent_trials=settings.max_concurrent,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(name="plain", storage_path=str(folder), verbose=0, callbacks=list(callbacks)),
    )


def _plain(config: SweepConfig, folder: Path, *, is_tracked: bool) -> _Run:
    uri, settings = store_uri(folder), config.sweep
    assert settings.asha is not None
    scheduler = ASHAScheduler(
        max_t=formula.EPOCHS, grace_period=settings.asha.grace_epochs, reduction_factor=settings.asha.reduction_factor
    )
    reports = _Reports()
    tracking = [MLflowLoggerCallback(tracking_uri=uri, experiment_name="plain")] if is_tracked else []
    with peak_megabytes(psutil.Process(), 0.05) as megabytes:
        started = time.time()
        tuner = plain_tuner(config, formula.trainable, folder, [*tracking, reports], scheduler)
        results = tuner.fit()
        ended = time.time()
    assert len(results) == settings.trials
    assert not results.errors
    if is_tracked:
        _check_store(uri, "plain", settings.trials)
    return _Run(ended - started, ended - reports.first, reports.count, megabytes[0])


class _Reports(tune.Callback):
    """When the first report came and how many there were."""

    first = 0.0
    count = 0

    def on_trial_result(self, iteration: int, trials: object, trial: object, result: object, **info: object) -> None:
        self.first = self.first or time.time()
        self.count += 1


def _check_store(uri: str, experiment: str, runs: int) -> None:
    """Both must have done their work: a run for each trial."""
    client = MlflowClient(tracking_uri=uri)
    found = client.search_runs([client.get_experiment_by_name(experiment).experiment_id], max_results=50_000)
    assert len(found) == runs, f"{experiment}: {len(found)} runs in MLflow instead of {runs}"


def _proposals(folder: Path, many: int, turns: int) -> list[Ratio]:
    few_told, many_told = (_Told(folder / f"told-{told}", told) for told in (FEW, many))
    measures = {
        "ask few": partial(cpu_seconds, few_told.propose, AT_ONCE),
        "ask many": partial(cpu_seconds, many_told.propose, AT_ONCE),
        "end few": partial(cpu_seconds, few_told.end, AT_ONCE),
        "end many": partial(cpu_seconds, many_told.end, AT_ONCE),
    }
    times = in_turns(measures, turns)
    against = f"after {FEW} trials"
    return [
        Ratio(f"a proposal after {many:,} trials", against, times["ask many"], times["ask few"], "s", "at most 3"),
        Ratio(f"taking the end of a trial after {many:,} trials", against, times["end many"], times["end few"], "s"),
    ]


class _Told:
    """A `Search` that goes on with a sweep of so many trials drawn at random, of which ASHA has stopped the losers."""

    def __init__(self, folder: Path, told: int) -> None:
        folder.mkdir()
        header = Header(sweep="told", id=folder.name, seed=0, trials=told)
        with Ledger.create(folder / LEDGER_FILE, header, is_durable=False) as ledger:
            simulate(Search(_config(told), ledger, sampler=RandomSampler), formula.simulated, at_once=AT_ONCE)
        self.ledger = Ledger.open(folder / LEDGER_FILE)
        self.ledger.append(Driver.here(trials=told + 1000))
        self.search = Search(_config(told + 1000), self.ledger)
        self._running: deque[TrialRecord] = deque()
        for _ in range(AT_ONCE):
            self.propose()

    def propose(self) -> None:
        """Have the next trial proposed."""
        record = self.search.next_trial()
        assert record is not None
        self._running.append(record)

    def end(self) -> None:
        """Bring the oldest running trial to its end."""
        running = self._running.popleft()
        params = running.params
        self.search.reported(running.key, formula.EPOCHS, formula.metrics(params["k"], params["lr"], formula.EPOCHS))


def _config(trials: int) -> SweepConfig:
    settings = {"max_concurrent": CONCURRENT, "cpus_per_trial": CPUS_PER_TRIAL, "startup_trials": STARTUP}
    asha = {"grace_epochs": 1, "reduction_factor": 3}
    return formula.sweep_config(trials, formula.MORE_AXES, asha=asha, **settings)


def _distributions(config: SweepConfig) -> dict[str, BaseDistribution]:
    """What the project's sweep has Optuna propose, for the plain one."""
    return {axis.name: _distribution(axis) for axis in Space.of(config).axes()}


def _distribution(axis: Axis) -> BaseDistribution:
    if axis.kind == "choice":
        return CategoricalDistribution(axis.choices)
    if axis.kind == "int":
        return IntDistribution(int(axis.low), int(axis.high), log=axis.log)
    return FloatDistribution(axis.low, axis.high, log=axis.log)
