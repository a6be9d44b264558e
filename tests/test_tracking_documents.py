"""What people read of a sweep in MLflow: its config, answer and report as artifacts, and a description, sent once."""

import shutil
import threading
import time
from pathlib import Path

import formulas
import pytest
from memory_mlflow import MemoryMlflow
from servers import mlflow_server
from test_tracking import client
from test_tracking import config
from test_tracking import drive
from test_tracking import drive_on
from test_tracking import ledger as _ledger
from test_tracking import new_store as _new_store
from test_tracking import pytestmark as _mlflow_warnings
from test_tracking import runs
from test_tracking import uri as _uri

from tune_topkd.execution import SimulatedExecutor
from tune_topkd.execution.simulated import simulate
from tune_topkd.ledger import Prepared
from tune_topkd.search import Search
from tune_topkd.sweep import Callback
from tune_topkd.sweep import Kind
from tune_topkd.sweep import Sweep
from tune_topkd.sweep import Workspace
from tune_topkd.sweep import track
from tune_topkd.sweep.callbacks import Watchers
from tune_topkd.sweep.documents import _escaped
from tune_topkd.sweep.maintenance import mlflow_findings
from tune_topkd.tracking import Documents
from tune_topkd.tracking import MlflowTracker
from tune_topkd.tracking import catch_up
from tune_topkd.tracking import disagreements
from tune_topkd.tracking import documents
from tune_topkd.tracking import writer

pytestmark = _mlflow_warnings
ledger, new_store, uri = _ledger, _new_store, _uri

SPACE = {
    "data": {"name": "digits"},
    "teacher": {"name": "digits_cnn", "checkpoint": None, "recipe": {"epochs": 1}},
    "student": "digits_linear",
    "recipe": {"epochs": 3, "lr": 0.1},
    "space": {"k": {"low": 1, "high": 9}, "lr": {"low": 0.01, "high": 1.0, "log": True}},
    "sweep": {"trials": 3, "asha": None, "cpus_per_trial": 1, "gpus_per_trial": 0},
    "baselines": {"methods": ["ce"], "trials": 1},
}
NOTE = "mlflow.note.content"


def measured(trial, epoch):
    return {"val_top1": formulas.value(trial.config, epoch)}


class Told(Callback):
    """What is said."""

    def __init__(self):
        self.lines = []

    def on_message(self, text, kind):
        self.lines.append((kind, text))

    @property
    def notes(self):
        return [text for kind, text in self.lines if kind is Kind.NOTE and "artifacts" in text]


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """A folder with a trained teacher, and the sweep that had it trained."""
    folder = tmp_path_factory.mktemp("teachers")
    sweep = Sweep.create(SPACE, name="first", runs_dir=folder, mlflow_uri="", address="local")
    sweep.run(executor=SimulatedExecutor(measured))
    return folder


@pytest.fixture
def create(tmp_path, teachers, uri):
    shutil.copytree(teachers / "teachers", tmp_path / "runs" / "teachers")

    def create(name="s", **about):
        about = {"mlflow_uri": uri} | about
        return Sweep.create(SPACE, name=name, runs_dir=tmp_path / "runs", address="local", **about)

    return create


def parent(uri):
    return runs(uri)[None]


def artifacts(uri):
    """The texts of the artifacts of the sweep's own run."""
    run_id = parent(uri).info.run_id
    names = [file.path for file in client(uri).list_artifacts(run_id)]
    return {name: Path(client(uri).download_artifacts(run_id, name)).read_text() for name in names}


def at_rest(sweep):
    return Workspace(sweep.workspace.runs, sweep.workspace.mlflow_uri)


def findings(sweep):
    """What an audit finds in MLflow."""
    return list(mlflow_findings("s", at_rest(sweep)))


def test_a_finished_sweep_has_its_config_its_answer_its_report_and_a_description(create, uri):
    told = Told()
    sweep = create()
    result = sweep.run([told], executor=SimulatedExecutor(measured))
    assert result.mlflow_trouble == ""
    assert told.notes == []
    found = artifacts(uri)
    assert set(found) == {"sweep.yaml", "tuned.yaml", "report.html"}
    for name in ("sweep.yaml", "tuned.yaml"):
        assert found[name] == (sweep.folder / name).read_text()
    lead = sweep.findings().lead
    assert lead in found["report.html"]
    text = parent(uri).data.tags[NOTE]
    assert text.startswith(f"**{lead}**")
    assert "- **One seed: this figure is optimistic.**" in text
    assert f"tune-topkd confirm s --runs-dir {sweep.workspace.runs}" in text
    assert "`gain_over_<method>`" in text
    assert findings(sweep) == []


def test_a_sweep_has_its_config_from_its_first_minute(create, uri):
    seen = []

    def formula(trial, epoch):
        deadline = time.monotonic() + 60
        while not seen and time.monotonic() < deadline:
            try:
                seen.extend(artifacts(uri).items())
            except Exception:  # noqa: BLE001 (the run is being made)
                time.sleep(0.05)
        return measured(trial, epoch)

    sweep = create()
    sweep.run(executor=SimulatedExecutor(formula))
    assert seen == [("sweep.yaml", (sweep.folder / "sweep.yaml").read_text())]


