"""Faults other than kills, on a real Ray: memory, hangs, crashes of all trials, disks and nodes in trouble."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import formulas
import pytest
import test_cli
import test_sweep

from tune_topkd.config import config_from
from tune_topkd.config import dump_config
from tune_topkd.config import read_yaml
from tune_topkd.execution import Cluster
from tune_topkd.execution import bridge
from tune_topkd.execution import nodes
from tune_topkd.execution import run_sweep
from tune_topkd.ledger import Driver
from tune_topkd.ledger import Header
from tune_topkd.ledger import Ledger
from tune_topkd.ledger import Share
from tune_topkd.ledger import Stop
from tune_topkd.ledger import TrialStatus
from tune_topkd.ledger import read_events
from tune_topkd.ledger import read_state
from tune_topkd.search import Search
from tune_topkd.sweep import audit_sweep
from tune_topkd.sweep import workspace

pytestmark = test_sweep.pytestmark
cluster = test_sweep.cluster
inside = test_cli.inside
ended = test_sweep.ended

HERE = Path(__file__).parent
SPACE = HERE.parent / "search_spaces" / "digits.yaml"
ONE_BAD_OF_THREE = {"trials": 3, "seed": 2, "asha": None}
"""A sweep in which k is above 10 in the second trial only."""
BAD = 1


def begun(folder, **sections):
    """The config and the ledger of a sweep that has begun."""
    config = formulas.sweep_config(**({"baselines": None} | sections))
    folder.mkdir()
    (folder / "sweep.yaml").write_text(dump_config(config))
    settings, what = config.sweep, workspace.config_digest(config.model_dump(mode="json"))
    header = Header(sweep=folder.name, id="i", seed=settings.seed, trials=settings.trials, digest=what)
    return config, Ledger.create(folder / "ledger.jsonl", header)


def saved_config(folder):
    return config_from(read_yaml(folder / "sweep.yaml"), "test")


def findings(folder):
    """What the audit of a sweep finds."""
    return audit_sweep(saved_config(folder), folder)


@pytest.fixture
def sweep(tmp_path, cluster):
    """Runs a sweep of a train function in the folder `s`, or goes on with it; audits it and gives its state."""

    def sweep(train, **settings):
        folder = tmp_path / "s"
        if folder.exists():
            config, ledger = saved_config(folder), Ledger.open(folder / "ledger.jsonl")
        else:
            config, ledger = begun(folder, sweep=settings)
        with ledger:
            ledger.append(Driver(host="h", pid=os.getpid(), trials=config.sweep.trials))
            search = Search(config, ledger)
            run_sweep(search, cluster=cluster, folder=folder, train=train)
        assert findings(folder) == []
        return ledger.state

    return sweep


def retries(path):
    return [(e.key.number, e.data["reason"], e.data["share"]) for e in read_events(path)[0] if e.name == "retry"]


# --- memory -------------------------------------------------------------------------------------------------------


def test_the_next_larger_share_is_twice_what_is_shared():
    two = Cluster(nodes=(Share(1.0, 0.0), Share(2.0, 0.0)))
    assert two.larger(Share(0.5, 0.0)) == Share(1.0, 0.0)
    assert two.larger(Share(1.0, 0.0)) == Share(2.0, 0.0)
    assert two.larger(Share(2.0, 0.0)) is None
    three = Cluster(nodes=(Share(3.0, 0.0),))
    assert three.larger(Share(2.0, 0.0)) == Share(3.0, 0.0)
    graphics = Cluster(nodes=(Share(4.0, 1.0), Share(64.0, 0.0)))
    assert graphics.larger(Share(1.0, 0.25)) == Share(2.0, 0.5)
    assert graphics.larger(Share(4.0, 0.25)) == Share(4.0, 0.5)
    assert graphics.larger(Share(1.0, 0.4)) == Share(2.0, 0.8)
    assert graphics.larger(Share(1.0, 0.75)) == Share(2.0, 1.0)
    assert graphics.larger(Share(2.0, 1.0)) == Share(4.0, 1.0)
    assert graphics.larger(Share(4.0, 1.0)) is None


@pytest.mark.slow
def test_a_trial_that_never_has_enough_memory_fails_by_itself(sweep, tmp_path):
    state = sweep(formulas.out_of_memory_for_large_k, **ONE_BAD_OF_THREE)
    assert state.stop_reason == "finished"
    record = state.arm("search")[BAD]
    assert (record.status, record.reason, record.attempts) == (TrialStatus.FAILED, "oom", 2)
    assert record.error.startswith("MemoryError")
    assert [n for n, *_ in retries(tmp_path / "s" / "ledger.jsonl")] == [BAD]
    assert state.counts()["completed"] == 2


# --- hangs and crashes --------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("train", [formulas.hanging_for_large_k, formulas.frozen_for_large_k])
def test_a_trial_that_hangs_is_ended_and_the_others_go_on(sweep, tmp_path, monkeypatch, train):
    monkeypatch.setattr(bridge, "_GRACE_AFTER_TIMEOUT", 2.0)
    state = sweep(train, **ONE_BAD_OF_THREE, trial_timeout=3.0)
    assert state.stop_reason == "finished"
    record = state.arm("search")[BAD]
    assert (record.status, record.reason, record.attempts, record.epoch) == (TrialStatus.FAILED, "timeout", 1, 2)
    assert record.error == "TimeoutError: no report for 3 s (sweep.trial_timeout) after epoch 2"
    assert state.counts()["completed"] == 2
    if train is formulas.hanging_for_large_k:
        assert "in sleep_for_ever" in (tmp_path / "s" / "trials" / "0001" / "error.txt").read_text()


@pytest.mark.slow
def test_a_worker_that_freezes_before_its_first_word_is_ended_as_well(sweep, monkeypatch):
    monkeypatch.setattr(bridge, "_GRACE_AFTER_TIMEOUT", 2.0)
    monkeypatch.setattr(nodes, "LONGEST_START_OF_A_WORKER", 5.0)
    state = sweep(formulas.frozen_at_once_for_large_k, **ONE_BAD_OF_THREE, trial_timeout=3.0)
    assert state.stop_reason == "finished"
    record = state.arm("search")[BAD]
    assert (record.status, record.reason, record.epoch) == (TrialStatus.FAILED, "timeout", 0)
    assert state.counts()["completed"] == 2


@pytest.mark.slow
def test_a_crash_that_every_trial_makes_ends_the_sweep_with_its_one_cause(sweep):
    state = sweep(formulas.dying_always, trials=12, max_failures=1, asha=None)
    assert state.stop_reason == "failed"
    assert {(r.status, r.reason, r.attempts) for r in state.arm("search")} == {(TrialStatus.FAILED, "crash", 2)}
    assert len(state.arm("search")) == 3
    assert len({r.error for r in state.arm("search")}) == 1


# --- disks --------------------------------------------------------------------------------------------------------

COMMAND_LINE = """
import dataclasses
import formulas
from tune_topkd import execution
from tune_topkd.cli import main

