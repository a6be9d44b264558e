"""Locks, on file systems that have them and on those that have none."""

import errno
import fcntl
import logging
import os
import subprocess
import sys
import time

import formulas
import pytest

from tune_topkd import storage
from tune_topkd.config import TrialConfig
from tune_topkd.storage import Lock
from tune_topkd.storage import lock
from tune_topkd.sweep.worker import run_trial
from tune_topkd.trials import Ledger
from tune_topkd.trials import LedgerError
from tune_topkd.trials import driver_identity
from tune_topkd.trials import is_driven

HAS_NONE = [errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger.jsonl"


@pytest.fixture(params=HAS_NONE, ids=lambda number: errno.errorcode[number])
def no_locks(request, monkeypatch):
    """A file system that refuses every lock."""

    def refused(file, operation):
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "flock", refused)
    monkeypatch.setattr(storage, "_told", set())


def test_a_lock_is_one_process_s_or_shared(tmp_path):
    def opened():
        return open(tmp_path / "f", "a+b")

    with opened() as first, opened() as second:
        assert (lock(first), lock(second)) == (Lock.TAKEN, Lock.BUSY)
    with opened() as first, opened() as second:
        assert (lock(first, shared=True), lock(second, shared=True)) == (Lock.TAKEN, Lock.TAKEN)


def test_without_locks_a_ledger_is_written_and_one_note_says_so(path, no_locks, caplog):
    with caplog.at_level(logging.WARNING), Ledger.create(path, sweep="s", trials=1) as ledger:
        ledger.append(("driver", {**driver_identity(), "trials": 1}))
        assert not is_driven(path)
    with Ledger.open(path) as ledger:
        ledger.append(("stop", {"reason": "interrupted", "error": ""}))
    notes = [record.getMessage() for record in caplog.records]
    assert len(notes) == 1
    assert str(path) in notes[0]
    assert "cannot be locked" in notes[0]


def test_without_locks_a_trial_runs(tmp_path, no_locks):
    sweep = formulas.sweep_config()
    config = TrialConfig(data=sweep.data, student=sweep.student, loss={"k": 4}, recipe=sweep.recipe)
    sent = []
    run_trial(formulas.rising, config, tmp_path, sent.append)
    assert [message["epoch"] for message in sent] == [*range(1, formulas.EPOCHS + 1)]


def test_without_locks_a_teacher_s_folder_is_entered(tmp_path, no_locks):
    from tune_topkd.teacher import training

    with training._locked(tmp_path / "teacher"):
        assert (tmp_path / "teacher").is_dir()


def test_without_locks_a_living_driver_of_this_machine_is_still_found(path, no_locks):
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        with Ledger.create(path, sweep="s", trials=1) as ledger:
            ledger.append(("driver", {**driver_identity(), "pid": other.pid, "trials": 1}))
        assert is_driven(path)
        with pytest.raises(LedgerError, match=f"is being driven by process {other.pid} on"):
            Ledger.open(path)
        other.communicate(b"\n")
    assert not is_driven(path)
    Ledger.open(path).close()


def test_without_locks_a_number_given_to_a_later_process_is_no_driver(path, no_locks, monkeypatch):
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        an_hour_ago = time.time() - 3600
        with monkeypatch.context() as patch:
            patch.setattr(time, "time", lambda: an_hour_ago)
            with Ledger.create(path, sweep="s", trials=1) as ledger:
                ledger.append(("driver", {**driver_identity(), "pid": other.pid, "trials": 1}))
        assert not is_driven(path)
        other.communicate(b"\n")


def test_another_trouble_than_a_lack_of_locks_is_told(path, monkeypatch):
    def refused(file, operation):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", refused)
    with pytest.raises(OSError, match="Input/output error"):
        Ledger.create(path, sweep="s", trials=1)
    assert not path.read_bytes()
