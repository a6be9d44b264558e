"""Which MLflow is meant, where its database lies, what to do when something is wrong there, how little is asked of it."""

import os
import shlex
import shutil
import sqlite3
import threading
from importlib.metadata import EntryPoint

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

from tune_topkd import tracking
from tune_topkd.config import ConfigError
from tune_topkd.search import Search
from tune_topkd.sweep import Workspace
from tune_topkd.sweep import maintenance
from tune_topkd.sweep import preflight
from tune_topkd.tracking import MlflowTracker
from tune_topkd.tracking import TrackingError
from tune_topkd.tracking import catch_up
from tune_topkd.tracking import disagreements
from tune_topkd.tracking import projection
from tune_topkd.tracking import sqlite_file
from tune_topkd.tracking import sqlite_uri
from tune_topkd.tracking import store
from tune_topkd.tracking import ui_command
from tune_topkd.tracking import writer

pytestmark = _mlflow_warnings
ledger, new_store, uri = _ledger, _new_store, _uri


# Which MLflow


@pytest.mark.parametrize(
    "accepted",
    [
        "databricks", "databricks://profile", "http://host:5000", "https://u:p@host/path", "sqlite:///a b/mlflow.db",
        "sqlite:////runs/x?timeout=5", "postgresql://db/ml", "postgresql+psycopg2://db/ml", "mysql+pymysql://u@db/ml",
        "mssql+pyodbc:///?odbc_connect=x", "SQLITE:///x.db",
    ],
)  # fmt: skip
def test_the_uris_that_mlflow_takes_are_accepted(accepted):
    preflight.check_mlflow_uri(accepted)


@pytest.mark.parametrize(
    ("refused", "words"),
    [
        ("mlruns", ["sqlite:///mlruns/mlflow.db", "MLFLOW_ALLOW_FILE_STORE=true", "migrate-filestore"]),
        ("file:///a/mlruns", ["sqlite:////a/mlruns/mlflow.db", "MLFLOW_ALLOW_FILE_STORE=true"]),
        ("file:mlruns", ["sqlite:///mlruns/mlflow.db"]),
        ("./mlruns", ["sqlite:///./mlruns/mlflow.db"]),
        ("databricks-uc", ["registry of models", "databricks://<profile>"]),
        ("databricks-uc://profile", ["registry of models"]),
        ("uc:http://host", ["registry of models"]),
        ("postgres://db/ml", ["postgresql://"]),
        ("sqlite:x.db", ["known: sqlite://"]),
        ("sqlite:///:memory:", ["in memory"]),
        ("sqlite://", ["in memory"]),
        ("ftp://host", ["known: sqlite://", "databricks"]),
        ("azureml://host", ["known: sqlite://"]),
    ],
)
def test_a_uri_that_keeps_no_runs_is_refused_with_what_does(refused, words):
    with pytest.raises(ConfigError) as error:
        preflight.check_mlflow_uri(refused)
    for word in (refused, *words):
        assert word in str(error.value)


def test_a_folder_of_plain_files_is_accepted_where_mlflow_is_told_to_use_it(monkeypatch, tmp_path):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    for accepted in (f"file://{tmp_path}/mlruns", str(tmp_path / "mlruns")):
        preflight.check_mlflow_uri(accepted)
        tracking.check_uri(accepted)