def test_tracking_again_sends_nothing_and_more_trials_send_the_newest(create, uri, monkeypatch):
    sweep = create()
    sweep.run(executor=SimulatedExecutor(measured))
    sent = []
    real = documents.send
    monkeypatch.setattr(writer, "send", lambda *about, **named: sent.append(about[-1]) or real(*about, **named))
    track("s", at_rest(sweep))
    assert sent == []
    Sweep.open("s", runs_dir=sweep.workspace.runs, mlflow_uri=uri).resume(
        trials=5, executor=SimulatedExecutor(measured)
    )
    assert len(sent) == 1
    assert "best of 5 trials" in artifacts(uri)["report.html"]
    assert findings(sweep) == []


def test_an_interrupted_sweep_has_no_report_until_somebody_tracks_it(create, uri):
    class Interrupted(SimulatedExecutor):
        def run(self, search, work):
            return simulate(search, measured, at_once=1, reports=5)

    sweep = create()
    assert sweep.run(executor=Interrupted(measured)).is_interrupted
    assert set(artifacts(uri)) == {"sweep.yaml"}
    assert findings(sweep) == []
    track("s", at_rest(sweep))
    assert set(artifacts(uri)) == {"sweep.yaml", "tuned.yaml", "report.html"}


def test_a_description_of_the_users_stays_and_one_of_ours_is_renewed(create, uri):
    sweep = create()
    sweep.run(executor=SimulatedExecutor(measured))
    again = Sweep.open("s", runs_dir=sweep.workspace.runs, mlflow_uri=uri)
    first = parent(uri).data.tags[NOTE]
    again.resume(trials=4, executor=SimulatedExecutor(measured))
    second = parent(uri).data.tags[NOTE]
    assert second != first
    client(uri).set_tag(parent(uri).info.run_id, NOTE, f"{second} Mine.")
    again.resume(trials=5, executor=SimulatedExecutor(measured))
    assert parent(uri).data.tags[NOTE] == f"{second} Mine."
    assert "best of 5 trials" in artifacts(uri)["report.html"]


def test_an_artifact_store_that_cannot_be_written_costs_one_note_and_nothing_else(create, uri, tmp_path):
    (tmp_path / "file").write_text("in the way")
    client(uri).create_experiment("tune_topkd", artifact_location=f"{tmp_path}/file/artifacts")
    told = Told()
    sweep = create()
    result = sweep.run([told], executor=SimulatedExecutor(measured))
    assert (result.reason, result.mlflow_trouble) == ("finished", "")
    (note,) = told.notes
    assert "/file/artifacts" in note
    assert note.endswith("; `track s` sends them")
    assert parent(uri).data.tags[NOTE].startswith(f"**{sweep.findings().lead}**")
    assert disagreements(sweep.folder / "ledger.jsonl", uri) == []
    assert [line for line in findings(sweep) if line.startswith("the sweep: has no artifacts")]
    (tmp_path / "file").unlink()
    told = Told()
    track("s", at_rest(sweep), Watchers([told]))
    assert told.notes == []
    assert set(artifacts(uri)) == {"sweep.yaml", "tuned.yaml", "report.html"}
    assert findings(sweep) == []


def test_a_report_that_cannot_be_made_costs_a_note(create, uri, monkeypatch):
    monkeypatch.setattr("tune_topkd.sweep.documents.page_of", lambda found: 1 / 0)
    told = Told()
    result = create().run([told], executor=SimulatedExecutor(measured))
    assert (result.reason, result.mlflow_trouble) == ("finished", "")
    assert "they cannot be made: ZeroDivisionError" in told.notes[0]
    assert set(artifacts(uri)) <= {"sweep.yaml"}


def test_an_artifact_that_somebody_removed_is_found(create, uri, tmp_path):
    sweep = create()
    sweep.run(executor=SimulatedExecutor(measured))
    (file,) = (Path(uri.removeprefix("sqlite:///")).parent / "mlartifacts").rglob("report.html")
    file.unlink()
    assert "the sweep: artifact report.html is missing" in findings(sweep)


# --- whatever fails ---------------------------------------------------------------------------------------------------


@pytest.fixture
def memory(monkeypatch):
    store = MemoryMlflow()
    monkeypatch.setattr(writer, "client_of", lambda uri: store)
    return store


def author(are_all):
    return Documents({"a.txt": "a", "b.txt": "b"}, "# The answer")


def files(store):
    (run,) = (run for run in store.runs.values() if run["tags"]["kind"] == "sweep" and run["stage"] == "active")
    return run["files"], {name: run["tags"].get(name) for name in (NOTE, documents.ARTIFACTS_TAG)}


