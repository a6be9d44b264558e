"""A sweep's tables from MLflow, for notebooks: one call, and everything that the figures take."""

import os
import warnings
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from tune_topkd.ledger import TrialStatus
from tune_topkd.report.answer import headline
from tune_topkd.report.curves import learning_curves_figure
from tune_topkd.report.k import k_figure
from tune_topkd.report.parallel import parallel_coordinates_figure
from tune_topkd.report.summary import summary_figure
from tune_topkd.report.table import baseline_finalists
from tune_topkd.report.table import baseline_label
from tune_topkd.report.table import finalists_table
from tune_topkd.report.table import is_log_scaled
from tune_topkd.report.table import of_status
from tune_topkd.report.table import parameters_of
from tune_topkd.report.table import trials_table
from tune_topkd.tracking.store import EXPERIMENT
from tune_topkd.tracking.store import sqlite_file
from tune_topkd.tracking.store import sqlite_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient

DEFAULT_SWEEP = "digits"
_SWEEP_VARIABLE, _RUNS_VARIABLE = "TUNE_TOPKD_SWEEP", "TUNE_TOPKD_RUNS_DIR"
_PARENT, _SWEEP, _SWEEP_ID = "tags.mlflow.parentRunId", "tags.sweep", "tags.sweep_id"
_VALUE = "val_top1"


@dataclass(frozen=True)
class SweepTables:
    """What MLflow holds of one sweep, as the figures of this package take it."""

    name: str
    folder: Path
    """Where the sweep lies if it was run from here; it need not be there."""
    run: "pd.Series[Any]"
    """The sweep's own run, as `mlflow.search_runs` gives it."""
    runs: pd.DataFrame
    """All of its runs."""
    trials: pd.DataFrame
    curves: pd.DataFrame
    finalists: pd.DataFrame
    baselines: dict[str, float]
    """The best validation top-1 of each baseline, in percent."""

    @property
    def rungs(self) -> list[int]:
        """The epochs at which trials were stopped early."""
        return sorted(int(e) for e in of_status(self.trials, TrialStatus.PRUNED)["epochs"].dropna().unique())

    @property
    def completed(self) -> pd.DataFrame:
        """The trials that reached the full budget, the best first."""
        found = of_status(self.trials, TrialStatus.COMPLETED)
        return found.sort_values([_VALUE, "number"], ascending=[False, True])

    def best_trials(self, count: int) -> pd.DataFrame:
        """So many of the completed trials, the best first: validation top-1 in percent, then what they were given."""
        shown = self.completed.set_index("number")[[_VALUE, *parameters_of(self.trials)]]
        return shown.head(count).round(3)

    @property
    def headline(self) -> str:
        """The answer in a sentence."""
        return headline(self.trials, self.baselines, self.finalists)

    @cached_property
    def facts(self) -> pd.DataFrame:
        """What was searched, how it stands, and how many trials ended how."""
        told = self.run.filter(regex=r"^(params|tags)\.(?!mlflow)").dropna().rename(lambda name: name.split(".", 1)[1])
        counts = self.trials["status"].value_counts().rename(lambda status: f"trials {status}")
        best = {f"baseline {name} (%)": round(value, 2) for name, value in self.baselines.items()}
        table: pd.DataFrame = pd.concat([told, counts, pd.Series(best, dtype=object)]).to_frame(self.name)
        return table

    @property
    def failures(self) -> pd.DataFrame:
        """By reason, the trials that failed; empty where none did."""
        failed = of_status(self.trials, TrialStatus.FAILED)
        found: pd.DataFrame = failed.groupby("reason").agg(trials=("number", "size"), numbers=("number", list))
        return found

    @property
    def value_at_end(self) -> "pd.Series[float]":
        """Validation top-1 of the completed trials, in percent, by number."""
        return self.completed.set_index("number")[_VALUE].dropna()

    @property
    def value_at_first_rung(self) -> "pd.Series[float]":
        """Validation top-1 there of all trials that reached it, in percent, by number; empty where there is no rung."""
        first = self.curves[self.curves["epoch"] == min(self.rungs, default=0)]
        return first.set_index("number")[_VALUE].dropna()

    @property
    def parameters(self) -> dict[int, dict[str, Any]]:
        """What each trial was given, by its number."""
        table = self.trials.set_index("number")[parameters_of(self.trials)].astype(object)
        return table.where(table.notna(), None).to_dict("index")  # type: ignore[return-value]

    @property
    def logarithmic(self) -> list[str]:
        """The parameters whose values span so much that they were searched in the logarithm."""
        return [name for name in parameters_of(self.trials) if is_log_scaled(self.trials[name])]

    def summary(self) -> Figure:
        """`summary_figure` of this sweep."""
        return summary_figure(self.trials, self.curves, self.baselines, self.rungs, self.finalists)

    def k(self) -> Figure:
        """`k_figure` of this sweep."""
        return k_figure(self.trials, self.baselines)

    def parallel_coordinates(self) -> Figure:
        """`parallel_coordinates_figure` of this sweep."""
        return parallel_coordinates_figure(self.trials)

    def learning_curves(self) -> Figure:
        """`learning_curves_figure` of this sweep."""
        return learning_curves_figure(self.curves, self.trials, self.rungs)


