"""What several test modules need."""

import os
import signal
import sqlite3
import sys

import pytest


@pytest.fixture(scope="session", autouse=True)
def a_core_for_each_worker():
    """Test processes beside one another do not fight for cores: threads that wait for one another take ten times as long."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        import torch

        torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    """The files that take longest come first, so that processes which share the files out end together."""
    items.sort(key=lambda item: item.path.name not in ("test_cli.py", "test_torture.py", "test_readme.py"))


def pytest_runtest_setup(item):
    """A test marked gpu is skipped where torch sees no CUDA device."""
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch, tmp_path_factory):
    """No test writes to the user's runs or MLflow, or depends on where it is run."""
    for name in (
        "MLFLOW_TRACKING_URI",
        "MLFLOW_EXPERIMENT_NAME",
        "TUNE_TOPKD_SWEEP",
        "TUNE_TOPKD_DATA_DIR",
        "RAY_ADDRESS",
        "AWS_ENDPOINT_URL",
        "AWS_PROFILE",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TUNE_TOPKD_RUNS_DIR", str(tmp_path_factory.mktemp("runs")))
    monkeypatch.setenv("TUNE_TOPKD_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="session", autouse=True)
def a_terminal_that_can_close():
    """Under nohup SIGHUP is ignored, here and in every process that a test starts."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture(autouse=True)
def a_terminal_of_its_own():
    """What a test says on stderr goes where stderr goes in that test, not where it went in one before."""
    yield
    if "tune_topkd.terminal" in sys.modules:
        sys.modules["tune_topkd.terminal"].close_stderr()


@pytest.fixture(scope="session", autouse=True)
def unsynced_files():
    """No file of a test need outlive a power cut, so none waits for the disk; a closed one is still an error."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", os.fstat)
        yield


@pytest.fixture(scope="session")
def unsynced_sqlite():
    """MLflow's SQLite does not wait for the disk in this process: a test need not outlive a power cut."""
    from sqlalchemy import event
    from sqlalchemy.engine import Engine

    def unsynced(connection, record):
        if isinstance(connection, sqlite3.Connection):
            connection.execute("PRAGMA synchronous = OFF")

    event.listen(Engine, "connect", unsynced)
    yield
    event.remove(Engine, "connect", unsynced)


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory, unsynced_sqlite):
    """An MLflow database with its tables, to be copied: making one takes longer than all that a test does with it."""
    from tune_topkd.tracking import check_uri

    path = tmp_path_factory.mktemp("mlflow") / "empty.db"
    check_uri(f"sqlite:///{path}")
    return path
