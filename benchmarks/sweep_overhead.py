"""What a sweep costs beside its training: formula trials here and with plain Ray Tune, and proposing late in a sweep.

Both run on the same private Ray, one after the other in each turn, into fresh SQLite stores of MLflow that have their
tables: the same trials of 9 epochs, 2 at once, over the same axes, with Optuna's TPE in the same settings and ASHA (grace
1, factor 3). This project: ledger, a checkpoint of every epoch, MLflow caught up at the end. Plain: `OptunaSearch`,
`ASHAScheduler`, `MLflowLoggerCallback` (which also logs what Ray adds to a report), actors reused, and neither
checkpoints, snapshots of the experiment nor its files of results. "Without MLflow" is the same plain sweep with nothing
that tracks it: the floor. Seconds per trial and per epoch count from the first report on. Memory is the driver's; all
sweeps run in one process, so it does not fall from one to the next.

Proposals and ends of trials are timed in CPU seconds on a `Search` that has been told so many trials, without Ray.
"""

import io
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from collections.abc import Iterator
from contextlib import contextmanager
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path

import optuna
import psutil
from mlflow import MlflowClient
from optuna.distributions import BaseDistribution
from optuna.distributions import CategoricalDistribution
from optuna.distributions import FloatDistribution
from optuna.distributions import IntDistribution
from optuna.trial import TrialState
from ray import tune
from ray.air.integrations.mlflow import MLflowLoggerCallback
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.optuna import OptunaSearch

from benchmarks import formula
from benchmarks.ratio import Ratio
from benchmarks.ratio import cpu_seconds
from benchmarks.ratio import in_turns
from tune_topkd.config import SweepConfig
from tune_topkd.config import config_from
from tune_topkd.space import Axis
from tune_topkd.space import Space
from tune_topkd.space import lattice
from tune_topkd.sweep import Cluster
from tune_topkd.sweep import Search
from tune_topkd.sweep import run_sweep
from tune_topkd.tracking import EXPERIMENT
from tune_topkd.tracking import MlflowTracker
from tune_topkd.tracking import check_uri
from tune_topkd.trials import LEDGER_FILE
from tune_topkd.trials import SEARCH
from tune_topkd.trials import Ledger
from tune_topkd.trials import driver_identity
from tune_topkd.trials import read_events

CONCURRENT = 2
CPUS_PER_TRIAL = 0.5  # two fit on any machine
FEW = 100
AT_ONCE = 3
HERE, PLAIN, FLOOR = "this project's sweep", "plain Ray Tune", "plain Ray Tune without MLflow"


def run(quick: bool) -> list[Ratio]:
    """Whole sweeps of 200 trials (quick: 20) and proposals at 10,000 told trials (quick: 1,000)."""
    with tempfile.TemporaryDirectory() as folder:
        proposals = _proposals(Path(folder), many=1000 if quick else 10_000, turns=3 if quick else 7)
        sweeps = _sweeps(Path(folder), trials=20 if quick else 200, turns=1 if quick else 3)
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
        if turns > 1:  # workers and imports
            in_turns({name: partial(sweep, kind, CONCURRENT) for name, kind in kinds.items()}, 1)
        runs = in_turns({name: partial(sweep, kind, trials) for name, kind in kinds.items()}, turns)

    def ratio(what: str, against: str, value: Callable[[_Run], float], unit: str) -> Ratio:
        return Ratio(
            f"{what}, {HERE}", against, [value(r) for r in runs[HERE]], [value(r) for r in runs[against]], unit
        )

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
    uri, trials = f"sqlite:///{folder / 'mlflow.db'}", config.sweep.trials
    header = {"sweep": "formula", "id": folder.name, "seed": config.sweep.seed, "trials": trials, "first": []}
    with _peak_megabytes() as megabytes:
        started = time.time()
        with Ledger.create(folder / LEDGER_FILE, **header) as ledger:
            ledger.append(("driver", {**driver_identity(), "trials": trials}))
            tracker = MlflowTracker(ledger.path, uri)
            search = Search(config, ledger, [tracker])
            run_sweep(search, cluster=cluster, folder=folder, train=formula.train)
            tracker.close()
        ended = time.time()
    assert tracker.is_caught_up, tracker.trouble
    assert all(record.status.is_end and not record.error for record in search.state.trials.values())
    _check_store(uri, EXPERIMENT, trials + 1)  # and the sweep's own run
    reports = [event for event in read_events(ledger.path)[0] if event.name == "report"]
    return _Run(ended - started, ended - reports[0].time, len(reports), megabytes[0])