class OfFormulas(execution.RayExecutor):
    def run(self, search, work):
        return super().run(search, dataclasses.replace(work, train=formulas.heavy))

execution.RayExecutor = OfFormulas
main()
"""


class Disk:
    """A small disk that only the processes started by it see, at `path`."""

    def __init__(self, path, size):
        path.mkdir()
        self.path = path
        script = 'mount -t tmpfs -o size="$1" tmpfs "$0" && echo mounted && exec cat'
        command = ["unshare", "-rm", "sh", "-c", script, str(path), size]
        self._holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        if self._holder.stdout.readline() != "mounted\n":
            self.close()
            pytest.skip("mounting is not permitted here")

    @property
    def seen(self):
        """The disk from outside."""
        return Path(f"/proc/{self._holder.pid}/root{self.path}")

    def start(self, *command, **options):
        inside = ["nsenter", "-t", str(self._holder.pid), "-U", "-m", "--preserve-credentials", *command]
        return subprocess.Popen(inside, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **options)

    def run(self, *command, **options):
        """Run a command to its end: its exit code and stderr."""
        process = self.start(*command, **options)
        try:
            _, err = process.communicate(timeout=200)
        finally:
            process.kill()
        return process.returncode, err

    def close(self):
        self._holder.communicate()


@pytest.fixture
def disk(tmp_path):
    with contextlib.closing(Disk(tmp_path / "disk", "2m")) as disk:
        yield disk


@pytest.fixture
def launch(disk, tmp_path):
    """Starts the command line, with formulas as trials, on the small disk; MLflow is elsewhere."""

    def launch(*arguments, run=disk.run):
        options = ["--runs-dir", disk.path, "--mlflow-uri", f"sqlite:///{tmp_path / 'mlflow.db'}"]
        command = [sys.executable, "-c", COMMAND_LINE, *arguments, *options]
        return run(*map(str, command), env=os.environ | {"PYTHONPATH": str(HERE)})

    return launch


RUN = ["run", SPACE, "--epochs", 3]
RUN += ["--set", "teacher.recipe.epochs=2", "--set", "baselines=null", "--set", "sweep.asha=null"]
RUN += ["--set", "recipe.ema=null", "--set", "sweep.finalists=null"]


def one_line(told):
    """What was told last: the one line about what is wrong."""
    assert "Traceback" not in told
    lines = told.splitlines()
    assert len([line for line in lines if line.startswith("error: ")]) == 1, told
    return next(line for line in lines if line.startswith("error: "))


@pytest.mark.slow
def test_a_disk_that_fills_stops_the_sweep_and_with_room_it_goes_on(disk, launch):
    ledger = disk.seen / "digits" / "ledger.jsonl"
    for command in ([*RUN, "--trials", 12], ["resume", "digits"]):
        code, told = launch(*command)
        assert code == 2, told
        assert re.search(rf"{disk.path}/digits/trials/\d+\S*: No space left on device", one_line(told)), told
        assert "`resume digits` goes on" in one_line(told)
        assert read_state(ledger).stop_reason == "trouble"
    before = read_state(ledger)
    assert 0 < len(ended(before)) < 12
    assert {r.status for r in before.trials.values()} <= {TrialStatus.COMPLETED, TrialStatus.RUNNING}
    seen = len(read_events(ledger)[0])
    assert disk.run("mount", "-o", "remount,size=20m", str(disk.path)) == (0, "")
    code, told = launch("resume", "digits")
    assert code == 0, told
    state = read_state(ledger)
    assert (state.stop_reason, state.counts()["completed"], len(state.trials)) == ("finished", 12, 12)
    assert ended(before).items() <= ended(state).items()
    assert not {e.key for e in read_events(ledger)[0][seen:] if e.name in ("start", "report")} & set(ended(before))
    assert (disk.seen / "digits" / "tuned.yaml").is_file()
    assert findings(disk.seen / "digits") == []


@pytest.mark.slow
@pytest.mark.long
def test_a_disk_that_turns_read_only_stops_the_sweep_and_writable_again_it_goes_on(disk, launch):
    assert disk.run("mount", "-o", "remount,size=20m", str(disk.path)) == (0, "")
    ledger = disk.seen / "digits" / "ledger.jsonl"
    process = launch(*RUN, "--epochs", 40, "--trials", 4, run=disk.start)
    try:
        wait_until(lambda: ledger.exists() and ledger.read_bytes().count(b'"event":"report"') > 3, process)
        # a second mount over the first: what is open already could still be written, so a plain remount is refused
        again = 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0"'
        assert disk.run("sh", "-c", again, str(disk.path)) == (0, "")
        _, told = process.communicate(timeout=200)
    finally:
        process.kill()
    assert process.returncode == 2, told
    assert re.search(rf"{disk.path}/digits/\S+: Read-only file system", one_line(told)), told
    before = read_state(ledger)
    assert before.running()
    assert disk.run("umount", str(disk.path)) == (0, "")
    code, told = launch("resume", "digits")
    assert code == 0, told
    state = read_state(ledger)
    assert state.counts()["completed"] == 4
    assert findings(disk.seen / "digits") == []
    assert all(r.reports.items() <= state.trials[key].reports.items() for key, r in before.trials.items())


def wait_until(condition, process):
    """Wait for something that a process is to bring about."""
    deadline = time.monotonic() + 200
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_resume_on_a_read_only_disk_is_one_line(disk, inside):
    begun(disk.seen / "s")[1].close()
    before = (disk.seen / "s" / "ledger.jsonl").read_bytes()
    assert disk.run("mount", "-o", "remount,ro", str(disk.path)) == (0, "")
    done = inside("resume", "s", "--runs-dir", disk.seen)
    told = done.stderr
    assert (done.returncode, told.count("\n")) == (2, 1), told
    assert f"{disk.seen}/s/ledger.jsonl" in one_line(told)
    assert "Read-only file system" in one_line(told)
    assert (disk.seen / "s" / "ledger.jsonl").read_bytes() == before


def test_resume_on_a_full_disk_is_one_line_and_leaves_the_ledger_whole(disk, inside):
    """The ledger ends where a page of the file system does, so that its next line needs room."""
    page = os.sysconf("SC_PAGESIZE")
    with begun(disk.seen / "s", space={"k": {"low": 1, "high": 9}})[1] as ledger:
        while page - ledger.path.stat().st_size % page > 60:
            room = page - ledger.path.stat().st_size % page
            ledger.append(Stop(reason="interrupted", error="x" * (room % 150)))
    before = (disk.seen / "s" / "ledger.jsonl").read_bytes()
    assert disk.run("sh", "-c", 'cat /dev/zero > "$0/filler"', str(disk.path))[0] != 0
    done = inside("resume", "s", "--runs-dir", disk.seen)
    told = done.stderr
    assert (done.returncode, told.count("\n")) == (2, 1), told
    assert f"{disk.seen}/s/ledger.jsonl: No space left on device" in one_line(told)
    assert (disk.seen / "s" / "ledger.jsonl").read_bytes() == before
    assert disk.run("rm", f"{disk.path}/filler") == (0, "")
    with Ledger.open(disk.seen / "s" / "ledger.jsonl") as ledger:
        ledger.append(Driver(host="h", pid=1, trials=2))


@pytest.mark.slow
@pytest.mark.parametrize("size", ["100k", "4k"])
def test_a_disk_without_room_for_the_teacher_is_one_line(disk, launch, size):
    assert disk.run("mount", "-o", f"remount,size={size}", str(disk.path)) == (0, "")
    code, told = launch(*RUN, "--trials", 1)
    assert code == 2, told
    where = r"(teachers/\S+|digits/\S+)"  # what is written first: the ledger, then the teacher
    assert re.search(rf"{disk.path}/{where}: No space left on device", one_line(told)), told
    assert not list(disk.seen.glob("digits*"))


# --- nodes --------------------------------------------------------------------------------------------------------

NODES = """
import contextlib, os, shutil, signal, subprocess, sys, tempfile, time
from pathlib import Path

