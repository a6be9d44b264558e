"""MLflow follows the ledger: the same runs however often, never in the sweep's way."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import formulas
import pytest
from formulas import EPOCHS

from tune_topkd.sweep import Search
from tune_topkd.tracking import MlflowTracker
from tune_topkd.tracking import catch_up
from tune_topkd.tracking import check_uri
from tune_topkd.tracking import masked
from tune_topkd.trials import Decision
from tune_topkd.trials import Ledger
from tune_topkd.trials import TrialKey

pytestmark = pytest.mark.filterwarnings(
    # MLflow 3.17 and what it imports
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",
    "ignore::UserWarning",
    "ignore::ResourceWarning",
    "ignore::pytest.PytestUnraisableExceptionWarning",
)

TRIALS = 6


def begin(path, config):
    header = {"sweep": "t", "id": "abc", "seed": 0, "trials": config.sweep.trials, "first": [], "dataset": "digits"}
    return Ledger.create(path, **header)


def drive(search, ends=None):
    """Run formula trials; after `ends` reports the driver lets go in the middle."""
    reports = 0
    while (record := search.next_trial()) is not None:
        search.started(record.key)
        config = search.trial_config(record, None)
        decision = Decision.CONTINUE
        while decision is Decision.CONTINUE:
            if reports == ends:
                return search.stopped()
            reports += 1
            epoch = record.epoch + 1
            bad = record.key == TrialKey("search", 2) and epoch == 2
            reported = float("nan") if bad else formulas.value(config, epoch)
            decision = search.reported(record.key, epoch, {"val_top1": reported, "train_loss": 1 / epoch})
    return search.stopped()


@pytest.fixture
def ledger(tmp_path):
    config = formulas.sweep_config(sweep={"trials": TRIALS}, baselines={"trials": 2})
    with begin(tmp_path / "ledger.jsonl", config) as ledger:
        ledger.append(("driver", {"host": "h", "pid": 1, "trials": TRIALS}))
        yield ledger


def config():
    return formulas.sweep_config(sweep={"trials": TRIALS}, baselines={"trials": 2})


def runs(uri):
    """All that MLflow has of the sweep, by trial number, the parent under None."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("tune_topkd")
    found = {}
    for run in client.search_runs([experiment.experiment_id]):
        number = run.data.tags.get("trial_number")
        assert number not in found, f"two runs of trial {number}"
        found[number] = run
    return found


