"""MLflow follows the ledger: the same runs however often, however it fails, never in the sweep's way."""

import contextlib
import itertools
import json
import logging
import shutil
import socket
import sqlite3
import string
import threading
import time
import traceback

import formulas
import pytest
from formulas import EPOCHS
from hypothesis import given
from hypothesis import strategies as st
from servers import free_port

from tune_topkd import tracking
from tune_topkd.execution.simulated import simulate
from tune_topkd.ledger import Driver
from tune_topkd.ledger import Header
from tune_topkd.ledger import Ledger
from tune_topkd.ledger import Prepared
from tune_topkd.ledger import Share
from tune_topkd.ledger import Stop
from tune_topkd.ledger import TrialKey
from tune_topkd.ledger import read_events
from tune_topkd.search import Search
from tune_topkd.tracking import MlflowTracker
from tune_topkd.tracking import TrackingError
from tune_topkd.tracking import catch_up
from tune_topkd.tracking import check_uri
from tune_topkd.tracking import disagreements
from tune_topkd.tracking import masked
from tune_topkd.tracking import writer
from tune_topkd.tracking.projection import run_in
from tune_topkd.tracking.sending import datasets_of

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
    return Ledger.create(path, Header(sweep="t", id="abc", seed=0, trials=config.sweep.trials, dataset="digits"))


class Killed(BaseException):
    """The driver dies."""


def drive(search, ends=None, *, stops=True, pause=0.0):
    """Run formula trials; after `ends` reports the driver lets go in the middle, or dies if it does not stop."""
    reports = itertools.count()

    def formula(trial, epoch):
        if not stops and next(reports) == ends:
            raise Killed
        time.sleep(pause)
        is_bad = trial.record.key == TrialKey("search", 2) and epoch == 2
        return {"val_top1": float("nan") if is_bad else formulas.value(trial.config, epoch), "train_loss": 1 / epoch}

    try:
        return simulate(search, formula, at_once=1, reports=ends if stops else None)
    except Killed:
        return None


def drive_on(ledger, *trackers, ends=None, stops=True):
    """Another driver takes the sweep up."""
    ledger.append(Driver(host="h", pid=2, trials=TRIALS))
    drive(Search(config(), ledger, list(trackers)), ends, stops=stops)


@pytest.fixture
def ledger(tmp_path):
    config = formulas.sweep_config(sweep={"trials": TRIALS}, baselines={"trials": 2})
    with begin(tmp_path / "ledger.jsonl", config) as ledger:
        ledger.append(Driver(host="h", pid=1, trials=TRIALS))
        yield ledger


def config():
    return formulas.sweep_config(sweep={"trials": TRIALS}, baselines={"trials": 2})