def test_a_failure_at_any_request_changes_nothing_in_the_end(ledger, monkeypatch):
    ledger.append(Prepared(identities={"data": "d"}))
    drive(Search(config(), ledger))
    undisturbed = MemoryMlflow()
    monkeypatch.setattr(writer, "client_of", lambda uri: undisturbed)
    writer._Writer(ledger.path, "memory", author).catch_up()
    wanted, count = files(undisturbed), len(undisturbed.calls)
    assert wanted[0] == {"a.txt": "a", "b.txt": "b"}
    assert wanted[1] == {NOTE: "# The answer", "artifacts": f"a.txt, b.txt of line {ledger.state.last_seq + 1}"}
    first = undisturbed.calls.index("log_text") - 2
    for place in range(first, count):
        for when in ("before", "after"):
            store = MemoryMlflow()
            monkeypatch.setattr(writer, "client_of", lambda uri, store=store: store)

            def fail(number, at, place=place, when=when):
                if (number, at) == (place, when):
                    raise ConnectionError("no answer")

            store.fail = fail
            follower = writer._Writer(ledger.path, "memory", author)
            try:
                follower.catch_up()
            except ConnectionError:
                follower.catch_up()
            assert files(store) == wanted, (undisturbed.calls[place], when)
            assert follower.skipped == ""


def test_a_store_that_hangs_holds_up_no_metric_and_is_not_asked_again(ledger, memory, monkeypatch):
    monkeypatch.setattr(documents, "LONGEST_UPLOAD_SECONDS", 0.05)
    released = threading.Event()
    memory_log_text = memory.log_text
    asked = []

    def hang(run_id, text, name):
        asked.append(name)
        released.wait(60)
        memory_log_text(run_id, text, name)

    monkeypatch.setattr(MemoryMlflow, "log_text", staticmethod(hang))
    drive(Search(config(), ledger), ends=3)
    ledger.append(Prepared())
    tracker = MlflowTracker(ledger.path, "memory", author)
    drive_on(ledger, tracker)
    tracker.close()
    assert tracker.is_caught_up
    assert "cannot be written: no answer for 0 s" in tracker.skipped
    assert {run["status"] for run in memory.runs.values()} == {"FINISHED", "KILLED", "FAILED"}
    assert len(asked) <= 4, "two attempts at each of two lines of the ledger"
    released.set()


def test_a_servers_folder_that_is_not_here_is_not_made_here(tmp_path):
    for there, uri, is_foreign in (
        (f"{tmp_path}/elsewhere/1/run/artifacts", "http://host:5000", True),
        (f"file://{tmp_path}/elsewhere/1/run/artifacts", "https://host", True),
        (f"file://{tmp_path}/here/1/run/artifacts", "http://host:5000", False),
        ("mlflow-artifacts:/1/run/artifacts", "http://host:5000", False),
        ("s3://bucket/1/run/artifacts", "http://host:5000", False),
        (f"{tmp_path}/elsewhere/1/run/artifacts", "sqlite:///mlflow.db", False),
    ):
        (tmp_path / "here").mkdir(exist_ok=True)
        told = documents._foreign_store(uri, there)
        assert bool(told) is is_foreign, there
        assert not is_foreign or f"keeps artifacts in {tmp_path}/elsewhere" in told
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("is_foreign", [True, False])
def test_behind_a_server_artifacts_go_through_it_or_are_left_out(create, uri, tmp_path, is_foreign):
    root = tmp_path / "of the server"
    options = ("--no-serve-artifacts", "--default-artifact-root", str(root)) if is_foreign else ()
    options = options or ("--artifacts-destination", str(root))
    with mlflow_server(uri, *options) as server:
        if is_foreign:  # as if the server were on another machine
            shutil.rmtree(root, ignore_errors=True)
        told = Told()
        sweep = create(mlflow_uri=server.uri)
        assert sweep.run([told], executor=SimulatedExecutor(measured)).mlflow_trouble == ""
        assert len(told.notes) == is_foreign
        found = [file.path for file in client(server.uri).list_artifacts(parent(server.uri).info.run_id)]
        assert sorted(found) == ([] if is_foreign else ["report.html", "sweep.yaml", "tuned.yaml"])
        assert parent(server.uri).data.tags[NOTE].startswith(f"**{sweep.findings().lead}**")
    assert disagreements(sweep.folder / "ledger.jsonl", uri) == []
    assert root.exists() is not is_foreign


def test_a_text_of_any_origin_is_no_markdown():
    assert _escaped("a_b *c*\n<img src=x> [d](e) `f`") == r"a\_b \*c\* \<img src=x\> \[d\](e) \`f\`"


def test_without_an_author_nothing_is_due(ledger, uri):
    drive(Search(config(), ledger))
    assert catch_up(ledger.path, uri) == ""
    assert artifacts(uri) == {}
    assert disagreements(ledger.path, uri) == []
    assert disagreements(ledger.path, uri, documents=True) == [
        f"the sweep: has no artifacts, should be of line {ledger.state.last_seq + 1}"
    ]