os.environ["RAY_TMPDIR"] = tempfile.mkdtemp(prefix="ttk-")
import formulas
import ray.cluster_utils
from tune_topkd.config import config_from, read_yaml
from tune_topkd.execution import Cluster, bridge, run_sweep
from tune_topkd.search import Search
from tune_topkd.ledger import Driver, Ledger, Share

bridge.LONGEST_WAIT_FOR_ROOM = 5.0
path = Path(sys.argv[1]) / "ledger.jsonl"
config = config_from(read_yaml(path.with_name("sweep.yaml")), "test")

def sweep(*trackers, train=formulas.slow):
    with Cluster.attached(nodes.address) as cluster, Ledger.open(path) as ledger:
        ledger.append(Driver(host="h", pid=os.getpid(), trials=config.sweep.trials))
        search = Search(config, ledger, trackers)
        try:
            run_sweep(search, cluster=cluster, folder=path.parent, train=train, note=lambda text: print(text, flush=True))
        except ValueError as error:
            print(type(error).__name__, error, flush=True)

nodes = ray.cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
try:
    exec(sys.argv[2])
finally:
    nodes.shutdown()
    shutil.rmtree(os.environ["RAY_TMPDIR"], ignore_errors=True)
"""


def on_nodes(folder, program):
    """Run a program that has a sweep of twelve trials and a cluster whose head takes none: the lines it printed."""
    begun(folder, sweep={"trials": 12, "asha": None})[1].close()
    return printed(NODES, folder, program, environment=os.environ | {"PYTHONPATH": str(HERE)}, timeout=280)


def printed(program, *arguments, environment, timeout):
    """Run a program to its good end, with nothing that it started left: the lines it printed."""
    process = subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, err
    return out.splitlines()


LAST_NODE_LOST = """
class KillsTheNode:
    reports = 0

    def notify(self, event):
        self.reports += event.name == "report"
        if event.name == "report" and self.reports == 12:
            nodes.remove_node(node, allow_graceful=False)

    def close(self):
        pass

