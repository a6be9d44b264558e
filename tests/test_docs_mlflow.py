"""docs/mlflow.md is true: its queries find what it says, in a sweep that was confirmed."""

import contextlib
import re
import shutil
from pathlib import Path

import formulas
import mlflow
import pytest
from test_tracking import pytestmark as _mlflow_warnings

from tune_topkd.config import read_yaml
from tune_topkd.execution import SimulatedExecutor
from tune_topkd.ledger import TrialStatus
from tune_topkd.ledger import read_state
from tune_topkd.ledger import winner_of
from tune_topkd.sweep import Sweep
from tune_topkd.tracking import sqlite_uri
from tune_topkd.verdict import verdict_of

pytestmark = _mlflow_warnings

TEXT = (Path(__file__).parents[1] / "docs" / "mlflow.md").read_text()
QUERIES = re.findall(r"^```python\n(.*?)^```", TEXT, re.M | re.S)
SPACE = {
    "data": {"name": "digits"},
    "teacher": {"name": "digits_linear", "recipe": {"epochs": 1}},
    "student": "digits_linear",
    "recipe": {"epochs": 9, "lr": 0.1},
    "space": {"k": {"low": 1, "high": 9}, "lr": {"low": 0.01, "high": 1.0, "log": True}},
    "sweep": {
        "trials": 8, "startup_trials": 4, "asha": {"grace_epochs": 3, "reduction_factor": 2}, "cpus_per_trial": 1,
        "gpus_per_trial": 0, "points": [{"k": 4, "lr": 0.1}, {"k": 9, "lr": 0.1}],
        "finalists": {"count": 2, "seeds": 2},
    },
    "baselines": {"methods": ["ce", "kd"], "trials": 2},
}  # fmt: skip


def measured(trial, epoch):
    record, config = trial.record, trial.config
    if record.key == ("search", 3):
        return {"val_top1": float("nan")}
    value = formulas.value(config, epoch) + 0.1 * (config.seed % 3) - 5.0 * (record.origin.arm == "ce")
    name = "test_top1" if record.key.arm == "test" else "val_top1"
    return {name: value, "epoch_seconds": 1.0} if epoch == 9 or name == "val_top1" else {"epoch_seconds": 1.0}


@pytest.fixture(scope="module")
def found(tmp_path_factory, empty_store):
    """What the page's code finds, by the names that it gives, and the sweep's state."""
    place = tmp_path_factory.mktemp("docs")
    with contextlib.chdir(place):
        Path("runs").mkdir()
        shutil.copyfile(empty_store, "runs/mlflow.db")
        about = {"runs_dir": "runs", "mlflow_uri": sqlite_uri(place / "runs" / "mlflow.db"), "address": "local"}
        Sweep.create(SPACE, name="digits", **about).run(executor=SimulatedExecutor(measured))
        Sweep.open("digits", **about).confirm(finalists=2, seeds=2, executor=SimulatedExecutor(measured))
        names, before = {}, mlflow.get_tracking_uri()
        try:
            for query in QUERIES:
                exec(query, names)
            names["every"] = mlflow.search_runs(experiment_names=["tune_topkd"])
        finally:
            mlflow.set_tracking_uri(before)
        names["tuned"] = read_yaml(Path(names["tuned"]))
        return names, read_state(Path("runs/digits/ledger.jsonl"))


def numbers(frame):
    return [int(number) for number in frame["tags.trial_number"]]


def test_the_sweeps_query_finds_the_sweep(found):
    names, state = found
    (row,) = names["sweeps"].to_dict("records")
    assert row["tags.mlflow.runName"] == "digits"
    assert row["metrics.best_trial"] == winner_of(state).record.key.number
    (gain,) = (gain for gain in verdict_of(state).gains if gain.base.name == "cross-entropy")
    assert row["metrics.gain_over_ce"] == pytest.approx(gain.mean)
    assert row["metrics.cpu_hours"] > 0
    assert list(names["worth_it"]["run_id"]) == [row["run_id"]]


def test_the_queries_of_trials_find_them_by_how_they_ended(found):
    names, state = found
    assert numbers(names["best"]) == [record.key.number for record in state.ranked()[:5]]
    by_status = {s: {r.key.number for r in state.arm("search") if r.status is s} for s in TrialStatus}
    assert set(numbers(names["stopped"])) <= by_status[TrialStatus.PRUNED]
    assert len(names["stopped"]) > 0
    assert set(numbers(names["failed"])) == by_status[TrialStatus.FAILED] == {3}
    assert set(numbers(names["of_k"])) == {r.key.number for r in state.arm("search") if r.params["k"] == 4}
    assert [point.step for point in sorted(names["curve"], key=lambda p: p.step)] == list(range(1, 10))


def test_the_queries_of_baselines_and_seeds_find_these(found):
    names, state = found
    assert set(names["kd"]["tags.mlflow.runName"]) == {"kd-0000", "kd-0001"}
    assert set(names["baselines"]["tags.mlflow.runName"]) == {"kd-0000", "kd-0001", "ce-0000", "ce-0001"}
    best = winner_of(state).record
    assert str(best.key) in names["fresh"].index
    assert (names["fresh"]["std"] > 0).all()
    assert len(names["tested"]) == 3
    values = [record.value for record in state.arm("test") if record.origin == best.key]
    assert names["tested"].loc[str(best.key), "mean"] == pytest.approx(sum(values) / 2)


def test_the_tuned_config_is_there_as_a_file(found):
    names, _ = found
    assert names["tuned"]["loss"]["k"] == 4


def test_the_table_names_the_runs_as_they_are(found):
    names, _ = found
    shapes = {
        kind: {re.sub(r"\d+", "#", n) for n in group["tags.mlflow.runName"]}
        for kind, group in names["every"].groupby("tags.kind")
    }
    table = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", TEXT, re.M))
    told = {
        kind: {re.sub(r"\d+", "#", name) for name in re.findall(r"`([^`]+)`", cell)} for kind, cell in table.items()
    }
    del told["kind"]  # the heading
    told["baseline"] |= {"ce-#"}
    told["finalist"] |= {"ce-#, seed #"}
    told["test"] |= {"ce-#, seed #, test", "kd-#, seed #, test"}
    assert shapes == told