def runs_folder(runs_dir: str | Path | None = None) -> Path:
    """The runs folder: the one that is given, else TUNE_TOPKD_RUNS_DIR, else `runs` here or in the folder above."""
    wanted = runs_dir or os.environ.get(_RUNS_VARIABLE) or "runs"
    places = (Path(wanted), Path("..", wanted))  # a notebook runs in its own folder
    return next((place for place in places if place.is_dir()), Path(wanted)).resolve()


def read_sweep(
    sweep: str | None = None, *, runs_dir: str | Path | None = None, mlflow_uri: str | None = None
) -> SweepTables:
    """The newest sweep of a name, from MLflow.

    Args:
        sweep: its name; by default TUNE_TOPKD_SWEEP, else `digits`.
        runs_dir: see `runs_folder`.
        mlflow_uri: by default MLFLOW_TRACKING_URI, else the database in the runs folder.

    Raises:
        FileNotFoundError: the database is not there; MLflow would make an empty one.
        LookupError: MLflow has no such sweep.
    """
    name = sweep or os.environ.get(_SWEEP_VARIABLE) or DEFAULT_SWEEP
    client, experiment, folder = _opened(runs_dir, mlflow_uri)
    runs = _runs(client, experiment, f"tags.sweep = '{name}'")
    if runs.empty:
        raise LookupError(f"MLflow has no sweep named {name!r} in the experiment {experiment!r}")
    return _tables(name, runs, client, folder)


def read_sweeps(*, runs_dir: str | Path | None = None, mlflow_uri: str | None = None) -> list[SweepTables]:
    """All sweeps that MLflow has, by name; the newest of each name.

    Raises:
        FileNotFoundError: as for `read_sweep`.
        LookupError: there is none.
    """
    client, experiment, folder = _opened(runs_dir, mlflow_uri)
    runs = _runs(client, experiment, "")
    names = sorted(runs[_SWEEP].dropna().unique()) if _SWEEP in runs else []
    if not names:
        raise LookupError(f"MLflow has no sweep in the experiment {experiment!r}")
    return [_tables(name, runs[runs[_SWEEP] == name], client, folder) for name in names]