def test_what_is_refused_is_what_mlflow_refuses(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for refused in ("mlruns", f"file://{tmp_path}", "databricks-uc", "ftp://host", "postgres://db/ml"):
        with pytest.raises(ValueError, match="cannot be used"):
            tracking.check_uri(refused)


def test_a_plugin_s_scheme_is_accepted(monkeypatch):
    plugin = EntryPoint("azureml", "azureml.mlflow:store", "mlflow.tracking_store")
    monkeypatch.setattr(store, "entry_points", lambda group: {plugin} if group == plugin.group else set())
    preflight.check_mlflow_uri("azureml://host")
    with pytest.raises(ConfigError, match="azureml"):
        preflight.check_mlflow_uri("aml://host")


def test_databricks_takes_absolute_names_of_experiments_and_that_is_said_before_it_refuses():
    with pytest.raises(TrackingError, match="MLFLOW_EXPERIMENT_NAME=/Users/<you>/tune_topkd"):
        store.experiment_id(MemoryMlflow(), "databricks")


# Where its database lies

ODD_FOLDERS = [
    "a%20b",
    "a b",
    "a?b=1",
    "a#b",
    "100%",
    "é 🚀",
    "it's",
    'say "x"',
    "$HOME;ls",
    "a@b:c",
    "a%2520?x&y",
    "a+b",
]


@pytest.mark.parametrize("name", ODD_FOLDERS)
def test_the_database_lies_in_the_runs_folder_whatever_its_name(tmp_path, empty_store, name):
    folder = tmp_path / name
    folder.mkdir()
    place = Workspace.at(folder)
    assert sqlite_file(place.mlflow_uri) == folder / "mlflow.db"
    shutil.copy(empty_store, folder / "mlflow.db")
    mlflow = client(place.mlflow_uri)
    location = mlflow.get_experiment(store.experiment_id(mlflow, place.mlflow_uri)).artifact_location
    assert location == (folder / "mlartifacts").as_uri()
    with sqlite3.connect(folder / "mlflow.db") as database:
        assert database.execute("SELECT count(*) FROM experiments WHERE name = 'tune_topkd'").fetchone() == (1,)
    if not set("%?") & set(name):  # of these MLflow itself makes a folder, of the name as the URI has it
        assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize("name", ODD_FOLDERS)
def test_the_printed_command_opens_that_database_when_it_is_pasted(tmp_path, name):
    uri = sqlite_uri(tmp_path / name / "mlflow.db")
    words = shlex.split(ui_command(uri))
    assert words[:3] == ["mlflow", "ui", "--backend-store-uri"]
    assert words[3:] == [uri]
    assert sqlite_file(words[3]) == tmp_path / name / "mlflow.db"


def test_a_relative_path_and_options_of_a_uri_are_understood(tmp_path, monkeypatch, empty_store):
    monkeypatch.chdir(tmp_path)
    shutil.copy(empty_store, "x.db")
    mlflow = client("sqlite:///x.db?timeout=5")
    experiment = mlflow.get_experiment(store.experiment_id(mlflow, "sqlite:///x.db?timeout=5"))
    assert experiment.artifact_location == (tmp_path / "mlartifacts").as_uri()


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("http://bob:hunter2@host:5000", "http://***@host:5000"),
        ("databricks://profile", "the page Experiments of the Databricks workspace"),
        ("postgresql://bob:hunter2@db/ml", "mlflow ui --backend-store-uri 'postgresql://***@db/ml'"),
    ],
)
def test_where_to_look_is_no_command_where_a_server_has_the_pages(uri, shown):
    assert ui_command(uri) == shown


def test_the_page_of_an_older_version_s_experiment_opens_on_the_runs_too(uri, monkeypatch):
    for name, tags in (("tune_topkd", {"mlflow.experimentKind": "custom_model_development"}), ("the user's own", {})):
        experiment = client(uri).create_experiment(name)
        monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", name)
        assert store.experiment_id(client(uri), uri) == experiment
        found = client(uri).get_experiment(experiment).tags
        assert {key: text for key, text in found.items() if "Kind" in key} == tags


def test_the_page_opens_on_the_runs_and_the_sweep_says_what_it_is(ledger, uri):
    """An experiment says that models are trained in it: by that MLflow's page chooses what it opens on."""
    drive(Search(config(), ledger), ends=3)
    catch_up(ledger.path, uri)
    parent = runs(uri)[None]
    assert (
        client(uri).get_experiment(parent.info.experiment_id).tags["mlflow.experimentKind"]
        == "custom_model_development"
    )
    assert "best_val_top1" in parent.data.tags["mlflow.note.content"]
    client(uri).set_tag(parent.info.run_id, "mlflow.note.content", "mine")
    drive_on(ledger)
    catch_up(ledger.path, uri)
    assert runs(uri)[None].data.tags["mlflow.note.content"] == "mine", "the user's words stay"
    assert disagreements(ledger.path, uri) == []


# What to do when it is not as it should be


def delete_experiment(uri):
    client(uri).delete_experiment(client(uri).get_experiment_by_name("tune_topkd").experiment_id)


