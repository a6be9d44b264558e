"""A sweep as Optuna studies: what Optuna, and its dashboard, read back is what the ledger has."""

import json
import os
import random
import re
import shutil
import sqlite3
import subprocess
import sys
import urllib.request
from pathlib import Path

import formulas
import optuna
import pytest
from optuna.trial import TrialState
from servers import free_port
from servers import wait_for
from test_analysis import HEADER
from test_analysis import sweep_events

from tune_topkd.config import ConfigError
from tune_topkd.ledger import Header
from tune_topkd.ledger import Ledger
from tune_topkd.ledger import Start
from tune_topkd.ledger import Suggest
from tune_topkd.ledger import TrialKey
from tune_topkd.ledger import TrialStatus
from tune_topkd.sweep.study import write_study

STATES = {
    TrialStatus.COMPLETED: TrialState.COMPLETE,
    TrialStatus.PRUNED: TrialState.PRUNED,
    TrialStatus.FAILED: TrialState.FAIL,
    TrialStatus.RUNNING: TrialState.RUNNING,
}
CONFIG = formulas.sweep_config()


@pytest.fixture(scope="module")
def state(tmp_path_factory):
    """40 trials, four of baselines, and one under way."""
    path = tmp_path_factory.mktemp("sweep") / "ledger.jsonl"
    with Ledger.create(path, Header(sweep="formula", id="one", **HEADER)) as ledger:
        *events, _ = sweep_events(random.Random(3), 40)
        ledger.append(*events)
        key, params = TrialKey("search", 40), ledger.state.arm("search")[0].params
        ledger.append(Suggest(key=key, proposal=params, params=params), Start(key=key, attempt=1))
        return ledger.state


@pytest.fixture
def written(state, tmp_path):
    assert write_study(tmp_path / "study.db", CONFIG, state) == ["formula", "formula/ce", "formula/kd"]
    return tmp_path / "study.db"


def test_every_trial_is_there_with_its_state_its_curve_and_its_parameters(written, state):
    study = optuna.load_study(study_name="formula", storage=f"sqlite:///{written}")
    records = state.arm("search")
    assert {r.status for r in records} == set(STATES)
    assert len(study.trials) == len(records) == 41
    for trial, record in zip(study.trials, records, strict=True):
        assert trial.number == record.key.number
        assert trial.state == STATES[record.status]
        assert trial.params == record.params
        assert trial.intermediate_values == {epoch: m["val_top1"] for epoch, m in record.reports.items()}
        assert trial.value == (record.value if record.status is TrialStatus.COMPLETED else trial.value)
        assert trial.user_attrs.get("reason", "") == record.reason
        assert trial.datetime_start.timestamp() == pytest.approx(record.suggested_at)
    assert study.best_trial.number == state.best().key.number
    assert study.best_value == state.best().value
    distribution = study.best_trial.distributions["k"]
    assert (distribution.low, distribution.high, distribution.log) == (1, 20, True)
    assert study.user_attrs["tune_topkd.sweep"] == "formula"
    assert optuna.importance.get_param_importances(study)


def test_each_baseline_is_a_study_of_its_own(written, state):
    study = optuna.load_study(study_name="formula/kd", storage=f"sqlite:///{written}")
    assert [trial.value for trial in study.trials] == [r.value for r in state.arm("kd")]
    assert study.user_attrs["method"] == "kd"


def test_an_export_is_replaced_and_nothing_else_is(written, state, tmp_path):
    before = written.read_bytes()
    write_study(written, CONFIG, state)
    assert len(optuna.load_study(study_name="formula", storage=f"sqlite:///{written}").trials) == 41
    assert written.stat().st_size == pytest.approx(len(before), rel=0.1)
    text, other, foreign = tmp_path / "a.txt", tmp_path / "other.db", tmp_path / "foreign.db"
    text.write_text("mine")
    with sqlite3.connect(other) as database:
        database.execute("create table mine (a int)")
    optuna.create_study(storage=f"sqlite:///{foreign}", study_name="mine")
    for path in (text, other, foreign, tmp_path):
        content = path.read_bytes() if path.is_file() else b""
        with pytest.raises(ConfigError, match="is there already and is no such export"):
            write_study(path, CONFIG, state)
        assert (path.read_bytes() if path.is_file() else b"") == content
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.txt", "foreign.db", "other.db", "study.db"]


def test_a_file_that_cannot_be_written_leaves_nothing_behind(state, tmp_path, monkeypatch):
    monkeypatch.setattr("tune_topkd.sweep.study._write", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_study(tmp_path / "study.db", CONFIG, state)
    assert list(tmp_path.iterdir()) == []


def answers(url):
    try:
        return urllib.request.urlopen(url, timeout=1).status == 200
    except OSError:
        return False


@pytest.fixture
def dashboard(written, tmp_path):
    pytest.importorskip("optuna_dashboard")
    url = f"http://127.0.0.1:{(port := free_port())}"
    command = [str(Path(sys.executable).parent / "optuna-dashboard"), f"sqlite:///{written}", "--port", str(port)]
    with (tmp_path / "log").open("w") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            wait_for(lambda: answers(f"{url}/dashboard/"), process)
            yield url
        finally:
            process.kill()


@pytest.mark.slow
def test_the_dashboard_shows_every_state_as_it_is(dashboard, state):
    with urllib.request.urlopen(f"{dashboard}/api/studies", timeout=10) as answer:
        studies = json.loads(answer.read())["study_summaries"]
    assert sorted(study["study_name"] for study in studies) == ["formula", "formula/ce", "formula/kd"]
    number = next(study["study_id"] for study in studies if study["study_name"] == "formula")
    with urllib.request.urlopen(f"{dashboard}/api/studies/{number}?after=0", timeout=10) as answer:
        trials = json.loads(answer.read())["trials"]
    counts = {
        of: sum(trial["state"].lower() == of for trial in trials) for of in ("complete", "pruned", "fail", "running")
    }
    told = state.counts()
    assert counts == {
        "complete": told["completed"],
        "pruned": told["pruned"],
        "fail": told["failed"],
        "running": told["running"],
    }


@pytest.mark.slow
@pytest.mark.browser
def test_its_page_draws_the_search(dashboard, tmp_path):
    sync_api = pytest.importorskip("playwright.sync_api")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("no Chromium")
    with sync_api.sync_playwright() as playwright:
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=chromium, args=arguments)
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.goto(f"{dashboard}/dashboard/")
        page.get_by_text(re.compile(r"^\d+\. formula$")).click()
        page.wait_for_selector(".js-plotly-plot .point, .js-plotly-plot path.js-line", state="attached", timeout=60_000)
        assert page.locator(".js-plotly-plot").count() >= 2
        page.screenshot(path=os.environ.get("SCREENSHOT") or tmp_path / "dashboard.png", full_page=True)
        browser.close()