def runs(uri):
    """All that MLflow has of the sweep: trials by number, baselines as `kd-0001`, the parent under None."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("tune_topkd")
    found = {}
    for run in client.search_runs([experiment.experiment_id]):
        number = run_in(run.data.tags) or None
        assert number not in found, f"two runs of {number}"
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
            datasets_of(run),
        )
        for number, run in runs(uri).items()
    }


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


def test_one_parent_and_a_child_for_each_training(ledger, uri):
    drive(Search(config(), ledger))
    catch_up(ledger.path, uri)
    found = runs(uri)
    assert set(found) == {None, *map(str, range(TRIALS)), "ce-0000", "ce-0001", "kd-0000", "kd-0001"}
    parent = found.pop(None)
    assert (parent.info.status, parent.info.run_name, parent.data.tags["state"]) == ("FINISHED", "t", "finished")
    assert parent.data.metrics["best_val_top1"] == ledger.state.best().value
    assert parent.data.params["dataset"] == "digits"
    for number, run in found.items():
        of_search = number.isdigit()
        arm, _, place = ("search", "", number) if of_search else number.partition("-")
        record, tags = ledger.state.trials[TrialKey(arm, int(place))], run.data.tags
        assert run.info.run_name == (f"trial {int(number):04d}" if of_search else number)
        assert tags["kind"] == ("trial" if of_search else "baseline")
        assert tags["trial_number" if of_search else "baseline_number"] == str(int(place))
        assert tags["mlflow.parentRunId"] == parent.info.run_id
        assert (tags["sweep"], tags["sweep_id"]) == ("t", "abc")
        assert (tags["trial_status"], tags["reason"]) == (record.status, record.reason)
        assert run.data.params == {name: str(value) for name, value in record.params.items()}
        steps = [step for name, step, _, _ in rows(uri, run) if name == "train_loss"]
        assert steps == list(range(1, record.epoch + 1))
    statuses = {run.data.tags["trial_status"]: run.info.status for run in found.values()}
    assert statuses == {"completed": "FINISHED", "pruned": "KILLED", "failed": "FAILED"}


def test_no_metric_is_named_like_a_parameter_and_what_an_older_version_wrote_is_passed_over(ledger, uri):
    def formula(trial, epoch):
        system = {"cpu_percent": 98.0, "memory_mb": 900.0, "gpu_memory_mb": 2000.0}
        return {"val_top1": float(epoch), "lr": trial.config.recipe.lr / epoch, "k": 2.0} | system

    simulate(Search(config(), ledger), formula, at_once=1)
    catch_up(ledger.path, uri)
    found = runs(uri)
    for run in found.values():
        assert not run.data.metrics.keys() & run.data.params.keys()
    steps = {step: value for name, step, value, _ in rows(uri, found["0"]) if name == "learning_rate"}
    assert steps == {epoch: m["lr"] for epoch, m in ledger.state.trials[TrialKey("search", 0)].reports.items()}
    assert found["0"].data.metrics["k_metric"] == 2.0
    shown = {name: v for name, v in found["0"].data.metrics.items() if name.startswith("system/")}
    assert sorted(shown.values()) == [98.0, 900.0, 2000.0], "MLflow has a page for what begins with system/"
    assert found["kd-0000"].data.metrics["k"] == 2.0, "a baseline has no parameter k"
    for _, step, value, at in [row for row in rows(uri, found["0"]) if row[0] == "learning_rate"]:
        client(uri).log_metric(found["0"].info.run_id, "lr", value, timestamp=at, step=step)
    assert disagreements(ledger.path, uri) == []
    client(uri).log_metric(found["0"].info.run_id, "lr", 7.0, timestamp=1, step=1)
    assert disagreements(ledger.path, uri) == ["trial 0000: metric lr: 1 rows too many, the first at step 1"]


def test_the_parent_sums_up_the_trials_by_state_their_cost_and_the_gains(ledger, uri):
    ledger.append(Prepared(share=Share(2.0, 0.5)))

    def formula(trial, epoch):
        return {"val_top1": formulas.value(trial.config, epoch), "epoch_seconds": 36.0}

    simulate(Search(config(), ledger), formula, at_once=1)
    catch_up(ledger.path, uri)
    state, shown = ledger.state, runs(uri)[None].data.metrics
    counts = {f"trials_{status}": n for status, n in state.counts().items() if n}
    assert {name: value for name, value in shown.items() if name.startswith("trials_")} == counts
    epochs = sum(record.epoch for record in state.trials.values())
    assert (shown["cpu_hours"], shown["gpu_hours"]) == pytest.approx((epochs * 0.02, epochs * 0.005))
    for method in ("ce", "kd"):
        assert shown[f"gain_over_{method}"] == pytest.approx(state.best().value - state.best(method).value)


def test_the_dataset_of_every_run_has_its_content_as_its_digest_and_its_splits_as_its_profile(ledger, uri, monkeypatch):
    images = {"train": 1078, "val": 360, "test": 359}
    ledger.append(Prepared(identities={"data": "18c80e4ece2eaec8"}, images=images))
    drive(Search(config(), ledger))
    catch_up(ledger.path, uri)
    found = runs(uri)
    for run in found.values():
        (each,) = run.inputs.dataset_inputs
        assert (each.dataset.name, each.dataset.digest) == ("digits", "18c80e4ece2eaec8")
        assert json.loads(each.dataset.profile) == images | {"num_rows": 1797, "classes": None}
        assert [(tag.key, tag.value) for tag in each.tags] == [("mlflow.data.context", "training")]
    assert disagreements(ledger.path, uri) == []
    execute(uri, f"DELETE FROM inputs WHERE destination_id = '{found['3'].info.run_id}'")
    assert disagreements(ledger.path, uri) == ["trial 0003: dataset digits is missing"]
    catch_up(ledger.path, uri)
    assert disagreements(ledger.path, uri) == []
    with faulty(monkeypatch, lambda call, name, do: do()) as calls:
        catch_up(ledger.path, uri)
    assert "log_inputs" not in calls, "what is there is not sent again"


def test_a_server_without_datasets_is_told_of_once_and_misses_nothing_else(ledger, uri, monkeypatch, caplog):
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import ENDPOINT_NOT_FOUND

    def refuse(call, name, do):
        if name == "log_inputs":
            raise MlflowException("no such endpoint", ENDPOINT_NOT_FOUND)
        return do()

    ledger.append(Prepared(identities={"data": "18c80e4ece2eaec8"}))
    drive(Search(config(), ledger))
    with faulty(monkeypatch, refuse) as calls:
        catch_up(ledger.path, uri)
    assert calls.count("log_inputs") == 1
    assert caplog.text.count("MLflow does not take the dataset 'digits'") == 1
    assert [line for line in disagreements(ledger.path, uri) if "dataset digits is missing" not in line] == []


def test_baselines_are_metrics_of_the_parent_too(ledger, uri):
    drive(Search(config(), ledger))
    catch_up(ledger.path, uri)
    parent = runs(uri)[None]
    points = {(n, step): value for n, step, value, _ in rows(uri, parent)}
    for method in ("ce", "kd"):
        for record in ledger.state.arm(method):
            assert points[f"grid_{method}_val_top1", record.key.number] == record.value
            assert points[f"grid_{method}_lr", record.key.number] == record.params["lr"]
        best = ledger.state.best(method)
        assert parent.data.metrics[f"baseline_{method}_val_top1"] == best.value
        assert parent.data.metrics[f"baseline_{method}_lr"] == best.params["lr"]


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
    drive_on(ledger)
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
    tracker = MlflowTracker(ledger.path, f"http://127.0.0.1:{free_port()}")
    drive(Search(config(), ledger, [tracker]))
    tracker.close()
    assert tracker.trouble
    assert not tracker.is_caught_up
    assert ledger.state.stop_reason == "finished"
    assert caplog.text.count("the sweep goes on without it") == 1


def test_a_server_that_hangs_holds_up_neither_the_sweep_nor_its_end(ledger, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1000")
    with socket.socket() as hanging:
        hanging.bind(("127.0.0.1", 0))
        hanging.listen()
        tracker = MlflowTracker(ledger.path, f"http://127.0.0.1:{hanging.getsockname()[1]}")
        drive(Search(config(), ledger, [tracker]))
        tracker.close(patience=0.5)
        assert tracker.trouble.startswith("not done after")
        assert not tracker.is_caught_up
    assert ledger.state.stop_reason == "finished"


@pytest.mark.timeout(100)
def test_closing_gives_up_on_a_server_that_falls_silent(ledger, uri, monkeypatch):
    monkeypatch.setattr(writer, "LONGEST_SILENCE_SECONDS", 0.2)
    released = threading.Event()
    with faulty(monkeypatch, lambda call, name, do: released.wait() if name == "log_batch" else do()):
        tracker = MlflowTracker(ledger.path, uri)
        drive(Search(config(), ledger, [tracker]))
        tracker.close(patience=10_000)
        assert tracker.trouble.startswith("not done after")
        released.set()
        tracker.close()


@pytest.mark.parametrize("size", [1, 3])
def test_the_size_of_the_chunks_does_not_matter(ledger, new_store, monkeypatch, size):
    """With each thing in the ledger that says something of all trials: a stop, a driver, a kill without a stop."""
    drive(Search(config(), ledger), ends=EPOCHS + 1)
    drive_on(ledger, ends=2, stops=False)
    drive_on(ledger, ends=2, stops=False)
    whole, parts = new_store("whole.db"), new_store("parts.db")
    for state in ("running", "finished"):
        with monkeypatch.context() as patch:
            catch_up(ledger.path, whole)
            patch.setattr(writer, "EVENTS_PER_CHUNK", size)
            catch_up(ledger.path, parts)
        assert runs(whole)[None].data.tags["state"] == state
        assert everything(parts) == everything(whole)
        drive_on(ledger)


def test_an_outage_holds_one_chunk_and_reads_no_further(ledger, uri, monkeypatch):
    drive(Search(config(), ledger))
    monkeypatch.setattr(writer, "EVENTS_PER_CHUNK", 4)
    reads = []
    monkeypatch.setattr(writer, "read_events", lambda *place: reads.append(place) or read_events(*place))
    follower = writer._Writer(ledger.path, uri)
    with faulty(monkeypatch, lambda call, name, do: fail()):
        for _ in range(3):
            with pytest.raises(ConnectionError):
                follower.catch_up()
    assert len(reads) == 1
    assert sum(map(len, follower._unsent.points.values())) <= 4 * 2  # metrics of a report
    follower.catch_up()
    assert disagreements(ledger.path, uri) == []


def fail():
    raise ConnectionError("no answer")


@contextlib.contextmanager
def faulty(monkeypatch, act):
    """MLflow's client with a fault: `act(number of the call, its name, what does it)` stands in for each call."""
    real = writer.client_of
    calls = []

    class Faulty:
        def __init__(self, client):
            self.client = client

        def __getattr__(self, name):
            def call(*arguments, **named):
                calls.append(name)

                def do(**changed):
                    changes = {key: change(named[key]) for key, change in changed.items()}
                    return getattr(self.client, name)(*arguments, **named | changes)

                return act(len(calls) - 1, name, do)

            return call

    with monkeypatch.context() as patch:
        patch.setattr(writer, "client_of", lambda uri: Faulty(real(uri)))
        yield calls


