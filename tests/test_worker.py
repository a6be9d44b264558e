"""One trial where Ray put it: checkpoints, resuming, failures."""

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import formulas
import pytest

from tune_topkd.config import TrialConfig
from tune_topkd.execution import checkpoints
from tune_topkd.execution import worker
from tune_topkd.execution.checkpoints import StorageError
from tune_topkd.execution.checkpoints import newest_checkpoint
from tune_topkd.execution.checkpoints import write_checkpoint
from tune_topkd.execution.worker import FolderBusyError
from tune_topkd.execution.worker import run_trial


@pytest.fixture
def config():
    sweep = formulas.sweep_config()
    return TrialConfig(data=sweep.data, student=sweep.student, loss={"k": 4}, recipe=sweep.recipe)


def save_text(text):
    return lambda folder: (folder / formulas.STATE).write_text(text)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_two_generations_are_kept(tmp_path):
    for epoch in (1, 2, 3):
        write_checkpoint(tmp_path, epoch, {"val_top1": 1.0 * epoch}, save_text(str(epoch)))
    assert names(tmp_path) == ["epoch-0002", "epoch-0003"]
    assert newest_checkpoint(tmp_path).name == "epoch-0003"


@pytest.mark.parametrize("damage", ["change", "truncate", "remove", "report"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path, damage):
    for epoch in (1, 2):
        write_checkpoint(tmp_path, epoch, {"val_top1": 1.0}, save_text("state"))
    newest = tmp_path / "epoch-0002"
    match damage:
        case "change":
            (newest / formulas.STATE).write_text("stale")
        case "truncate":
            (newest / formulas.STATE).write_text("")
        case "remove":
            (newest / formulas.STATE).unlink()
        case "report":
            (newest / "report.json").write_text("{")
    assert newest_checkpoint(tmp_path).name == "epoch-0001"


def test_what_only_looks_like_a_checkpoint_is_passed_over_and_left_there(tmp_path, config):
    for epoch in (1, 2):
        write_checkpoint(tmp_path, epoch, {"val_top1": 1.0}, lambda folder: (folder / formulas.STATE).write_text("2"))
    others = [
        "epoch-0003.bak",
        "epoch-",
        "epoch-abc",
        "epoch-0004-copy",
        "epoch-4.5",
        "epoch 5",
        "epoch-²",
        "trial-0009",
    ]
    for name in others:
        shutil.copytree(tmp_path / "epoch-0002", tmp_path / name)
    (tmp_path / "epoch-0007").write_text("a file")
    assert [path.name for path in checkpoints.checkpoints(tmp_path)] == ["epoch-0002", "epoch-0001"]
    run_trial(formulas.rising, config, tmp_path, lambda message: None)
    assert {path.name for path in tmp_path.iterdir()} >= {*others, "epoch-0009", "epoch-0008"}


OTHER_REPORTS = [
    "[]",
    "null",
    "3",
    '{"epoch": 2}',
    '{"epoch": 2, "metrics": {}, "files": []}',
    '{"epoch": 1, "metrics": {}, "files": {}}',
    '{"epoch": 2, "metrics": 5, "files": {}}',
    '{"metrics": {}, "files": {}}',
    '{"epoch": 2, "files": {"a": "b"}}',
]


@pytest.mark.parametrize("report", OTHER_REPORTS)
def test_a_report_of_any_other_shape_is_a_damaged_checkpoint(tmp_path, report):
    for epoch in (1, 2):
        write_checkpoint(tmp_path, epoch, {"val_top1": 1.0}, lambda folder: None)
    (tmp_path / "epoch-0002" / "report.json").write_text(report)
    assert newest_checkpoint(tmp_path).name == "epoch-0001"


def test_a_save_that_fails_leaves_no_checkpoint(tmp_path):
    def failing(folder):
        (folder / formulas.STATE).write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_checkpoint(tmp_path, 1, {"val_top1": 1.0}, failing)
    assert newest_checkpoint(tmp_path) is None
    write_checkpoint(tmp_path, 1, {"val_top1": 1.0}, save_text("1"))
    assert names(tmp_path) == ["epoch-0001"]


def test_a_trial_reports_every_epoch_and_goes_on_from_its_checkpoint(tmp_path, config):
    sent = []

    def stop_after_four(message):
        sent.append(message)
        if message["epoch"] == 4:
            raise SystemExit

    with pytest.raises(SystemExit):
        run_trial(formulas.rising, config, tmp_path, stop_after_four)
    assert [m["epoch"] for m in sent] == [1, 2, 3, 4]
    again = []
    run_trial(formulas.rising, config, tmp_path, again.append)
    assert [m["epoch"] for m in again] == list(range(4, formulas.EPOCHS + 1))
    assert again[0] == sent[-1]


KILLED_AT_EACH_CHANGE = """
import itertools, os, signal, sys
from pathlib import Path
import formulas
from tune_topkd.config import TrialConfig
from tune_topkd.execution.checkpoints import checkpoints, is_whole
from tune_topkd.execution.worker import run_trial

os.fsync = lambda descriptor: None  # nothing here outlives a power cut
LIVES = 3
CHANGES = {"os.mkdir", "os.remove", "os.rename", "os.rmdir", "open"}
config = TrialConfig.model_validate_json(sys.argv[2])

def life(folder, changes):
    left = itertools.count(changes, -1)

    def kill_in_time(event, arguments):
        if event in CHANGES and next(left) == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    if (child := os.fork()) == 0:
        if changes:
            sys.addaudithook(kill_in_time)
        run_trial(formulas.rising, config, folder, lambda message: None)
        os._exit(0)
    return os.WIFEXITED(os.waitpid(child, 0)[1])

for changes in itertools.count(1):
    folder = Path(sys.argv[1], str(changes))
    done = [life(folder, changes) for _ in range(LIVES)]
    assert life(folder, 0)
    found = [path.name for path in checkpoints(folder) if is_whole(path)]
    print(changes, found, sorted(path.name for path in folder.iterdir()), flush=True)
    if done[0]:
        break
"""


@pytest.mark.slow
def test_a_trial_killed_before_any_change_to_its_folder_leaves_in_the_end_its_last_two_checkpoints(tmp_path, config):
    config = config.model_copy(update={"recipe": config.recipe.model_copy(update={"epochs": 4})})
    program = [sys.executable, "-c", KILLED_AT_EACH_CHANGE, tmp_path, config.model_dump_json()]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    told = subprocess.run(program, capture_output=True, text=True, env=environment, check=True).stdout.splitlines()
    assert len(told) > 40
    for number, line in enumerate(told, 1):
        assert line == f"{number} ['epoch-0004', 'epoch-0003'] ['.worker', 'epoch-0003', 'epoch-0004']"


def test_numbers_that_are_none_travel(tmp_path, config):
    sent = []
    config = config.model_copy(update={"loss": {"k": 11}})
    run_trial(formulas.nan_for_large_k, config, tmp_path, lambda m: sent.append(json.loads(json.dumps(m))))
    assert math.isnan(sent[1]["metrics"]["val_top1"])


def test_a_checkpoint_is_on_the_disk_before_it_appears_under_its_name(tmp_path, monkeypatch):
    """In what order the kernel is asked: all content, then the name, then the folder that holds the name."""
    calls = []
    fsync, rename = os.fsync, os.rename

    def seen_fsync(descriptor):
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        calls.append(("sync", path.name, path.stat().st_size if path.is_file() else None))
        fsync(descriptor)

    def seen_rename(source, target):
        calls.append(("rename", Path(target).name, None))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", seen_fsync)
    monkeypatch.setattr(os, "rename", seen_rename)
    write_checkpoint(tmp_path, 1, {"val_top1": 1.0}, save_text("1234"))
    at = calls.index(("rename", "epoch-0001", None))
    report = (tmp_path / "epoch-0001" / "report.json").stat().st_size
    assert {("sync", formulas.STATE, 4), ("sync", "report.json", report)} < set(calls[:at])
    assert calls[at - 1] == ("sync", ".epoch-0001.partial", None)
    assert calls[at + 1 :] == [("sync", tmp_path.name, None)]


# --- one worker at a time -----------------------------------------------------------------------------------------

PROGRAM = """
import json, sys, time
from pathlib import Path
import formulas
from tune_topkd.config import TrialConfig
from tune_topkd.execution.worker import run_trial
train, folder, timeout, pause, after = sys.argv[1:]
sweep = formulas.sweep_config()
config = TrialConfig(data=sweep.data, student=sweep.student, loss={"k": 4}, recipe=sweep.recipe)

def send(message):
    print(json.dumps(message), flush=True)
    time.sleep(float(pause))

run_trial(getattr(formulas, train), config, Path(folder), send, json.loads(timeout))
time.sleep(float(after))
print("alive")
"""


@contextlib.contextmanager
def process(train, folder, timeout=None, pause=0.0, after=0.0):
    """A trial in a process of its own, which prints what it sends; killed at the end."""
    arguments = [train, folder, json.dumps(timeout), pause, after]
    started = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield started
    finally:
        started.kill()
        started.communicate(timeout=60)


def test_a_folder_has_one_worker_and_the_next_goes_on_when_that_one_is_killed(tmp_path, config):
    with process("hanging", tmp_path) as other:
        for _ in range(2):
            assert json.loads(other.stdout.readline())["kind"] == "report"
        happened = []

        def kill():
            happened.append("killed")
            other.send_signal(signal.SIGKILL)

        killer = threading.Timer(1.0, kill)
        killer.start()
        run_trial(formulas.rising, config, tmp_path, lambda message: happened.append(message["epoch"]))
        killer.join()
    assert happened == ["killed", *range(2, formulas.EPOCHS + 1)]


def test_a_worker_that_does_not_let_go_is_waited_for_only_so_long(tmp_path, config, monkeypatch):
    monkeypatch.setattr(worker, "LONGEST_WAIT_FOR_ANOTHER_WORKER", 0.2)
    refused = []

    def train(config, report, resume_from):
        with pytest.raises(FolderBusyError, match="another worker is still at work") as busy:
            run_trial(formulas.rising, config, tmp_path, lambda message: None)
        refused.append(worker._failure(busy.value, tmp_path))

    run_trial(train, config, tmp_path, lambda message: None)
    assert [(message["kind"], message["reason"]) for message in refused] == [("lost", "crash")]
    assert newest_checkpoint(tmp_path) is None


def test_a_worker_that_ray_has_forgotten_is_killed(tmp_path, config, monkeypatch):
    monkeypatch.setattr(worker, "PATIENCE_WITH_ANOTHER_WORKER", 0.2)
    with process("hanging", tmp_path) as other:
        assert json.loads(other.stdout.readline())["kind"] == "report"
        reported = []
        run_trial(formulas.rising, config, tmp_path, lambda message: reported.append(message["epoch"]))
        assert reported[-1] == formulas.EPOCHS
        assert other.wait(timeout=60) == -signal.SIGKILL


def test_a_process_that_only_looks_like_the_holder_is_not_killed(tmp_path, config, monkeypatch):
    """A process id comes again; a holder on another machine has the id of somebody here."""
    monkeypatch.setattr(worker, "PATIENCE_WITH_ANOTHER_WORKER", 0.0)
    monkeypatch.setattr(worker, "LONGEST_WAIT_FOR_ANOTHER_WORKER", 0.3)
    killed = []
    monkeypatch.setattr(worker.os, "kill", lambda pid, number: killed.append(pid))
    own = worker._identity(os.getpid())

    def train(config, report, resume_from):
        for other in (["elsewhere", *own[1:]], [*own[:3], own[3] + 1], [own[0], 0, *own[2:]], own):
            (tmp_path / ".worker").write_text(json.dumps(other))
            with pytest.raises(FolderBusyError):
                run_trial(formulas.rising, config, tmp_path, lambda message: None)
            assert bool(killed) == (other == own), other

    run_trial(train, config, tmp_path, lambda message: None)


@pytest.mark.parametrize("end", [None, ValueError("its own"), SystemExit()])
def test_a_folder_is_free_after_every_end(tmp_path, config, monkeypatch, end):
    """SystemExit is how Ray ends a train function in a worker that it uses again."""
    monkeypatch.setattr(worker, "LONGEST_WAIT_FOR_ANOTHER_WORKER", 0.0)

    def train(config, report, resume_from):
        if end is not None:
            raise end

    with contextlib.nullcontext() if end is None else pytest.raises(type(end)):
        run_trial(train, config, tmp_path, lambda message: None, 600.0)
    sent = []
    run_trial(formulas.rising, config, tmp_path, sent.append, 600.0)
    assert len(sent) == formulas.EPOCHS
    assert not (tmp_path / worker.HANG_FILE).exists()


# --- trials that hang ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("train", ["hanging", "hanging_in_c"])
def test_a_trial_that_hangs_ends_itself_and_says_where(tmp_path, train):
    with process(train, tmp_path, timeout=1.0) as hung:
        out, err = hung.communicate(timeout=120)
    assert [json.loads(line)["epoch"] for line in out.splitlines()] == [1, 2], err
    assert hung.returncode == 1
    stacks = (tmp_path / worker.HANG_FILE).read_text()
    assert "Timeout (0:00:01)!" in stacks
    assert re.search(rf"formulas\.py\", line \d+ in {train}\n", stacks)
    assert newest_checkpoint(tmp_path).name == "epoch-0002"


@pytest.mark.slow
def test_only_the_trainings_own_time_counts_and_nothing_ticks_after_the_end(tmp_path):
    """The driver takes longer than the timeout for each report, a save as well, and the process lives on for longer."""
    with process("saving_slowly", tmp_path, timeout=1.5, pause=1.7, after=2.0) as slow:
        out, err = slow.communicate(timeout=120)
    assert slow.returncode == 0, err
    assert [json.loads(line)["epoch"] for line in out.splitlines()[:-1]] == [1]
    assert out.splitlines()[-1] == "alive"
    assert not (tmp_path / worker.HANG_FILE).exists()


# --- disks in trouble ---------------------------------------------------------------------------------------------


def hidden(error):
    """The error as a library hides it."""
    try:
        try:
            raise error
        except OSError as cause:
            raise RuntimeError("unexpected pos 64 vs 0") from cause
    except RuntimeError as outer:
        return outer


TROUBLES = {
    "full": (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
    "read-only": (OSError(errno.EROFS, "Read-only file system", "/runs/x"), "/runs/x: Read-only file system"),
    "quota": (OSError(errno.EDQUOT, "Disk quota exceeded"), "Disk quota exceeded"),
    "broken": (OSError(errno.EIO, "Input/output error"), "Input/output error"),
    "hidden": (hidden(OSError(errno.ENOSPC, "No space left on device", "/runs/y")), "/runs/y: No space left on device"),
}


@pytest.mark.parametrize("trouble", TROUBLES)
def test_the_disks_trouble_is_not_the_trials_and_the_disk_is_named(tmp_path, trouble):
    error, told = TROUBLES[trouble]

    def failing(folder):
        (folder / formulas.STATE).write_text("half")
        raise error

    with pytest.raises(StorageError) as raised:
        write_checkpoint(tmp_path, 1, {"val_top1": 1.0}, failing)
    assert told in str(raised.value)
    assert str(raised.value).startswith(("/runs/", str(tmp_path)))
    assert names(tmp_path) == []
    message = worker._failure(raised.value, tmp_path)
    assert (message["kind"], message["error"]) == ("storage", str(raised.value))


def test_a_disk_that_refuses_a_library_which_does_not_say_so_is_found_out(tmp_path, monkeypatch):
    """Libraries that write from C++ lose the reason; whether the disk takes anything at all is then tried."""

    def failing(folder):
        monkeypatch.setattr(os, "fsync", refuse)
        raise RuntimeError("unexpected pos 64 vs 0")

    def refuse(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(StorageError, match="No space left on device"):
        write_checkpoint(tmp_path, 1, {"val_top1": 1.0}, failing)
    assert names(tmp_path) == []


@pytest.mark.parametrize("error", [ValueError("its own"), FileNotFoundError(errno.ENOENT, "No such file", "weights")])
def test_what_save_does_wrong_by_itself_is_the_trials_failure(tmp_path, error):
    def failing(folder):
        raise error

    with pytest.raises(type(error)) as raised:
        write_checkpoint(tmp_path, 1, {"val_top1": 1.0}, failing)
    assert raised.value is error
    message = worker._failure(raised.value, tmp_path)
    assert (message["kind"], message["reason"]) == ("failed", "error")
    assert "in failing" in message["traceback"]


SAVING = """
import sys
from pathlib import Path
import torch
from tune_topkd.execution.checkpoints import write_checkpoint
folder = Path(sys.argv[1])

def save(partial):
    torch.save(torch.zeros(2**20), partial / "weights.pt")

try:
    write_checkpoint(folder, 1, {}, save)
except Exception as error:
    print(type(error).__name__, error, repr(error.__cause__), sep="|")
    print(sorted(path.name for path in folder.iterdir()))
"""


@pytest.mark.slow
def test_a_network_that_finds_the_disk_full_is_the_disks_trouble(tmp_path):
    """The real torch on a real full disk, of which torch itself says nothing."""
    mounted = ["unshare", "-rm", "sh", "-c", 'mount -t tmpfs -o size=1m tmpfs "$0" && exec "$@"', str(tmp_path)]
    if subprocess.run([*mounted, "true"], capture_output=True).returncode:
        pytest.skip("mounting is not permitted here")
    done = subprocess.run(
        [*mounted, sys.executable, "-c", SAVING, str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    told, left = done.stdout.splitlines()
    assert told.startswith(f"StorageError|{tmp_path}"), done.stderr
    assert "No space left on device" in told
    assert left == "[]"


# --- what trials share ----------------------------------------------------------------------------------------------


def test_weights_that_changed_under_a_sweep_are_no_trials_failure(tmp_path):
    weights = tmp_path / "teacher.pt"
    weights.write_bytes(b"one")
    hashes = {str(weights): hashlib.sha256(b"one").hexdigest()}
    worker._check_unchanged(hashes)
    weights.write_bytes(b"two")
    with pytest.raises(worker.ChangedFileError, match=r"teacher\.pt has been changed since the sweep began") as caught:
        worker._check_unchanged(hashes)
    told = worker._failure(caught.value, tmp_path)
    assert (told["kind"], told["error"]) == ("storage", f"{weights} has been changed since the sweep began")
    weights.unlink()
    with pytest.raises(worker.ChangedFileError, match="was there when the sweep began: No such file") as caught:
        worker._check_unchanged(hashes)
    assert worker._failure(caught.value, tmp_path)["kind"] == "storage"