node = nodes.add_node(num_cpus=2)
sweep(KillsTheNode())
nodes.add_node(num_cpus=2)
sweep()
"""


@pytest.mark.slow
def test_a_sweep_whose_last_node_is_gone_stops_and_goes_on_with_a_new_one(tmp_path):
    told = on_nodes(tmp_path / "s", LAST_NODE_LOST)
    assert [line for line in told if line.startswith(("SweepTroubleError", "ResourceError"))] == [
        "SweepTroubleError sweep.cpus_per_trial = 1: no node has room for a trial: the largest has 0 CPUs and 0 GPUs; "
        "the sweep has stopped, nothing is lost: `resume s` goes on"
    ]
    events = read_events(tmp_path / "s" / "ledger.jsonl")[0]
    assert [e.data["reason"] for e in events if e.name == "stop"] == ["trouble", "finished"]
    assert {reason for _, reason, _ in retries(tmp_path / "s" / "ledger.jsonl")} == {"node"}
    state = read_state(tmp_path / "s" / "ledger.jsonl")
    assert state.counts()["completed"] == len(state.trials) == 12
    assert findings(tmp_path / "s") == []


BLIND_NODE = """
ray_command = str(Path(sys.executable).with_name("ray"))
sees_nothing = 'mount -t tmpfs tmpfs "$0" && exec "$2" start --address="$1" --num-cpus=2 --node-name=blind --block'
blind = subprocess.Popen(["unshare", "-rm", "sh", "-c", sees_nothing, str(path.parent), nodes.address, ray_command])
deadline = time.monotonic() + 120
try:
    with Cluster.attached(nodes.address):
        while not Cluster.now().room_for(Share(2.0, 0.0)):
            assert time.monotonic() < deadline and blind.poll() is None
            time.sleep(0.1)
    sweep()