def unanswered(do, name):
    """MLflow does it; the answer is lost."""
    do()
    fail()


def refused(do, name):
    """MLflow does not get it."""
    fail()


@pytest.mark.parametrize(
    ("fault", "anew"),
    [
        pytest.param(unanswered, False, id="unanswered, the follower goes on"),
        pytest.param(refused, True, id="refused, a new one begins"),
        pytest.param(unanswered, True, id="unanswered, a new one begins", marks=pytest.mark.slow),
        pytest.param(refused, False, id="refused, the follower goes on", marks=pytest.mark.slow),
    ],
)
def test_a_failure_at_any_call_changes_nothing_in_the_end(tmp_path, new_store, monkeypatch, fault, anew):
    small = formulas.sweep_config(sweep={"trials": 3}, baselines=None)
    monkeypatch.setattr(writer, "EVENTS_PER_CHUNK", 12)
    with begin(tmp_path / "small.jsonl", small) as ledger:
        ledger.append(Driver(host="h", pid=1, trials=3))
        drive(Search(small, ledger), ends=5)
        ledger.append(Driver(host="h", pid=2, trials=3))
        drive(Search(small, ledger))
    undisturbed = new_store("undisturbed.db")
    with faulty(monkeypatch, lambda call, name, do: do()) as calls:
        catch_up(ledger.path, undisturbed)
    assert {"create_experiment", "create_run", "log_batch", "set_terminated"} <= set(calls)
    wanted = everything(undisturbed)
    for place in range(len(calls)):
        uri = new_store(f"{place}.db")
        follower = writer._Writer(ledger.path, uri)
        with faulty(monkeypatch, lambda call, name, do, place=place: fault(do, name) if call == place else do()):
            with pytest.raises(ConnectionError):
                follower.catch_up()
            catch_up(ledger.path, uri) if anew else follower.catch_up()
        assert everything(uri) == wanted, f"after a failure at call {place}, {calls[place]}"


