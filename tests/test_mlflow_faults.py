"""A sweep beside an MLflow that is killed, hangs or is locked: the sweep goes on, and in the end nothing is missing."""

import itertools
import shutil
import subprocess
import sys
import threading

import pytest
from servers import PASSWORD
from servers import mlflow_server
from servers import postgres_binaries
from servers import postgres_server
from servers import wait_for
from test_benchmarks import check as check_table
from test_benchmarks import inside as _inside
from test_tracking import begin
from test_tracking import config
from test_tracking import drive
from test_tracking import everything
from test_tracking import pytestmark as _mlflow_warnings
from test_tracking import runs
from test_tracking_shown import check_odd
from test_tracking_shown import odd_ledger

from tune_topkd.ledger import Driver
from tune_topkd.search import Search
from tune_topkd.tracking import MlflowTracker
from tune_topkd.tracking import TrackingError
from tune_topkd.tracking import catch_up
from tune_topkd.tracking import check_uri
from tune_topkd.tracking import disagreements

pytestmark = [_mlflow_warnings, pytest.mark.slow, pytest.mark.timeout(600)]

PAUSE = 0.1
"""Seconds of an epoch: about 5 of a sweep, in which the tracker looks several times."""

inside = _inside
_NUMBERS = itertools.count()


@pytest.fixture
def ledger(tmp_path):
    with begin(tmp_path / "ledger.jsonl", config()) as ledger:
        ledger.append(Driver(host="h", pid=1, trials=config().sweep.trials))
        yield ledger


@pytest.fixture(scope="session")
def postgres():
    """A PostgreSQL with a database `empty` that has MLflow's tables."""
    if postgres_binaries() is None:
        pytest.skip("needs PostgreSQL's server: initdb on the PATH or in /usr/lib/postgresql/*/bin")
    with postgres_server() as server:
        server.run("CREATE DATABASE empty")
        check_uri(server.uri("empty"))
        yield server


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def new_store(request, tmp_path, empty_store):
    """Makes MLflow databases and gives their URIs."""

    def sqlite(name):
        shutil.copy(empty_store, tmp_path / f"{name}.db")
        return f"sqlite:///{tmp_path / name}.db"

    def postgres(name):
        server = request.getfixturevalue("postgres")
        database = f"{name}_{next(_NUMBERS)}"
        server.copy("empty", database)
        return server.uri(database)

    return {"sqlite": sqlite, "postgres": postgres}[request.param]


@pytest.fixture
def store(new_store):
    return new_store("store")


def undisturbed(ledger, new_store):
    """What MLflow has where nothing went wrong."""
    uri = new_store("undisturbed")
    catch_up(ledger.path, uri)
    return everything(uri)


def sweep(ledger, *trackers):
    """A whole sweep on a thread; what disturbs it is the test's."""
    thread = threading.Thread(target=drive, args=(Search(config(), ledger, trackers),), kwargs={"pause": PAUSE})
    thread.start()
    return thread


def has_a_run(uri):
    """A condition: the tracker has begun."""

    def found():
        try:
            return bool(everything(uri))
        except AttributeError:  # no experiment yet
            return False

    return found


def check(ledger, new_store, store):
    """MLflow has exactly what it should have, nothing runs, and no password has got into it."""
    found = everything(store)
    assert found == undisturbed(ledger, new_store)
    assert "RUNNING" not in {status for status, *_ in found.values()}
    assert PASSWORD not in repr(found)
    assert disagreements(ledger.path, store) == []


def test_a_server_that_is_killed_and_comes_back_misses_nothing(ledger, new_store, store, capfd, caplog):
    with mlflow_server(store) as server:
        tracker = MlflowTracker(ledger.path, server.uri)
        thread = sweep(ledger, tracker)
        wait_for(has_a_run(store))
        server.kill()
        wait_for(lambda: tracker.trouble)
        server.start()
        thread.join()
        tracker.close()
        assert tracker.is_caught_up, tracker.trouble
        assert disagreements(ledger.path, server.uri) == []
    check(ledger, new_store, store)
    assert "MLflow answers again" in caplog.text
    assert PASSWORD not in "".join(capfd.readouterr()) + caplog.text


def test_a_server_that_is_killed_for_good_is_caught_up_later(ledger, new_store, store):
    with mlflow_server(store) as server:
        tracker = MlflowTracker(ledger.path, server.uri)
        thread = sweep(ledger, tracker)
        wait_for(has_a_run(store))
        server.kill()
        thread.join()
        tracker.close()
        assert not tracker.is_caught_up
        assert ledger.state.stop_reason == "finished"
        with pytest.raises(TrackingError) as error:
            catch_up(ledger.path, server.uri)
        assert PASSWORD not in str(error.value)
        server.start()
        for _ in range(2):
            catch_up(ledger.path, server.uri)
    check(ledger, new_store, store)