finally:
    blind.terminate()
    blind.wait()
"""


@pytest.mark.slow
def test_a_node_that_does_not_see_the_folder_is_named_before_any_trial(disk, tmp_path):
    told = on_nodes(tmp_path / "s", BLIND_NODE)
    assert [line for line in told if line.startswith(("SweepTroubleError", "ResourceError"))] == [
        f"ResourceError node blind: {tmp_path / 's'} is not there: --runs-dir must be on storage that all nodes share"
    ]
    assert [e.name for e in read_events(tmp_path / "s" / "ledger.jsonl")[0]] == ["sweep", "driver"]


NODES_THAT_LACK_SOMETHING = """
ray_command = str(Path(sys.executable).with_name("ray"))
data = path.parent / "data"
data.mkdir()
(data / "train").write_text("x")
os.environ["DATA"] = str(data / "train")
others = []

def join(name, hides):
    before = len(Cluster.now().nodes)
    sees_nothing = 'mount -t tmpfs tmpfs "$0" && exec "$2" start --address="$1" --num-cpus=2 --node-name="$3" --block'
    command = ["unshare", "-rm", "sh", "-c", sees_nothing, str(hides), nodes.address, ray_command, name]
    others.append(subprocess.Popen(command))
    deadline = time.monotonic() + 120
    while len(Cluster.now().nodes) == before:
        assert time.monotonic() < deadline and others[-1].poll() is None
        time.sleep(0.1)

class Joins:
    reports = 0

    def notify(self, event):
        self.reports += event.name == "report"
        if event.name == "report" and self.reports == 6:
            join("folderless", path.parent)

    def close(self):
        pass

nodes.add_node(num_cpus=1)
try:
    with Cluster.attached(nodes.address):
        join("dataless", data)
    sweep(Joins(), train=formulas.reading)
finally:
    for other in others:
        other.terminate()
        other.wait()
"""


@pytest.mark.slow
def test_nodes_that_lack_the_data_or_the_folder_are_set_aside_and_every_trial_succeeds(disk, tmp_path):
    told = on_nodes(tmp_path / "s", NODES_THAT_LACK_SOMETHING)
    state = read_state(tmp_path / "s" / "ledger.jsonl")
    assert state.counts()["completed"] == len(state.trials) == 12, told
    assert any(line.startswith("node dataless is set aside, its trials go elsewhere: ") for line in told), told
    named = "node folderless gets no trials: " + str(tmp_path / "s") + " is not there: --runs-dir must be on storage"
    assert any(line.startswith(named) for line in told), told
    moved = retries(tmp_path / "s" / "ledger.jsonl")
    assert {reason for _, reason, _ in moved} == {"node"}
    assert len(moved) <= 4
    assert findings(tmp_path / "s") == []


JUST_AFTER_A_DEATH = """
nodes.add_node(num_cpus=1)
dead = nodes.add_node(num_cpus=2)
nodes.remove_node(dead, allow_graceful=False)
sweep()
"""


@pytest.mark.slow
@pytest.mark.long
def test_a_sweep_begins_just_after_a_node_has_died(tmp_path):
    told = on_nodes(tmp_path / "s", JUST_AFTER_A_DEATH)
    state = read_state(tmp_path / "s" / "ledger.jsonl")
    assert state.stop_reason == "finished", told
    assert state.counts()["completed"] == len(state.trials) == 12