def test_rows_that_mlflow_has_already_are_not_doubled(ledger, uri, monkeypatch):
    """The server takes half of a batch's rows, and goes."""
    drive(Search(config(), ledger))

    def half(call, name, do):
        if name != "log_batch":
            return do()
        return do(metrics=lambda rows: rows[: len(rows) // 2])

    with faulty(monkeypatch, half):
        catch_up(ledger.path, uri)
    assert any("rows missing" in line for line in disagreements(ledger.path, uri))
    catch_up(ledger.path, uri)
    assert disagreements(ledger.path, uri) == []


def test_a_run_made_twice_is_one_again_and_nothing_is_lost(ledger, uri):
    """A hanging server makes a run when it goes on, after another one was made: the empty one goes."""
    drive(Search(config(), ledger), ends=EPOCHS + 1)
    follower = writer._Writer(ledger.path, uri)
    follower.catch_up()
    ids = {number: run.info.run_id for number, run in runs(uri).items()}
    found = runs(uri)
    for run in (found[None], found["0"]):
        double(uri, run)
    drive_on(ledger)
    follower._client = None  # after a failure
    follower.catch_up()
    assert disagreements(ledger.path, uri) == []
    assert ids.items() <= {number: run.info.run_id for number, run in runs(uri).items()}.items()


def test_a_run_deleted_by_somebody_is_written_again(ledger, uri):
    drive(Search(config(), ledger), ends=EPOCHS + 1)
    follower = writer._Writer(ledger.path, uri)
    follower.catch_up()
    client(uri).delete_run(runs(uri)[None].info.run_id)
    drive_on(ledger)
    with pytest.raises(Exception, match="deleted"):
        follower.catch_up()
    follower.catch_up()
    assert disagreements(ledger.path, uri) == []


def client(uri):
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


def double(uri, run):
    """Make a run once more."""
    tags = {name: text for name, text in run.data.tags.items() if name != "mlflow.runName"}
    client(uri).create_run(run.info.experiment_id, run.info.start_time, tags, run.info.run_name)


def test_a_killed_driver_s_sweep_is_shown_as_interrupted_as_a_stop_would_have(ledger, new_store, tmp_path, monkeypatch):
    drive(Search(config(), ledger), ends=EPOCHS + 1, stops=False)
    uri, stopped = new_store("abandoned.db"), new_store("stopped.db")
    for _ in range(2):
        catch_up(ledger.path, uri, abandoned=True)
    shutil.copy(ledger.path, tmp_path / "stopped.jsonl")
    with Ledger.open(tmp_path / "stopped.jsonl") as other:
        last = read_events(ledger.path)[0][-1].time
        monkeypatch.setattr(time, "time", lambda: last)
        other.append(Stop(reason="interrupted"))
    catch_up(tmp_path / "stopped.jsonl", stopped)
    assert everything(uri) == everything(stopped)
    assert runs(uri)[None].data.tags["state"] == "interrupted"
    assert "RUNNING" not in {run.info.status for run in runs(uri).values()}
    assert "interrupted" in {run.data.tags.get("trial_status") for run in runs(uri).values()}


def test_a_sweep_that_goes_on_was_never_abandoned(ledger, new_store):
    uri, never = new_store("abandoned.db"), new_store("never.db")
    drive(Search(config(), ledger), ends=EPOCHS + 1, stops=False)
    catch_up(ledger.path, uri, abandoned=True)
    for ends in (1, None):
        drive_on(ledger, ends=ends, stops=False)
        catch_up(ledger.path, uri)
        catch_up(ledger.path, never)
        assert everything(uri) == everything(never)
    catch_up(ledger.path, uri, abandoned=True)
    assert everything(uri) == everything(never), "a sweep that has ended is not abandoned"


def test_what_was_written_agrees_with_the_ledger(ledger, uri):
    assert disagreements(ledger.path, uri) == ["the sweep: has no run in MLflow"]
    drive(Search(config(), ledger), ends=EPOCHS + 1, stops=False)
    catch_up(ledger.path, uri)
    assert disagreements(ledger.path, uri) == [], "while it runs, or after a kill"
    catch_up(ledger.path, uri, abandoned=True)
    assert disagreements(ledger.path, uri) == [], "after a kill that is known"
    drive_on(ledger, ends=1)
    catch_up(ledger.path, uri)
    assert disagreements(ledger.path, uri) == [], "interrupted"
    drive_on(ledger)
    catch_up(ledger.path, uri)
    assert disagreements(ledger.path, uri) == [], "finished"


def execute(uri, statement):
    """Change a row behind MLflow's back."""
    with contextlib.closing(sqlite3.connect(uri.removeprefix("sqlite:///"))) as database, database:
        assert database.execute(statement).rowcount == 1


@pytest.mark.parametrize(
    ("damage", "finding", "is_cured"),
    [
        (lambda uri, run: client(uri).delete_run(run), "has no run in MLflow", True),
        (lambda uri, run: double(uri, client(uri).get_run(run)), "has 2 runs in MLflow", True),
        (lambda uri, run: client(uri).set_terminated(run, "SCHEDULED"), "status is SCHEDULED, should be", True),
        (lambda uri, run: client(uri).set_terminated(run, client(uri).get_run(run).info.status, 7), "end time is 7", True),
        (lambda uri, run: client(uri).set_tag(run, "trial_status", "odd"), "tag trial_status is 'odd', should be", True),
        (lambda uri, run: client(uri).delete_tag(run, "reason"), "tag reason is missing", True),
        (
            lambda uri, run: execute(uri, f"DELETE FROM params WHERE run_uuid = '{run}' AND key = 'k'"),
            "param k is missing",
            True,
        ),
        (
            lambda uri, run: execute(uri, f"UPDATE params SET value = '77' WHERE run_uuid = '{run}' AND key = 'k'"),
            "param k is '77', should be",
            False,
        ),
        (
            lambda uri, run: execute(
                uri, f"DELETE FROM metrics WHERE run_uuid = '{run}' AND key = 'val_top1' AND step = 1"
            ),
            "metric val_top1: 1 rows missing, the first at step 1",
            True,
        ),
        (
            lambda uri, run: client(uri).log_metric(run, "val_top1", 1.0, timestamp=1, step=2),
            "metric val_top1: 1 rows too many, the first at step 2",
            False,
        ),
        (lambda uri, run: client(uri).log_metric(run, "mine", 1.0, step=3), "metric mine: 1 rows too many", False),
        (lambda uri, run: client(uri).set_tag(run, "mlflow.parentRunId", "odd"), "is not under the sweep's run", True),
    ],
)  # fmt: skip
def test_damage_is_found_and_cured_by_catching_up(ledger, uri, damage, finding, is_cured):
    drive(Search(config(), ledger))
    catch_up(ledger.path, uri)
    damage(uri, runs(uri)["1"].info.run_id)
    (found,) = disagreements(ledger.path, uri)
    assert found.startswith(f"trial 0001: {finding}")
    if is_cured:
        catch_up(ledger.path, uri)
        assert disagreements(ledger.path, uri) == []


def test_a_value_that_is_not_quite_the_ledger_s_is_found(ledger, uri):
    drive(Search(config(), ledger))
    catch_up(ledger.path, uri)
    execute(uri, f"UPDATE metrics SET value = value + 1e-12 WHERE {one_row(uri)}")
    (missing, surplus) = disagreements(ledger.path, uri)
    assert missing == "trial 0000: metric val_top1: 1 rows missing, the first at step 1"
    assert surplus == "trial 0000: metric val_top1: 1 rows too many, the first at step 1"


def one_row(uri):
    return f"run_uuid = '{runs(uri)['0'].info.run_id}' AND key = 'val_top1' AND step = 1"


def test_a_run_that_the_ledger_does_not_know_is_found_and_many_findings_are_counted(ledger, uri):
    drive(Search(config(), ledger))
    catch_up(ledger.path, uri)
    client(uri).set_tag(runs(uri)["5"].info.run_id, "trial_number", "7")
    for number in range(9):
        client(uri).log_metric(runs(uri)["0"].info.run_id, f"mine_{number}", 1.0)
    found = disagreements(ledger.path, uri)
    assert found[5:] == [
        "trial 0000: and 4 more",
        "trial 0005: has no run in MLflow",
        "trial 0007: has a run in MLflow, but is not in the ledger",
    ]


SECRET = "Tr0ub4dor"
"""Part of each password of the properties: a short one may be part of any text."""
SIGNS = st.text(string.ascii_letters + string.digits + string.punctuation, max_size=8)
SCHEMES = st.sampled_from(["http", "https", "postgresql", "postgresql+psycopg2", "mysql+pymysql", "mssql+pyodbc"])


@given(SCHEMES, SIGNS, SIGNS, st.sampled_from(["host", "host:5000", "[::1]:5000", "db.example/ml?sslmode=require"]))
def test_no_password_is_shown_whatever_it_is_made_of(scheme, before, after, place):
    uri = f"{scheme}://bob:{before}{SECRET}{after}@{place}"
    for text in (uri, f"cannot open {uri}", f"{uri}: refused\n  by {uri}", repr(uri)):
        shown = masked(text)
        assert SECRET not in shown
        assert place in shown
        assert masked(shown) == shown


@given(SCHEMES, st.text(string.ascii_letters + string.digits + "-_.~%+=:", max_size=8))
def test_no_token_is_shown(scheme, after):
    assert masked(f"{scheme}://{SECRET}{after}@host/path") == f"{scheme}://***@host/path"


@given(
    SCHEMES,
    st.sampled_from(
        [
            "password",
            "sslpassword",
            "Password",
            "passwd",
            "PWD",
            "token",
            "access_token",
            "id_token",
            "api_key",
            "apikey",
            "api-key",
            "secret",
            "client_secret",
            "sig",
            "signature",
            "X-Amz-Signature",
            "X-Amz-Security-Token",
            "X-Amz-Credential",
            "odbc_connect",
            "aws_access_key_id",
        ]
    ),
    st.text(string.ascii_letters + string.digits + "-_.~%+=:@/?;#'", max_size=8),
    st.sampled_from(["?", "?sslmode=require&", "?a;"]),
)
def test_no_secret_of_a_query_is_shown(scheme, name, after, start):
    uri = f"{scheme}://host/path{start}{name}={SECRET}{after}&last=1"
    assert SECRET not in masked(f"cannot open {uri} now")
    if "@" not in after:
        assert masked(f"cannot open {uri} now") == f"cannot open {scheme}://host/path{start}{name}=***&last=1 now"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql://bob:pw@db/ml", "postgresql://***@db/ml"),
        ("postgresql://bob:p@ss/w@db/ml", "postgresql://***@db/ml"),
        ("http://token@host:5000/x?y", "http://***@host:5000/x?y"),
        ("two http://a:b@c and http://d:e@f", "two http://***@c and http://***@f"),
        ("mssql+pyodbc:///?odbc_connect=PWD%3Dpw", "mssql+pyodbc:///?odbc_connect=***"),
    ],
)
def test_credentials_are_masked(text, shown):
    assert masked(text) == shown


