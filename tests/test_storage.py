"""Files: written whole, synced, mapped, hashed; and locked, on file systems that have locks and on those that have none."""

import errno
import fcntl
import logging
import os
import pickle
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import formulas
import pytest

from tune_topkd.config import TrialConfig
from tune_topkd.errors import TuneTopKDError
from tune_topkd.execution.worker import run_trial
from tune_topkd.ledger import Driver
from tune_topkd.ledger import Header
from tune_topkd.ledger import Ledger
from tune_topkd.ledger import LedgerError
from tune_topkd.ledger import Stop
from tune_topkd.ledger import is_driven
from tune_topkd.storage import FileError
from tune_topkd.storage import Lock
from tune_topkd.storage import disk_trouble
from tune_topkd.storage import file_hash
from tune_topkd.storage import files
from tune_topkd.storage import lock
from tune_topkd.storage import lock_byte
from tune_topkd.storage import map_file
from tune_topkd.storage import publish
from tune_topkd.storage import rename
from tune_topkd.storage import unlock_byte
from tune_topkd.storage import write_atomically
from tune_topkd.storage import write_text

HEADER = Header(sweep="s", id="i", seed=0, trials=1)
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
    monkeypatch.setattr(files, "_told", set())


# --- written whole or not at all ------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_durable", [True, False])
def test_what_need_not_outlive_a_power_cut_does_not_wait_for_the_disk(tmp_path, monkeypatch, is_durable):
    synced = []
    monkeypatch.setattr(os, "fsync", synced.append)
    write_text(tmp_path / "file", "old", is_durable=is_durable)
    write_text(tmp_path / "file", "new", is_durable=is_durable)
    assert len(synced) == (2 if is_durable else 0)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", "new")]


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "file.yaml"
    write_text(path, "old: é\n" * 1000)
    write_text(path, "new: é\n")
    assert path.read_bytes() == "new: é\n".encode()
    assert os.listdir(tmp_path) == ["file.yaml"]


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_failing_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, failing):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    path = tmp_path / "file.yaml"
    write_text(path, "old")
    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(OSError, match="No space left"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file.yaml"]


def test_a_text_that_cannot_be_encoded_leaves_the_old_file(tmp_path):
    path = tmp_path / "file.yaml"
    write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "new \ud800")
    assert (path.read_text(), os.listdir(tmp_path)) == ("old", ["file.yaml"])


def test_a_missing_folder_is_told(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_text(tmp_path / "no" / "file.yaml", "new")


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, lambda file: file.write(b"old"))

    def fail(file):
        file.write(b"half")
        assert path.read_bytes() == b"old"
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        write_atomically(path, fail)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    write_text(path, "old")

    def interrupted(stream):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, interrupted)
    assert (path.read_text(), os.listdir(tmp_path)) == ("old", ["file"])


@pytest.mark.parametrize("text", [None, "No space left on device"])
def test_a_disk_that_refuses_is_told_with_the_files_name_also_where_a_library_hides_it(tmp_path, text):
    def refused(stream):
        try:
            raise OSError(errno.ENOSPC, text) if text else OSError("no room")
        except OSError as error:
            raise RuntimeError("unexpected pos 64 vs 0") from error

    with pytest.raises(OSError, match=text or "no room") as raised:
        write_atomically(tmp_path / "file", refused)
    assert (raised.value.filename, raised.value.errno) == (str(tmp_path / "file"), errno.ENOSPC if text else None)
    assert isinstance(raised.value.__cause__, RuntimeError)


def test_what_has_been_written_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """In what order the kernel is asked."""
    calls = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: calls.append(os.fstat(descriptor).st_size))
    monkeypatch.setattr(os, "replace", lambda source, target: calls.append(Path(target).name))
    write_text(tmp_path / "file", "four")
    assert calls == [4, "file"]


def test_a_folder_is_published_with_all_that_it_holds(tmp_path):
    folder = tmp_path / ".new"
    folder.mkdir()
    (folder / "a").write_text("1")
    publish(folder, tmp_path / "new")
    assert [path.name for path in tmp_path.rglob("*")] == ["new", "a"]


def test_a_file_renamed_replaces_the_one_of_that_name(tmp_path):
    (tmp_path / "a").write_text("new")
    (tmp_path / "b").write_text("old")
    rename(tmp_path / "a", tmp_path / "b")
    assert ((tmp_path / "b").read_text(), os.listdir(tmp_path)) == ("new", ["b"])