def test_a_deleted_experiment_is_named_with_what_brings_it_back(ledger, uri, caplog):
    drive(Search(config(), ledger), ends=3)
    catch_up(ledger.path, uri)
    delete_experiment(uri)
    said = []
    for act in (catch_up, disagreements):
        with pytest.raises(TrackingError) as error:
            act(ledger.path, uri)
        said.append(str(error.value))
    place = Workspace(ledger.path.parent.parent, uri, None)
    with pytest.raises(ConfigError) as error:
        maintenance.track(_at_rest(ledger), place)
    said += [str(error.value), *maintenance.mlflow_findings(ledger.path.parent.name, place)]
    with pytest.raises(ValueError, match="cannot be used") as refusal:
        tracking.check_uri(uri)
    said.append(str(refusal.value))
    said.append(tracking.log_training(uri, "n", params={}, tags={}, history=[], started=1.0, status="FINISHED"))
    tracker = MlflowTracker(ledger.path, uri)
    tracker.close()
    said.append(tracker.trouble)
    for text in said:
        assert "the experiment 'tune_topkd' was deleted in MLflow" in text
        assert f"`MLFLOW_TRACKING_URI={uri} mlflow experiments restore --experiment-id 1` brings it back" in text
    assert len(said) == 7
    client(uri).restore_experiment("1")
    catch_up(ledger.path, uri)
    assert disagreements(ledger.path, uri) == []


def _at_rest(ledger):
    ledger.close()
    return ledger.path.parent.name


def test_an_experiment_that_another_process_has_just_made_is_used(uri, monkeypatch):
    mlflow = client(uri)
    looks = [None, mlflow.get_experiment("0")]
    monkeypatch.setattr(mlflow, "get_experiment_by_name", lambda name: looks.pop(0))
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "Default")
    assert store.experiment_id(mlflow, uri) == "0"


def test_an_experiment_deleted_under_a_sweep_and_brought_back_misses_nothing(ledger, uri):
    drive(Search(config(), ledger), ends=3)
    follower = writer._Writer(ledger.path, uri)
    follower.catch_up()
    delete_experiment(uri)
    drive_on(ledger, ends=4)
    with pytest.raises(Exception, match="active"):
        follower.catch_up()
    with pytest.raises(TrackingError, match="mlflow experiments restore"):
        follower.catch_up()
    client(uri).restore_experiment("1")
    drive_on(ledger)
    follower.catch_up()
    assert disagreements(ledger.path, uri) == []


@pytest.mark.parametrize(
    ("revision", "words"),
    [
        ("0a8213491aaa", ["made by an older MLflow", "back it up, then `mlflow db upgrade {uri}`"]),
        ("ffffffffffff", ["made by a newer MLflow", "pip install --upgrade mlflow"]),
    ],
)
def test_a_database_of_another_version_is_told_from_which_side(ledger, uri, revision, words):
    with sqlite3.connect(uri.removeprefix("sqlite:///")) as database:
        database.execute("UPDATE alembic_version SET version_num = ?", [revision])
    for act in (
        lambda: catch_up(ledger.path, uri),
        lambda: disagreements(ledger.path, uri),
        lambda: tracking.check_uri(uri),
    ):
        with pytest.raises((TrackingError, ValueError)) as error:
            act()
        for word in words:
            assert word.format(uri=uri) in str(error.value)


# How little is asked of it


RUNS = 1 + 6 + 4
"""The sweep's own, its trials' and its baselines'."""


def requests(monkeypatch, memory, act):
    monkeypatch.setattr(writer, "client_of", lambda uri: memory)
    memory.calls.clear()
    act()
    return memory.calls


def test_what_is_there_is_not_sent_again(ledger, monkeypatch):
    """As behind a server, which gives rows only run by run: three requests, however long the sweep."""
    memory = MemoryMlflow()
    drive(Search(config(), ledger))
    first = list(requests(monkeypatch, memory, lambda: catch_up(ledger.path, "memory")))
    assert first.count("create_run") == first.count("set_terminated") == RUNS
    before = {run_id: set(run["rows"]) for run_id, run in memory.runs.items()}
    again = requests(monkeypatch, memory, lambda: catch_up(ledger.path, "memory"))
    assert again == ["get_experiment_by_name", "search_runs", "log_batch"], "the last one for the sweep's own metrics"
    assert {run_id: run["rows"] for run_id, run in memory.runs.items()} == before