def test_a_server_that_hangs_holds_nothing_up_and_is_caught_up_later(ledger, new_store, store):
    with mlflow_server(store) as server:
        tracker = MlflowTracker(ledger.path, server.uri)
        thread = sweep(ledger, tracker)
        wait_for(has_a_run(store))
        server.stop()
        thread.join()
        assert ledger.state.stop_reason == "finished", "the loop has ended beside a server that hangs"
        tracker.close()
        assert not tracker.is_caught_up
        server.go_on()
        tracker.close()
        # A request that hung may be done at any moment now: it can make a run for the second time.
        catch_up(ledger.path, server.uri)
        wait_for(lambda: not disagreements(ledger.path, server.uri) or catch_up(ledger.path, server.uri))
    check(ledger, new_store, store)


def test_a_killed_driver_s_sweep_is_caught_up_and_goes_on_behind_a_server(ledger, new_store, store):
    with mlflow_server(store) as server:
        drive(Search(config(), ledger), ends=12, stops=False)
        catch_up(ledger.path, server.uri, abandoned=True)
        assert "RUNNING" not in {status for status, *_ in everything(store).values()}
        assert disagreements(ledger.path, server.uri) == []
        ledger.append(Driver(host="h", pid=2, trials=config().sweep.trials))
        tracker = MlflowTracker(ledger.path, server.uri)
        drive(Search(config(), ledger, [tracker]))
        tracker.close()
        assert tracker.is_caught_up, tracker.trouble
    check(ledger, new_store, store)


@pytest.mark.postgres
def test_a_database_that_is_killed_and_comes_back_misses_nothing(ledger, postgres):
    """PostgreSQL without a server of MLflow before it."""
    names = [f"{name}_{next(_NUMBERS)}" for name in ("direct", "undisturbed")]
    for name in names:
        postgres.copy("empty", name)
    direct, other = map(postgres.uri, names)
    tracker = MlflowTracker(ledger.path, direct)
    thread = sweep(ledger, tracker)
    wait_for(has_a_run(direct))
    postgres.kill()
    wait_for(lambda: tracker.trouble)
    assert PASSWORD not in tracker.trouble
    thread.join()
    postgres.start()
    tracker.close()
    assert tracker.is_caught_up, tracker.trouble
    catch_up(ledger.path, other)
    assert everything(direct) == everything(other)


@pytest.mark.postgres
def test_no_odd_text_or_number_holds_up_the_rest_in_postgresql(tmp_path, postgres):
    """It takes no NUL and no half of a character."""
    name = f"odd_{next(_NUMBERS)}"
    postgres.copy("empty", name)
    ledger = odd_ledger(tmp_path)
    for _ in range(2):
        catch_up(ledger, postgres.uri(name))
        assert disagreements(ledger, postgres.uri(name)) == []
    check_odd(runs(postgres.uri(name)))


LOCK = """
import sqlite3, sys
database = sqlite3.connect(sys.argv[1], isolation_level=None)
database.execute("BEGIN EXCLUSIVE")
print("locked", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("new_store", ["sqlite"], indirect=True)
def test_a_locked_database_is_caught_up_when_it_is_free(ledger, new_store, store):
    command = [sys.executable, "-c", LOCK, store.removeprefix("sqlite:///")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as locker:
        assert locker.stdout.readline() == b"locked\n"
        tracker = MlflowTracker(ledger.path, store)
        drive(Search(config(), ledger, [tracker]))
        assert ledger.state.stop_reason == "finished", "the loop has ended beside a database that is locked"
        tracker.close(patience=0.5)
        assert not tracker.is_caught_up
        locker.stdin.close()
    tracker.close()
    catch_up(ledger.path, store)
    check(ledger, new_store, store)


@pytest.mark.long
def test_the_benchmark_of_an_outage(inside, monkeypatch):
    from benchmarks import mlflow_outage

    monkeypatch.setattr(mlflow_outage, "postgres_binaries", lambda: None)  # the same again, on another database
    done = inside("--quick", "mlflow_outage")
    names = [
        f"{what}, SQLite, server {kind}"
        for what in ("wall time of 20 trials", "closing afterwards")
        for kind in ("down for a while", "killed for good")
    ]
    check_table(done, names)