def test_an_error_that_is_not_the_disks_is_no_trouble_of_it(tmp_path):
    assert disk_trouble(ValueError("its own"), tmp_path) == ""
    assert (
        disk_trouble(OSError(errno.EROFS, "Read-only file system", "w.pt"), tmp_path) == "w.pt: Read-only file system"
    )
    assert disk_trouble(ValueError("its own"), tmp_path / "gone") == f"{tmp_path / 'gone'}: No such file or directory"
    assert os.listdir(tmp_path) == []


# --- read -----------------------------------------------------------------------------------------------------------


def test_a_files_hash_is_of_its_bytes(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    assert file_hash(tmp_path / "file") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_a_file_that_cannot_be_read_is_told_and_the_error_survives_a_pickle(tmp_path):
    with pytest.raises(FileError) as raised:
        file_hash(tmp_path / "gone")
    told = f"{tmp_path / 'gone'}: cannot be read: No such file or directory"
    assert str(raised.value) == str(pickle.loads(pickle.dumps(raised.value))) == told
    assert isinstance(raised.value, TuneTopKDError)


def test_a_mapped_file_is_made_with_its_room_and_shared(tmp_path):
    path = tmp_path / "sub" / "map"
    first, second = map_file(path, 10_000), map_file(path, 10_000)
    assert (first.refusal, second.refusal) == (None, None)
    first.content[3:6] = b"abc"
    assert second.content[:7] == b"\0\0\0abc\0"
    assert path.stat().st_blocks * 512 >= path.stat().st_size == 10_000
    assert os.listdir(path.parent) == ["map"]


def test_a_file_that_cannot_be_written_is_mapped_to_be_read(tmp_path, monkeypatch):
    (tmp_path / "map").write_bytes(b"abc")
    opened = os.open

    def refusing(path, flags, *arguments):
        if flags & os.O_RDWR:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path, flags, *arguments)

    monkeypatch.setattr(os, "open", refusing)
    found = map_file(tmp_path / "map", 3)
    assert (found.content[:], found.refusal.errno) == (b"abc", errno.EACCES)
    with pytest.raises(TypeError):
        found.content[0] = 0
    with pytest.raises(OSError, match="is shorter than 4 bytes"):
        map_file(tmp_path / "map", 4)


# --- locked ---------------------------------------------------------------------------------------------------------


def test_a_lock_of_a_byte_keeps_out_another_process_from_that_byte_alone(tmp_path):
    script = (
        "import pathlib, sys\n"
        "from tune_topkd.storage import lock_byte\n"
        "with open(sys.argv[1], 'r+b') as stream:\n"
        "    print(lock_byte(stream.fileno(), 5), lock_byte(stream.fileno(), 6))\n"
    )
    with open(tmp_path / "f", "w+b") as stream:

        def seen_by_another():
            command = [sys.executable, "-c", script, stream.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()

        assert lock_byte(stream.fileno(), 5) is Lock.TAKEN
        assert seen_by_another() == ["busy", "taken"]
        unlock_byte(stream.fileno(), 5)
        assert seen_by_another() == ["taken", "taken"]


def test_a_lock_is_one_process_s_or_shared(tmp_path):
    def opened():
        return open(tmp_path / "f", "a+b")

    with opened() as first, opened() as second:
        assert (lock(first), lock(second)) == (Lock.TAKEN, Lock.BUSY)
    with opened() as first, opened() as second:
        assert (lock(first, shared=True), lock(second, shared=True)) == (Lock.TAKEN, Lock.TAKEN)


def test_without_locks_a_ledger_is_written_and_one_note_says_so(path, no_locks, caplog):
    with caplog.at_level(logging.WARNING), Ledger.create(path, HEADER) as ledger:
        ledger.append(Driver.here(trials=1))
        assert not is_driven(path)
    with Ledger.open(path) as ledger:
        ledger.append(Stop(reason="interrupted"))
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
        with Ledger.create(path, HEADER) as ledger:
            ledger.append(replace(Driver.here(trials=1), pid=other.pid))
        assert is_driven(path)
        with pytest.raises(LedgerError, match=f"is being driven by process {other.pid} on"):
            Ledger.open(path)
        other.communicate(b"\n")
    assert not is_driven(path)
    Ledger.open(path).close()


def test_without_locks_a_number_given_to_a_later_process_is_no_driver(path, no_locks):
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        an_hour_ago = time.time() - 3600
        with Ledger.create(path, HEADER, clock=lambda: an_hour_ago) as ledger:
            ledger.append(replace(Driver.here(trials=1), pid=other.pid))
        assert not is_driven(path)
        other.communicate(b"\n")


def test_another_trouble_than_a_lack_of_locks_is_told(path, monkeypatch):
    def refused(file, operation):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", refused)
    with pytest.raises(OSError, match="Input/output error"):
        Ledger.create(path, HEADER)
    assert not path.read_bytes()
