"""The notebooks, executed on a sweep of formula trials that went through the real ledger and tracker."""

import math
import os
import random
import re
import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tune_topkd import report
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

FOLDER = Path(__file__).parents[1] / "analysis"
ANSWER, SEARCH, BEST_K, PROJECT = "01-one-sweep", "02-how-the-search-went", "03-best-k", "04-in-your-own-project"
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
    client = NotebookClient(notebook, timeout=60, resources={"metadata": {"path": str(FOLDER)}})
    return client.execute(env=env)


def stored(name):
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


@pytest.fixture(scope="module")
def executed(sweep):
    """Gives a notebook as it is after its cells have run, each once."""
    known = {}

    def executed(name):
        if name not in known:
            known[name] = execute(stored(name), sweep[0], "formula")
        return known[name]

    return executed


def outputs(notebook, mime):
    return [
        output.data[mime]
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if "data" in output and mime in output.data
    ]


def test_there_are_these():
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == [ANSWER, SEARCH, BEST_K, PROJECT]


@pytest.mark.slow
@pytest.mark.parametrize("name", [ANSWER, SEARCH, BEST_K, PROJECT])
def test_is_stored_without_outputs_and_says_nothing_but_its_results(executed, name):
    notebook = stored(name)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)
    assert notebook.cells[0].source.startswith("# ")
    done = [cell for cell in executed(name).cells if cell.cell_type == "code"]
    kinds = {output.output_type for cell in done for output in cell.outputs}
    told = [output.text for cell in done for output in cell.outputs if output.output_type == "stream"]
    assert told == []
    assert kinds <= {"execute_result", "display_data"}  # no error, and no warning on a stream
    assert all(cell.outputs for cell in done if not cell.source.rstrip().endswith(("()", '"runs")'))), (
        "each shows a result"
    )


def test_the_answer_comes_first(executed, sweep):
    best = sweep[1].best()
    first = next(cell for cell in executed(ANSWER).cells if cell.cell_type == "code" and cell.outputs)
    assert first.outputs[0].data["text/markdown"].startswith(f"## K = {best.params['k']}, {best.value:.1f} % (+")
    assert len(outputs(executed(ANSWER), "image/png")) == 1


def test_reads_the_newest_sweep_of_the_name(executed, sweep):
    counts = sweep[1].counts()
    overview = next(table for table in outputs(executed(ANSWER), "text/html") if "trials completed" in table)
    assert counts["pruned"] > 10, "the formula must let ASHA stop some"
    assert counts["completed"] > 8, "the formula must let some complete"
    for status in ("completed", "pruned", "failed"):
        assert f"<th>trials {status}</th>\n      <td>{counts[status]}</td>" in overview
    assert "<td>second</td>" in overview
    assert "<th>baseline kd (%)</th>" in overview


def test_gives_the_ledgers_answer(executed, sweep):
    best = sweep[1].best()
    answer = next(text for text in outputs(executed(ANSWER), "text/markdown") if "| parameter |" in text)
    assert f"| k | {best.params['k']} |" in answer
    assert f"| temperature | {best.params['temperature']:.4g} |" in answer


def test_ranks_the_completed_trials_only(executed, sweep):
    table = next(table for table in outputs(executed(ANSWER), "text/html") if "contrastive_weight" in table)
    numbers = [int(number) for number in re.findall(r"<th>(\d+)</th>", table)]
    assert numbers == [record.key.number for record in sweep[1].ranked()[:10]]


@pytest.mark.slow
def test_draws_how_the_search_went_and_what_stopping_saved(executed, sweep):
    assert len(outputs(executed(SEARCH), "image/png")) == 4
    epochs = sum(record.epoch for record in sweep[1].arm("search"))
    assert f"{epochs} of {TRIALS * EPOCHS} epochs" in outputs(executed(SEARCH), "text/markdown")[-1]


@pytest.mark.slow
def test_every_sweep_has_a_row_with_its_best_k(executed, sweep):
    best = sweep[1].best()
    table = outputs(executed(BEST_K), "text/html")[0]
    (row,) = [line for line in re.findall(r"<tr>.*?</tr>", table, re.DOTALL) if "<th>formula</th>" in line]
    cells = re.findall(r"<td>(.*?)</td>", row)
    gains = [round(best.value - max(r.value for r in sweep[1].arm(arm)), 2) for arm in ("ce", "kd")]
    assert cells[:6] == [
        "digits",
        "digits_cnn",
        "digits_cnn_tiny",
        str(best.params["k"]),
        f"{best.value:.2f}",
        "one seed",
    ]
    assert [float(cell) for cell in cells[7:9]] == pytest.approx(gains, abs=0.01)
    assert len(outputs(executed(BEST_K), "image/png")) == 1


@pytest.mark.slow
def test_a_project_takes_the_loss_without_the_search(executed):
    code = "\n".join(cell.source for cell in stored(PROJECT).cells if cell.cell_type == "code")
    assert not re.search(r"import (ray|optuna|mlflow)|tune_topkd\.(sweep|report|tracking)", code)
    (step,) = [cell for cell in executed(PROJECT).cells if cell.source.endswith(".item(), 4)}")]
    loss, gradient = map(float, re.findall(r"[\d.]+", step.outputs[0].data["text/plain"]))
    assert loss > 0
    assert gradient > 0


@pytest.fixture
def clean(monkeypatch):
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "TUNE_TOPKD_SWEEP", "TUNE_TOPKD_RUNS_DIR"):
        monkeypatch.delenv(name, raising=False)


def test_a_missing_database_is_not_created(clean, tmp_path):
    for read in (report.read_sweep, report.read_sweeps):
        with pytest.raises(FileNotFoundError, match=r"mlflow\.db does not exist: run a sweep first"):
            read(runs_dir=tmp_path)
    assert not any(tmp_path.iterdir())


def test_an_unknown_sweep_is_named(clean, sweep, empty_store, tmp_path):
    with pytest.raises(LookupError, match="no sweep named 'other' in the experiment 'tune_topkd'"):
        report.read_sweep("other", runs_dir=sweep[0])
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    with pytest.raises(LookupError, match="no sweep in the experiment 'tune_topkd'"):
        report.read_sweeps(runs_dir=tmp_path)


def test_the_tables_are_the_ledgers(clean, sweep):
    runs, state = sweep
    found = report.read_sweep("formula", runs_dir=runs)
    assert found.value_at_end.to_dict() == {r.key.number: r.value for r in state.ranked()}
    assert found.rungs == list(RUNGS)
    first = {r.key.number: r.reports[RUNGS[0]]["val_top1"] for r in state.arm("search") if r.epoch >= RUNGS[0]}
    assert found.value_at_first_rung.to_dict() == first
    numbers = {r.key.number: r.params["k"] for r in state.arm("search")}
    assert {number: params["k"] for number, params in found.parameters.items()} == numbers
    assert "lr" in found.logarithmic
    assert "shift" not in found.logarithmic