def test_a_first_time_costs_three_requests_a_trial(ledger, monkeypatch):
    memory = MemoryMlflow()
    drive(Search(config(), ledger))
    calls = requests(monkeypatch, memory, lambda: catch_up(ledger.path, "memory"))
    assert len(calls) == 3 + 3 * RUNS, "three to begin with; then create_run, log_batch, set_terminated of each run"


def test_a_second_time_writes_nothing_into_a_database(ledger, uri):
    drive(Search(config(), ledger))
    catch_up(ledger.path, uri)
    with sqlite3.connect(uri.removeprefix("sqlite:///")) as database:
        before = database.execute("PRAGMA data_version").fetchone()
        catch_up(ledger.path, uri)
        assert database.execute("PRAGMA data_version").fetchone() == before


def test_only_what_is_new_is_sent_when_a_sweep_goes_on(ledger, monkeypatch):
    memory = MemoryMlflow()
    drive(Search(config(), ledger), ends=12)
    catch_up_into = lambda: catch_up(ledger.path, "memory")  # noqa: E731
    requests(monkeypatch, memory, catch_up_into)
    there = len(memory.runs)
    drive_on(ledger)
    calls = requests(monkeypatch, memory, catch_up_into)
    assert calls.count("create_run") == RUNS - there
    assert calls.count("log_batch") <= RUNS - there + 3, "the new trials, the one that went on, the sweep itself"


def test_the_disk_is_waited_for_once_for_many_runs(ledger, uri):
    """MLflow by itself commits seven times for a trial, and each waits for the disk."""
    from sqlalchemy import event
    from sqlalchemy.engine import Engine

    drive(Search(config(), ledger))
    commits = []
    count = lambda connection: commits.append(connection)  # noqa: E731
    event.listen(Engine, "commit", count)
    catch_up(ledger.path, uri)
    event.remove(Engine, "commit", count)
    assert len(commits) <= 10
    assert disagreements(ledger.path, uri) == []


def test_a_failure_undoes_what_was_not_whole_and_other_threads_read_meanwhile(ledger, uri):
    drive(Search(config(), ledger), ends=3)
    catch_up(ledger.path, uri)
    mlflow, seen, before = client(uri), [], runs(uri)[None]

    def look():
        seen.append(runs(uri)[None].data.tags.get("mine"))

    def write_and_fail():
        with store.one_transaction(mlflow):
            mlflow.set_tag(before.info.run_id, "mine", "x")
            assert mlflow.get_run(before.info.run_id).data.tags["mine"] == "x"
            other = threading.Thread(target=look)
            other.start()
            other.join()
            raise KeyError("anything")

    with pytest.raises(KeyError):
        write_and_fail()
    look()
    assert seen == [None, None]
    with store.one_transaction(mlflow), store.one_transaction(mlflow):
        mlflow.set_tag(before.info.run_id, "mine", "y")
    assert runs(uri)[None].data.tags["mine"] == "y"


def test_what_a_database_refuses_is_left_out_and_the_rest_is_there(ledger, uri, monkeypatch, caplog):
    """MLflow's own rules, where ours do not apply."""
    monkeypatch.setattr(projection, "clean_name", lambda name: f"{name}@" if name == "train_loss" else name)
    drive(Search(config(), ledger))
    for _ in range(2):
        catch_up(ledger.path, uri)
    assert all(run.data.metrics.keys() == {"val_top1"} for number, run in runs(uri).items() if number is not None)
    assert runs(uri)[None].data.metrics["best_val_top1"] == ledger.state.best().value
    assert "MLflow does not take the metric 'train_loss@'" in caplog.text


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_behind_a_server_a_second_time_sends_nothing_but_the_sweep_s_own(ledger, uri):
    with mlflow_server(uri) as server:
        drive(Search(config(), ledger))
        catch_up(ledger.path, server.uri)
        assert disagreements(ledger.path, server.uri) == []
        with sqlite3.connect(uri.removeprefix("sqlite:///")) as database:
            count = "SELECT count(*) FROM metrics"
            before = database.execute(count).fetchone()
            catch_up(ledger.path, server.uri)
            assert database.execute(count).fetchone() == before
    assert disagreements(ledger.path, uri) == []