@pytest.mark.parametrize(
    "text",
    [
        "sqlite:////tmp/a@b.db", "sqlite:///runs/mlflow.db", "http://127.0.0.1:5000", "file:///tmp/a@b", "mail bob@host",
        "http://host/a?view=1&signal=2&tokenless", "page_token=token, password=None", "databricks://profile", "",
    ],
)  # fmt: skip
def test_what_is_no_credential_is_shown(text):
    assert masked(text) == text


def test_pieces_of_the_password_in_an_error_are_masked():
    uri = "postgresql://bob:first:second%21@host:5432/ml?sslpassword=third"
    for text in ("invalid literal for int(): 'second%21'", "no host first", "of first:second!", "key third is bad"):
        shown = masked(text, uri)
        assert not any(word in shown for word in ("first", "second", "third")), shown
    assert masked("bob at host:5432", uri) == "bob at host:5432"


@pytest.mark.parametrize("password", ["hunter2hunter3", "hunter2@hunter3", "hunter2/hunter3", "hunter2:hunter3#4"])
def test_a_failing_server_s_password_is_shown_nowhere(ledger, caplog, capfd, password):
    uri = f"http://user:{password}@127.0.0.1:{free_port()}"
    caplog.set_level(logging.DEBUG)
    tracker = MlflowTracker(ledger.path, uri)
    drive(Search(config(), ledger, [tracker]))
    tracker.close()
    with pytest.raises(TrackingError) as failure:
        catch_up(ledger.path, uri)
    with pytest.raises(TrackingError):
        disagreements(ledger.path, uri)
    with pytest.raises(ValueError, match="cannot be used") as refusal:
        check_uri(uri)
    trained = tracking.log_training(uri, "n", params={}, tags={}, history=[], started=1.0, status="FINISHED")
    formatted = [logging.Formatter().format(record) for record in caplog.records]
    assert any("Traceback" in text for text in formatted)
    assert trained
    assert tracker.trouble
    shown = [tracker.trouble, trained, *formatted, *map(str, capfd.readouterr())]
    for error in (failure, refusal):
        shown += [str(error.value), *traceback.format_exception(error.value)]
    assert not [text for text in shown if "hunter" in text]


def test_what_mlflow_logs_by_itself_is_masked(uri, capfd):
    check_uri(uri)
    try:
        raise OSError("postgresql://bob:hunter2@db is gone")
    except OSError:
        logging.getLogger("mlflow.store").exception("failed with %s", "http://bob:hunter2@db")
    shown = capfd.readouterr().err
    assert "failed with http://***@db" in shown
    assert "OSError: postgresql://***@db is gone" in shown
    assert "hunter" not in shown


@pytest.mark.timeout(60)
def test_a_database_that_is_down_is_said_at_once():
    """MLflow by itself tries for 100 seconds; the limit is the test."""
    with pytest.raises(ValueError, match=r"cannot be used.*refused") as error:
        check_uri(f"postgresql://bob:hunter2@127.0.0.1:{free_port()}/ml")
    assert "hunter" not in str(error.value)


def test_a_store_that_cannot_be_opened_is_an_error_with_its_reason(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="cannot be used"):
        check_uri(f"sqlite:///{tmp_path / 'file' / 'mlflow.db'}")
