"""The notebook, executed on a sweep of formula trials that went through the real ledger and tracker."""

import copy
import math
import os
import random
import re
import shutil
from pathlib import Path

import mlflow
import nbformat
import pytest
from nbclient import NotebookClient

from tune_topkd.config import config_from
from tune_topkd.export import as_yaml
from tune_topkd.export import tuned_config
from tune_topkd.ledger import Decision
from tune_topkd.ledger import Driver
from tune_topkd.ledger import End
from tune_topkd.ledger import Header
from tune_topkd.ledger import Ledger
from tune_topkd.ledger import Report
from tune_topkd.ledger import Start
from tune_topkd.ledger import Stop
from tune_topkd.ledger import Suggest
from tune_topkd.ledger import TeacherFile
from tune_topkd.ledger import TrialKey
from tune_topkd.ledger import TrialStatus
from tune_topkd.tracking import catch_up

NOTEBOOK = Path(__file__).parents[1] / "analysis" / "sweep.ipynb"
TRIALS, EPOCHS, RUNGS = 40, 12, (2, 6)
HEADER = {
    "trials": TRIALS, "epochs": EPOCHS, "seed": 0, "baselines": 4, "metric": "val_top1", "digest": "d" * 16,
    "space_digest": "s" * 16, "dataset": "digits", "teacher": "digits_cnn", "student": "digits_cnn_tiny",
    "method": "topkd", "teacher_file": TeacherFile("t" * 16, 98.0), "versions": {"python": "3.11"},
}  # fmt: skip


def draw(rng):
    """Parameters of one trial, in the ranges of the checked-in spaces."""
    log = lambda low, high: math.exp(rng.uniform(math.log(low), math.log(high)))  # noqa: E731
    top = rng.uniform(1, 4)
    weights = [log(0.1, 10) for _ in range(3)]
    return {
        "k": round(log(1, 9)), "scale_top": top, "scale_last": rng.uniform(1, top), "scale_gt": rng.uniform(top, 6),
        "shift": rng.random(), "alpha": log(0.1, 10), "beta": log(0.1, 10), "temperature": log(0.02, 5),
        "normalize": rng.random() < 0.5, "ce_weight": 3 * weights[0] / sum(weights),
        "tdl_weight": 3 * weights[1] / sum(weights), "contrastive_weight": 3 * weights[2] / sum(weights),
        "lr": log(0.005, 0.5),
    }  # fmt: skip


def value(params, epoch):
    """Validation top-1: best near K = 4 and a learning rate of 0.05."""
    top = 96 - 1.5 * abs(math.log(params["k"] / 4)) - 2 * abs(math.log10(params["lr"] / 0.05))
    return round(top - 40 * math.exp(-epoch / 2), 2)


def trial_events(arm, number, params, stop_at, status, reason):
    key = TrialKey(arm, number)
    yield Suggest(key=key, proposal=params, params=params)
    yield Start(key=key, attempt=1)
    for epoch in range(1, stop_at + 1):
        metrics = {"val_top1": value(params, epoch), "train_loss": 1 / epoch, "lr": params["lr"], "epoch_seconds": 0.1}
        yield Report(key=key, epoch=epoch, metrics=metrics, decision=Decision.CONTINUE)
    final = None if status is TrialStatus.FAILED else value(params, stop_at)
    yield End(key=key, epoch=stop_at, status=status, reason=reason, value=final)


def sweep_events(rng, trials):
    yield Driver(host="here", pid=1, trials=trials)
    held = {rung: [] for rung in RUNGS}
    for number in range(trials):
        params, stop_at, status, reason = draw(rng), EPOCHS, TrialStatus.COMPLETED, "full budget"
        for rung in RUNGS:
            held[rung].append(value(params, rung))
            if value(params, rung) < sorted(held[rung])[-math.ceil(len(held[rung]) / 2)]:
                stop_at, status, reason = rung, TrialStatus.PRUNED, f"asha at epoch {rung}"
                break
        if number == 7:
            stop_at, status, reason = 1, TrialStatus.FAILED, "diverged"
        yield from trial_events("search", number, params, stop_at, status, reason)
    for arm in ("ce", "kd"):
        for number, lr in enumerate((0.01, 0.1)):
            params = {"k": 9, "lr": lr}
            yield from trial_events(arm, number, params, EPOCHS, TrialStatus.COMPLETED, "full budget")
    yield Stop(reason="finished")


def write_sweep(runs, name, sweep_id, trials):
    """A sweep's folder and its runs in MLflow; its state."""
    folder = runs / f"{name}-{sweep_id}"
    folder.mkdir()
    with Ledger.create(folder / "ledger.jsonl", Header(sweep=name, id=sweep_id, **HEADER)) as ledger:
        ledger.append(*sweep_events(random.Random(sweep_id), trials))
        catch_up(ledger.path, f"sqlite:///{runs / 'mlflow.db'}")
        return ledger.state