def best_k_table(sweeps: list[SweepTables]) -> pd.DataFrame:
    """A row for each sweep: its dataset, teacher and student, the best K, and how it stands to the baselines.

    Returns:
        The columns `sweep`, `dataset`, `teacher`, `student`, `K` (missing where none was searched), `top-1 %`, `over`, of
        `fresh seeds` or `one seed`, which is optimistic, `trials`, and a column `over NAME` for each baseline, in points.
    """
    rows = []
    for sweep in sweeps:
        given = {name: sweep.run.get(f"params.{name}") for name in ("dataset", "teacher", "student")}
        answer = sweep.finalists[sweep.finalists["is_answer"]]
        best = sweep.completed.head(1)
        if not answer.empty:
            best = sweep.trials[sweep.trials["number"] == int(answer["trial"].iloc[0])]
            value, bases = float(answer["mean"].iloc[0]), _means(sweep.finalists)
        else:
            value, bases = float(best[_VALUE].iloc[0]) if len(best) else float("nan"), sweep.baselines
        rows.append(
            {
                "sweep": sweep.name,
                **given,
                "K": int(best["k"].iloc[0]) if len(best) and "k" in best and pd.notna(best["k"].iloc[0]) else None,
                "top-1 %": value,
                "of": "one seed" if answer.empty else "fresh seeds",
                "trials": len(sweep.trials),
                **{f"over {baseline_label(base)}": value - of_base for base, of_base in bases.items()},
            }
        )
    return pd.DataFrame(rows).astype({"K": "Int64"})


def _means(finalists: pd.DataFrame) -> dict[str, float]:
    """The baselines' means over the fresh seeds."""
    others = baseline_finalists(finalists)
    return {str(arm): float(mean) for arm, mean in zip(others["arm"], others["mean"], strict=True)}


def _opened(runs_dir: str | Path | None, mlflow_uri: str | None) -> "tuple[MlflowClient, str, Path]":
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="IProgress not found")  # nothing here has a progress bar
        from mlflow import MlflowClient

    folder = runs_folder(runs_dir)
    uri = mlflow_uri or os.environ.get("MLFLOW_TRACKING_URI") or sqlite_uri(folder / "mlflow.db")
    database = sqlite_file(uri)
    if database is not None and not database.is_file():
        raise FileNotFoundError(f"{database} does not exist: run a sweep first, or set {_RUNS_VARIABLE}")
    return MlflowClient(tracking_uri=uri), os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT, folder


def _runs(client: "MlflowClient", experiment: str, query: str) -> pd.DataFrame:
    """The runs of an experiment, with the columns of `mlflow.search_runs`."""
    found = client.get_experiment_by_name(experiment)
    rows: list[dict[str, Any]] = []
    token: str | None = ""
    while found is not None and token is not None:
        page = client.search_runs([found.experiment_id], query, max_results=1000, page_token=token or None)
        for run in page:
            row: dict[str, Any] = {"run_id": run.info.run_id, "start_time": run.info.start_time}
            for kind, values in (("params", run.data.params), ("tags", run.data.tags), ("metrics", run.data.metrics)):
                row |= {f"{kind}.{name}": value for name, value in values.items()}
            rows.append(row)
        token = page.token or None
    return pd.DataFrame(rows)


def _tables(name: str, runs: pd.DataFrame, client: "MlflowClient", folder: Path) -> SweepTables:
    parents = runs[runs[_PARENT].isna()] if _PARENT in runs else runs
    run = parents.sort_values("start_time").iloc[-1]
    runs = runs[runs[_SWEEP_ID] == run[_SWEEP_ID]].dropna(axis="columns", how="all")

    def history(run_id: str, metric: str) -> list[tuple[int, float]]:
        return [(point.step, point.value) for point in client.get_metric_history(run_id, metric)]

    children = runs[runs["tags.trial_number"].notna()] if "tags.trial_number" in runs else runs[:0]
    points = [
        (int(child["tags.trial_number"]), epoch, value)
        for _, child in children.iterrows()
        for epoch, value in history(child["run_id"], _VALUE)
    ]
    curves = pd.DataFrame(points, columns=["number", "epoch", _VALUE])
    of_baselines = run.filter(regex=r"^metrics\.baseline_\w+_val_top1$").dropna().index
    baselines = {  # each was trained at several points: the best counts
        metric.split("_")[1]: max(value for _, value in history(run["run_id"], metric.removeprefix("metrics.")))
        for metric in of_baselines
    }
    trials = trials_table(runs, curves)
    return SweepTables(name, folder / name, run, runs, trials, curves, finalists_table(runs), baselines)