def rows(uri, run):
    """The metric rows of a run as (name, step, value, time)."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    history = [point for name in run.data.metrics for point in client.get_metric_history(run.info.run_id, name)]
    return sorted((p.key, p.step, p.value, p.timestamp) for p in history)


def everything(uri):
    """What MLflow has, without the ids it gave."""
    return {
        number: (
            run.info.status,
            run.info.start_time,
            run.info.end_time,
            run.data.params,
            {name: text for name, text in run.data.tags.items() if name != "mlflow.parentRunId"},
            rows(uri, run),
        )
        for number, run in runs(uri).items()
    }


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory):
    """An MLflow database with its tables, made once: that takes longer than all else here."""
    path = tmp_path_factory.mktemp("mlflow") / "empty.db"
    check_uri(f"sqlite:///{path}")
    return path


@pytest.fixture
def new_store(tmp_path, empty_store):
    """Makes MLflow databases and gives their URIs."""

    def new_store(name):
        shutil.copy(empty_store, tmp_path / name)
        return f"sqlite:///{tmp_path / name}"

    return new_store


@pytest.fixture
def uri(new_store):
    return new_store("mlflow.db")


def test_one_parent_and_a_child_for_each_trial(ledger, uri):
    drive(Search(config(), ledger))
    catch_up(ledger.path, uri)
    found = runs(uri)
    assert set(found) == {None, *map(str, range(TRIALS))}
    parent = found.pop(None)
    assert (parent.info.status, parent.info.run_name, parent.data.tags["state"]) == ("FINISHED", "t", "finished")
    assert parent.data.metrics["best_val_top1"] == ledger.state.best().value
    assert parent.data.params["dataset"] == "digits"
    for number, run in found.items():
        record = ledger.state.trials[TrialKey("search", int(number))]
        tags = run.data.tags
        assert tags["mlflow.parentRunId"] == parent.info.run_id
        assert (tags["sweep"], tags["sweep_id"]) == ("t", "abc")
        assert (tags["trial_status"], tags["reason"]) == (record.status, record.reason)
        assert run.data.params == {name: str(value) for name, value in record.params.items()}
        steps = [step for name, step, _, _ in rows(uri, run) if name == "train_loss"]
        assert steps == list(range(1, record.epoch + 1))
    statuses = {run.data.tags["trial_status"]: run.info.status for run in found.values()}
    assert statuses == {"completed": "FINISHED", "pruned": "KILLED", "failed": "FAILED"}


def test_baselines_are_metrics_of_the_parent(ledger, uri):
    drive(Search(config(), ledger))
    catch_up(ledger.path, uri)
    parent = runs(uri)[None]
    points = {(n, step): value for n, step, value, _ in rows(uri, parent)}
    for method in ("ce", "kd"):
        for record in ledger.state.arm(method):
            assert points[f"baseline_{method}_val_top1", record.key.number] == record.value
            assert points[f"baseline_{method}_lr", record.key.number] == record.params["lr"]


def test_catching_up_again_changes_nothing(ledger, uri):
    drive(Search(config(), ledger))
    catch_up(ledger.path, uri)
    before = everything(uri)
    catch_up(ledger.path, uri)
    assert everything(uri) == before


def test_an_interrupted_sweep_has_no_running_run_and_goes_on_in_the_same_ones(ledger, uri, new_store):
    drive(Search(config(), ledger), ends=EPOCHS + 1)
    catch_up(ledger.path, uri)
    found = runs(uri)
    assert "RUNNING" not in {run.info.status for run in found.values()}
    assert "interrupted" in {run.data.tags.get("trial_status") for run in found.values()}
    ids = {number: run.info.run_id for number, run in found.items()}
    ledger.append(("driver", {"host": "h", "pid": 2, "trials": TRIALS}))
    drive(Search(config(), ledger))
    catch_up(ledger.path, uri)
    again = runs(uri)
    assert ids.items() <= {number: run.info.run_id for number, run in again.items()}.items()
    whole = new_store("whole.db")
    catch_up(ledger.path, whole)
    assert everything(uri) == everything(whole)


def test_the_tracker_follows_while_the_sweep_runs(ledger, uri):
    tracker = MlflowTracker(ledger.path, uri)
    search = Search(config(), ledger, [tracker])
    drive(search, ends=3)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not _has(uri, "interrupted"):
        time.sleep(0.2)
    assert _has(uri, "interrupted")
    drive(Search(config(), ledger, [tracker]))
    tracker.close()
    assert tracker.is_caught_up
    assert runs(uri)[None].data.tags["state"] == "finished"


def _has(uri, status):
    try:
        return any(run.data.tags.get("trial_status") == status for run in runs(uri).values())
    except Exception:  # noqa: BLE001 (the tables are being made)
        return False


def test_a_server_that_is_not_there_costs_little_and_is_said_once(ledger, caplog):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        uri = f"http://user:secret@127.0.0.1:{unused.getsockname()[1]}"
        tracker = MlflowTracker(ledger.path, uri)
        drive(Search(config(), ledger, [tracker]))
        tracker.close(patience=60)
    assert tracker.trouble
    assert not tracker.is_caught_up
    assert ledger.state.stop_reason == "finished"
    assert caplog.text.count("the sweep goes on without it") == 1
    assert "secret" not in tracker.trouble
    assert not [record for record in caplog.records if "secret" in record.getMessage()]


@pytest.mark.slow
def test_a_server_killed_in_the_middle_is_caught_up_when_it_is_back(ledger, new_store):
    """A real server, SIGKILLed with its workers; afterwards exactly the rows of an undisturbed run."""
    store = new_store("server.db")
    with Server(store) as server:
        tracker = MlflowTracker(ledger.path, server.uri)
        drive(Search(config(), ledger, [tracker]), ends=5)
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and not _has(store, "interrupted"):
            time.sleep(0.2)
        server.kill()
        ledger.append(("driver", {"host": "h", "pid": 2, "trials": TRIALS}))
        drive(Search(config(), ledger, [tracker]))
        tracker.close(patience=30)
        assert not tracker.is_caught_up
        server.start()
        catch_up(ledger.path, server.uri)
        page = urllib.request.urlopen(server.uri, timeout=10).read()
        assert b"MLflow" in page
    undisturbed = new_store("undisturbed.db")
    catch_up(ledger.path, undisturbed)
    assert everything(store) == everything(undisturbed)


class Server:
    """`mlflow server` as its own process group on a loopback port."""

    def __init__(self, store):
        self.store = store
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"

    def start(self):
        command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", self.store, "--workers", "1"]
        self.process = subprocess.Popen(
            [*command, "--port", str(self.port)],
            env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                return urllib.request.urlopen(f"{self.uri}/health", timeout=2).close()
            except OSError:
                time.sleep(0.2)
        raise AssertionError("the server did not come up")

    def kill(self):
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.kill()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql://bob:pw@db/ml", "postgresql://***@db/ml"),
        ("http://token@host:5000/x?y", "http://***@host:5000/x?y"),
        ("sqlite:////tmp/a@b.db", "sqlite:////tmp/a@b.db"),
        ("two http://a:b@c and http://d:e@f", "two http://***@c and http://***@f"),
    ],
)
def test_credentials_are_masked(text, shown):
    assert masked(text) == shown


def test_a_store_that_cannot_be_opened_is_an_error_with_its_reason(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="cannot be used"):
        check_uri(f"sqlite:///{tmp_path / 'file' / 'mlflow.db'}")