@pytest.fixture(scope="module")
def sweep(tmp_path_factory, empty_store):
    """A runs folder with a sweep of 40 trials, and before it a shorter one of the same name; the state of the former."""
    runs = tmp_path_factory.mktemp("runs")
    shutil.copy(empty_store, runs / "mlflow.db")
    write_sweep(runs, "formula", "first", 2)
    state = write_sweep(runs, "formula", "second", TRIALS)
    raw = {
        "data": {"name": "digits"},
        "teacher": {"name": "digits_cnn", "recipe": {"epochs": 1}},
        "student": "digits_cnn_tiny",
        "recipe": {"epochs": EPOCHS},
        "space": {"k": {"low": 1, "high": 9}},
    }
    (runs / "formula").mkdir()
    (runs / "formula" / "tuned.yaml").write_text(as_yaml(tuned_config(config_from(raw, "test"), state, {})))
    return runs, state


def execute(notebook, runs, name):
    env = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW", "TUNE_TOPKD"))}
    env |= {"TUNE_TOPKD_RUNS_DIR": str(runs), "TUNE_TOPKD_SWEEP": name}
    client = NotebookClient(notebook, timeout=60, resources={"metadata": {"path": str(NOTEBOOK.parent)}})
    return client.execute(env=env)


@pytest.fixture(scope="module")
def stored():
    return nbformat.read(NOTEBOOK, as_version=4)


@pytest.fixture(scope="module")
def executed(sweep, stored):
    return execute(copy.deepcopy(stored), sweep[0], "formula")


def outputs(notebook, mime):
    return [
        output.data[mime]
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if "data" in output and mime in output.data
    ]


def test_is_stored_without_outputs(stored):
    nbformat.validate(stored)
    assert stored.metadata.kernelspec.name == "python3"
    code = [cell for cell in stored.cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)


def test_says_nothing_but_its_results(executed):
    kinds = {output.output_type for cell in executed.cells if cell.cell_type == "code" for output in cell.outputs}
    assert kinds <= {"execute_result", "display_data"}  # no error, and no warning on a stream


def test_draws_its_figures(executed):
    assert len(outputs(executed, "image/png")) == 5


def test_reads_the_newest_sweep_of_the_name(executed, sweep):
    _, state = sweep
    overview = outputs(executed, "text/html")[0]
    counts = state.counts()
    assert counts["pruned"] > 10, "the formula must let ASHA stop some"
    assert counts["completed"] > 8, "the formula must let some complete"
    for status in ("completed", "pruned", "failed"):
        assert f"<th>trials {status}</th>\n      <td>{counts[status]}</td>" in overview
    assert "<td>second</td>" in overview
    assert "<th>baseline kd (%)</th>" in overview


def test_gives_the_ledgers_answer(executed, sweep):
    best = sweep[1].best()
    answer = outputs(executed, "text/markdown")[-1]
    assert answer.startswith(f"**K = {best.params['k']}, {best.value:.1f} % (+")
    assert f"| k | {best.params['k']} |" in answer
    assert f"| temperature | {best.params['temperature']:.4g} |" in answer


def test_ranks_the_completed_trials_only(executed, sweep):
    table = outputs(executed, "text/html")[2]
    numbers = [int(number) for number in re.findall(r"<th>(\d+)</th>", table)]
    assert numbers == [record.key.number for record in sweep[1].ranked()[:10]]


@pytest.fixture
def run_here(stored, monkeypatch):
    """Runs the first code cells in this process, which is faster than a kernel; what they raise is raised."""
    yield lambda runs, name, cells: exec("\n".join(first_code(stored, cells)), environment(monkeypatch, runs, name))
    mlflow.set_tracking_uri("")


def first_code(notebook, count):
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return [line for source in code[:count] for line in source.splitlines() if not line.startswith("%")]


def environment(monkeypatch, runs, name):
    """The globals to run in, once the notebook's variables are set; MLflow sets its own as well."""
    monkeypatch.setenv("TUNE_TOPKD_RUNS_DIR", str(runs))
    monkeypatch.setenv("TUNE_TOPKD_SWEEP", name)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    return {"__name__": "notebook"}


def test_a_missing_database_is_not_created(run_here, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"mlflow\.db does not exist: run a sweep first"):
        run_here(tmp_path, "formula", cells=1)
    assert not any(tmp_path.iterdir())


def test_an_unknown_sweep_is_named(run_here, sweep):
    with pytest.raises(LookupError, match="no sweep named 'other' in the experiment 'tune_topkd'"):
        run_here(sweep[0], "other", cells=2)