def _plain(config: SweepConfig, folder: Path, *, is_tracked: bool) -> _Run:
    uri, settings = f"sqlite:///{folder / 'mlflow.db'}", config.sweep
    assert settings.asha is not None
    sampler = optuna.samplers.TPESampler(
        seed=settings.seed, n_startup_trials=settings.startup_trials, multivariate=True, constant_liar=True
    )
    reports = _Reports()
    tracking = [MLflowLoggerCallback(tracking_uri=uri, experiment_name="plain")] if is_tracked else []
    with _peak_megabytes() as megabytes:
        started = time.time()
        tuner = tune.Tuner(
            tune.with_resources(formula.trainable, {"cpu": settings.cpus_per_trial}),
            tune_config=tune.TuneConfig(
                metric=formula.OBJECTIVE,
                mode="max",
                search_alg=OptunaSearch(_distributions(config), metric=formula.OBJECTIVE, mode="max", sampler=sampler),
                scheduler=ASHAScheduler(
                    max_t=formula.EPOCHS,
                    grace_period=settings.asha.grace_epochs,
                    reduction_factor=settings.asha.reduction_factor,
                ),
                num_samples=settings.trials,
                max_concurrent_trials=CONCURRENT,
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                name="plain", storage_path=str(folder), verbose=0, callbacks=[*tracking, reports]
            ),
        )
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


@contextmanager
def _peak_megabytes() -> Iterator[list[float]]:
    """The most memory this process has resident meanwhile, looked at every 50 ms, as the list's one item at the end."""
    process, done, peak = psutil.Process(), threading.Event(), [0.0]

    def watch() -> None:
        while not done.wait(0.05):
            peak[0] = max(peak[0], process.memory_info().rss / 1e6)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()


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
        Ratio(f"a proposal after {many:,} trials", against, times["ask many"], times["ask few"], "s"),
        Ratio(f"taking the end of a trial after {many:,} trials", against, times["end many"], times["end few"], "s"),
    ]


class _Told:
    """A `Search` that has been told so many trials, as many pruned ones among them as ASHA makes."""

    def __init__(self, folder: Path, told: int) -> None:
        folder.mkdir()
        config = _config(trials=told + 1000)
        header = {"sweep": "told", "id": folder.name, "seed": 0, "trials": config.sweep.trials, "first": []}
        self.ledger = Ledger.create(folder / LEDGER_FILE, **header)
        self.search = Search(config, self.ledger)
        space, distributions = Space.of(config), self.search.distributions
        events, trials = [], []
        for number, proposal in enumerate(lattice(space.axes(), told)):
            params = space.params(proposal)
            key = {"arm": SEARCH, "number": number}
            epoch = (1, 1, 1, 1, 1, 1, 3, 3, formula.EPOCHS)[number % 9]
            values = {e: formula.metrics(params["k"], float(params["lr"]), e)[formula.OBJECTIVE] for e in (1, 3, 9)}
            is_whole = epoch == formula.EPOCHS
            status = "completed" if is_whole else "pruned"
            events.append(("suggest", {**key, "proposal": proposal, "params": params}))
            end = {**key, "status": status, "reason": "", "value": values[epoch], "epoch": epoch}
            events.append(("end", end))
            trials.append(
                optuna.trial.create_trial(
                    params=proposal,
                    distributions=distributions,
                    value=values[epoch] if is_whole else None,
                    state=TrialState.COMPLETE if is_whole else TrialState.PRUNED,
                    intermediate_values={e: value for e, value in values.items() if e <= epoch},
                )
            )
        # Not by `next_trial` and `reported`: their time is what is asked for here.
        self.ledger.append(*events)
        self.search.study.add_trials(trials)
        for _ in range(AT_ONCE):
            self.propose()

    def propose(self) -> None:
        """Have the next trial proposed."""
        assert self.search.next_trial() is not None

    def end(self) -> None:
        """Bring the oldest running trial to its end."""
        running = self.search.state.running()[0]
        params = running.params
        self.search.reported(running.key, formula.EPOCHS, formula.metrics(params["k"], params["lr"], formula.EPOCHS))


def _config(trials: int) -> SweepConfig:
    config = config_from(
        {
            "data": {"name": "digits"},
            "teacher": {"name": "digits_cnn", "recipe": {"epochs": 1}},
            "student": "digits_cnn_tiny",
            "recipe": {"epochs": formula.EPOCHS},
            "space": {
                "k": {"low": 1, "high": 10},
                "scale_top": {"low": 1.0, "high": 4.0},
                "scale_last": {"low": 1.0, "high": "scale_top"},
                "scale_gt": {"low": "scale_top", "high": 6.0},
                "shift": {"low": 0.0, "high": 1.0},
                "normalize": [True, False],
                "temperature": {"low": 0.02, "high": 5.0, "log": True},
                "lr": {"low": 0.01, "high": 1.0, "log": True},
            },
            "sweep": {
                "trials": trials,
                "asha": {"grace_epochs": 1, "reduction_factor": 3},
                "max_concurrent": CONCURRENT,
                "cpus_per_trial": CPUS_PER_TRIAL,
            },
            "baselines": None,
        },
        "benchmark",
    )
    assert isinstance(config, SweepConfig)
    return config


def _distributions(config: SweepConfig) -> dict[str, BaseDistribution]:
    """What the project's sweep has Optuna propose, for the plain one."""
    return {axis.name: _distribution(axis) for axis in Space.of(config).axes()}


def _distribution(axis: Axis) -> BaseDistribution:
    if axis.kind == "choice":
        return CategoricalDistribution(axis.choices)
    if axis.kind == "int":
        return IntDistribution(int(axis.low), int(axis.high), log=axis.log)
    return FloatDistribution(axis.low, axis.high, log=axis.log)
