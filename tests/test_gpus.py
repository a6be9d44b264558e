"""What the GPUs of a cluster's nodes are doing: asked of each node, kept in a file while trials run, and shown."""

import json
import os
import subprocess
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import ptys
import pytest
import ray
from test_confirm import PLAIN
from test_faults import NODES
from test_faults import begun
from test_faults import printed
from test_watching import Paused
from test_watching import command

from tune_topkd.cli import display
from tune_topkd.cli import watching
from tune_topkd.cli.display import ConsoleCallback
from tune_topkd.execution import Cluster
from tune_topkd.execution import RayExecutor
from tune_topkd.execution import executor
from tune_topkd.execution import gpus
from tune_topkd.execution.gpus import GpuWatch
from tune_topkd.interruption import Interruption
from tune_topkd.ledger import Driver
from tune_topkd.ledger import Header
from tune_topkd.ledger import Ledger
from tune_topkd.ledger import SweepState
from tune_topkd.ledger import read_state
from tune_topkd.machine import Gpu
from tune_topkd.machine import NodeGpus
from tune_topkd.sweep import Sweep
from tune_topkd.sweep import gpus as files
from tune_topkd.sweep.gpus import gpus_file
from tune_topkd.sweep.gpus import node_gpus
from tune_topkd.sweep.remote import Remote
from tune_topkd.terminal import Console
from tune_topkd.terminal import Terminal

HERE = Path(__file__).parent
BUSY = Gpu("H200", 40 * 2**30, 140 * 2**30, 87)


def said(name="a", at=None, gpus=(BUSY,)):
    return NodeGpus(name, time.time() if at is None else at, tuple(gpus))


# --- asking the nodes -------------------------------------------------------------------------------------------------


class FakeRay:
    """Nodes whose actors answer as the test says: a list, an exception, or nothing."""

    exceptions = ray.exceptions

    def __init__(self):
        self.answers = {}
        self.begun = []
        self.asked = []
        self.killed = []

    def remote(self, num_cpus, scheduling_strategy):
        assert num_cpus == 0
        node = scheduling_strategy.node_id

        def begin():
            self.begun.append(node)
            return SimpleNamespace(node=node, gpus=SimpleNamespace(remote=lambda: self.asked.append(node) or node))

        return lambda kind: SimpleNamespace(remote=begin)

    def wait(self, references, timeout):
        assert timeout == 0, "nobody waits"
        return ([node for node in references if self.answers.get(node) is not None], [])

    def get(self, node, timeout):
        if isinstance(self.answers[node], Exception):
            raise self.answers[node]
        return self.answers[node]

    def kill(self, actor):
        self.killed.append(actor.node)


@pytest.fixture
def fake(monkeypatch):
    fake = FakeRay()
    monkeypatch.setattr(gpus, "ray", fake)
    monkeypatch.setattr(
        gpus, "NodeAffinitySchedulingStrategy", lambda node, soft: SimpleNamespace(node_id=node, soft=soft)
    )
    monkeypatch.setattr(gpus, "_SECONDS_BETWEEN_LOOKS", 0.01)
    monkeypatch.setattr(gpus, "SECONDS_BETWEEN_QUESTIONS", 0.02)
    return fake


@pytest.fixture
def watch(fake):
    """Watches nodes that answer so; gives what is told."""
    told = []
    watch = GpuWatch(told.append)
    with watch.asking():

        def look_at(**answers):
            fake.answers |= answers
            watch.look_at({node: f"name-{node}" for node in answers})
            return told

        yield look_at


def until(holds):
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def names(told):
    return [node.name for node in told[-1]] if told else []


def test_nodes_are_told_by_their_names_with_what_they_said_last(watch, fake):
    told = watch(b=[BUSY], a=[BUSY, BUSY])
    until(lambda: names(told) == ["name-a", "name-b"])
    assert [len(node.gpus) for node in told[-1]] == [2, 1]
    fake.answers["b"] = [Gpu("H200", 0, 100, 0)]
    until(lambda: told[-1][1].gpus == (Gpu("H200", 0, 100, 0),))
    assert sorted(fake.begun) == ["a", "b"], "one actor for each node, however often it is asked"


def test_one_that_hangs_has_no_line_is_not_asked_again_and_keeps_no_other_waiting(watch, fake):
    told = watch(a=[BUSY], hangs=None)
    until(lambda: fake.asked.count("a") > 5)
    assert names(told) == ["name-a"]
    assert fake.asked.count("hangs") == 1


def test_one_without_a_gpu_has_no_line(watch, fake):
    told = watch(a=[BUSY], none=[])
    until(lambda: fake.asked.count("none") > 2)
    assert names(told) == ["name-a"]


def test_what_a_node_said_is_not_told_for_ever(watch, fake, monkeypatch):
    monkeypatch.setattr(gpus, "LONGEST_USE", 0.2)
    told = watch(a=[BUSY], b=[BUSY])
    until(lambda: names(told) == ["name-a", "name-b"])
    fake.answers["b"] = None
    until(lambda: names(told) == ["name-a"])


def test_one_that_has_died_is_told_in_the_log_alone_and_asked_by_another_actor_later(watch, fake, monkeypatch, caplog):
    caplog.set_level("INFO", gpus.__name__)
    monkeypatch.setattr(gpus, "_SECONDS_BEFORE_ANOTHER_TRY", 0.3)
    told = watch(a=[BUSY], dies=ray.exceptions.RayActorError())
    until(lambda: fake.killed == ["dies"])
    assert names(told) in ([], ["name-a"])
    assert "node name-dies does not say what its GPUs are doing: RayActorError: " in caplog.text
    fake.answers["dies"] = [BUSY]
    until(lambda: names(told) == ["name-a", "name-dies"])
    assert fake.begun.count("dies") == 2


def test_between_two_trials_a_node_keeps_its_line_and_then_its_actor_is_let_go(watch, fake, monkeypatch):
    monkeypatch.setattr(gpus, "_SECONDS_WITHOUT_A_TRIAL", 0.5)
    told = watch(a=[BUSY], b=[BUSY])
    until(lambda: names(told) == ["name-a", "name-b"])
    before = len(told)
    watch(a=[BUSY])
    until(lambda: len(told) > before + 3)
    assert names(told) == ["name-a", "name-b"]
    assert fake.killed == []
    until(lambda: names(told) == ["name-a"])
    assert fake.killed == ["b"]


def test_at_the_end_no_actor_is_left_also_where_one_hangs(fake):
    watch = GpuWatch(lambda told: None)
    with watch.asking():
        fake.answers = {"a": [BUSY], "hangs": None}
        watch.look_at({"a": "a", "hangs": "hangs"})
        until(lambda: len(fake.begun) == 2)
        began = time.monotonic()
    assert time.monotonic() - began < 2
    assert sorted(fake.killed) == ["a", "hangs"]


def test_whoever_is_told_may_raise_and_the_sweep_goes_on(fake, caplog):
    def tell(told):
        raise RuntimeError("no room")

    watch = GpuWatch(tell)
    with watch.asking():
        fake.answers = {"a": [BUSY]}
        watch.look_at({"a": "a"})
        until(lambda: not watch._thread.is_alive())
    assert "what the nodes' GPUs are doing is not told any more" in caplog.text
    assert fake.killed == ["a"]


@pytest.mark.parametrize(("address", "is_asked"), [(None, False), ("h:1", True)])
def test_a_private_ray_is_not_asked(monkeypatch, tmp_path, address, is_asked):
    """Its machine is this one, whose GPUs the display asks by itself."""
    got = {}
    monkeypatch.setattr(Cluster, "attached", lambda *_: threading.Lock())
    monkeypatch.setattr(executor, "run_sweep", lambda search, **about: got.update(about) or "finished")
    work = executor.Work(tmp_path, print, {}, {}, print, print, on_gpus=print)
    RayExecutor(Interruption(), address).run(None, work)
    assert got["on_gpus"] is (print if is_asked else None)


# --- the file ---------------------------------------------------------------------------------------------------------


def test_the_file_has_what_was_said_last_and_is_there_only_while_trials_run(tmp_path):
    assert node_gpus(tmp_path, time.time()) is None
    with gpus_file(tmp_path, is_cluster=True) as write:
        assert node_gpus(tmp_path, time.time()) == [], "it is known at once that trials are not on this machine alone"
        nodes = [said("a"), said("b", gpus=[BUSY, Gpu("part", 0, 1, None)])]
        write(nodes)
        assert node_gpus(tmp_path, time.time()) == nodes
        assert node_gpus(tmp_path, time.time() + files.LONGEST_SHOWN + 1) == []
        write([said("a", at=time.time() - files.LONGEST_SHOWN - 1), nodes[1]])
        assert node_gpus(tmp_path, time.time()) == nodes[1:]
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_on_a_private_ray_has_none_nor_one_of_a_driver_that_was_killed(tmp_path):
    with gpus_file(tmp_path, is_cluster=True) as write:
        write([said()])
        with gpus_file(tmp_path, is_cluster=False):
            assert node_gpus(tmp_path, time.time()) is None
            assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["", "[1]", "{}", '{"nodes": [{"name": "a"}]}', '{"nodes": 3}'])
def test_a_file_of_nobody_s_tells_nothing(tmp_path, text):
    (tmp_path / "gpus.json").write_text(text)
    assert node_gpus(tmp_path, time.time()) is None


def test_a_folder_that_cannot_be_written_is_said_once_in_the_log(tmp_path, caplog):
    with gpus_file(tmp_path / "gone", is_cluster=True) as write:
        for _ in range(3):
            write([said()])
    assert caplog.text.count("what the nodes' GPUs are doing is not shown: ") == 1


def test_another_machine_knows_it_from_the_store_as_long_as_there_is_a_driver(tmp_path, monkeypatch):
    copies = []
    for machine in ("driver's", "other"):
        monkeypatch.setenv("TUNE_TOPKD_CACHE_DIR", str(tmp_path / machine))
        copies.append(Remote.at(f"file://{tmp_path / 'store'}"))
    driver, other = copies

    def seen_elsewhere():
        assert other.pull("s")
        return node_gpus(other.runs / "s", time.time())

    header = Header(sweep="s", id="i", seed=0, trials=1, digest="d")
    (driver.runs / "s").mkdir()
    with Ledger.create(driver.runs / "s" / "ledger.jsonl", header, mirror=driver.mirror("s")):
        assert seen_elsewhere() is None
        with gpus_file(driver.runs / "s", is_cluster=True) as write:
            write([said("far")])
            with driver.sign_of_life("s"):
                until(seen_elsewhere)
                assert [node.name for node in seen_elsewhere()] == ["far"]
        assert seen_elsewhere() is None


# --- who reads it -----------------------------------------------------------------------------------------------------


def test_status_watch_takes_what_the_driver_was_told_else_this_machine_s(tmp_path, monkeypatch):
    monkeypatch.setattr(watching, "gpus", lambda: [BUSY])
    state = SweepState()
    state.last_driver = Driver.here(trials=1)
    assert watching._gpus_of(tmp_path, state, time.time()) == [BUSY]
    with gpus_file(tmp_path, is_cluster=True) as write:
        assert watching._gpus_of(tmp_path, state, time.time()) == [], "the driver's machine may train nothing"
        write([said("far")])
        assert [node.name for node in watching._gpus_of(tmp_path, state, time.time())] == ["far"]
    state.last_driver = Driver(host="another", pid=1, trials=1)
    assert watching._gpus_of(tmp_path, state, time.time()) == ()


class OnNodes(Paused):
    """A cluster's trials, which go on when they are told to, and whose nodes say what they are told to."""

    tell = None

    def run(self, search, work):
        self.tell = work.on_gpus
        return super().run(search, work)


@pytest.mark.parametrize(("columns", "lines"), [(80, 24), (160, 50)])
def test_the_driver_s_display_and_status_watch_show_each_node_without_flicker(tmp_path, monkeypatch, columns, lines):
    monkeypatch.setattr(display, "gpus", lambda: pytest.fail("the driver's machine is not asked"))
    monkeypatch.setenv("TERM", "xterm-256color")
    sweep, trials = Sweep.create(PLAIN, name="s", runs_dir=tmp_path / "runs", mlflow_uri="", address="local"), OnNodes()
    sweep = replace(sweep, workspace=replace(sweep.workspace, address="head:6379"))
    screens = [ptys.Pty(columns, lines) for _ in range(2)]
    console = Console(Terminal(screens[0].slave))
    callbacks = [ConsoleCallback(console, sweep.workspace)]
    thread = threading.Thread(target=sweep.run, args=(callbacks,), kwargs={"executor": trials})
    thread.start()
    until(lambda: trials.tell is not None)
    there = {"stdout": screens[1].slave, "stderr": screens[1].slave, "start_new_session": True}
    other = subprocess.Popen(command("s", runs=sweep.workspace.runs), **there)
    later = time.time() + 600  # their age is not told, however long this takes
    few = [said("10.0.0.2", later, [BUSY] * 8), said("10.0.0.3", later)]
    many = [said(f"10.0.0.{number}", later) for number in range(2, 60)]
    try:
        trials.go_on(3)
        for nodes, last in (
            (few, "gpu    10.0.0.3: 1 GPU, 87 % busy, 40 of 140 GiB"),
            (many, "more nodes: "),
        ):
            trials.tell(nodes)
            for screen in screens:
                shown = screen.wait_for(lambda found, last=last: any(last in line for line in found))
                told = [line for line in shown if line.startswith("gpu ")]
                first = "gpu    10.0.0.2: 8 GPUs" if nodes is few else "gpu    10.0.0.2: 1 GPU"
                assert told[0] == f"{first}, 87 % busy, 40 of 140 GiB"
                assert len(told) <= lines // 4
                assert "\x1b[2J" not in screen.written, "a screen that is wiped flickers"
                assert screen.screen.unknown == []
        trials.tell([])
        for screen in screens:
            screen.wait_for(
                lambda found: found[-1].startswith("trainings") and not any("gpu" in line for line in found)
            )
        trials.go_on(1000)
        thread.join(60)
        assert other.wait(60) == 0
        assert not (sweep.folder / "gpus.json").exists()
    finally:
        trials.go_on(1000)
        other.kill()
        other.wait()
        thread.join(60)
        console.terminal.close()
        for screen in screens:
            screen.close()


# --- on a real Ray ----------------------------------------------------------------------------------------------------

FAKE_LIBRARY = """
import ctypes, json, os, time

Real = ctypes.CDLL

class Library:
    '''NVIDIA's, of a machine with such GPUs: [memory that is used, in all, percent busy].'''

    def __init__(self, gpus):
        self.gpus = gpus

    def nvmlInit_v2(self):
        return 0

    def nvmlDeviceGetCount_v2(self, count):
        while self.gpus == "hangs":
            time.sleep(1)
        count._obj.value = len(self.gpus)
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, number, handle):
        handle._obj.value = number.value + 1
        return 0

    def nvmlDeviceGetName(self, handle, name, length):
        ctypes.memmove(name, b"H200", 5)
        return 0

    def nvmlDeviceGetMemoryInfo(self, handle, memory):
        memory._obj.used, memory._obj.total, _ = self.gpus[handle.value - 1]
        return 0

    def nvmlDeviceGetUtilizationRates(self, handle, rates):
        rates._obj.gpu = self.gpus[handle.value - 1][2]
        return 0

class CDLL(Real):
    def __new__(cls, name=None, *arguments, **options):
        if name != "libnvidia-ml.so.1":
            return super().__new__(cls)
        if "GPUS_OF_THIS_NODE" not in os.environ:
            raise OSError("no such library")
        return Library(json.loads(os.environ["GPUS_OF_THIS_NODE"]))

ctypes.CDLL = CDLL
"""
"""As `sitecustomize` it is loaded first in every Python that finds it."""

TRIALS = """
import os, time
from pathlib import Path
import formulas

def patient(config, report, resume_from=None):
    def after_all_was_seen(config, epoch):
        while not Path(os.environ["SEEN"]).exists():
            time.sleep(0.05)
        return formulas.value(config, epoch)

    formulas.epochs(config, report, resume_from, after_all_was_seen)
"""

ON_NODES = """
import json, threading
import patient_trials
from tune_topkd.ledger import read_events

def join(name, gpus):
    env = {} if gpus is None else {"GPUS_OF_THIS_NODE": json.dumps(gpus)}
    return nodes.add_node(num_cpus=1, num_gpus=1, node_name=name, env_vars=env)

def say(word, what):
    print(word, json.dumps(what), flush=True)

join("a", [[40, 100, 87], [60, 100, 97]])
lost = join("lost", [[1, 2, 3]])
join("hangs", "hangs")
join("none", None)
seen = Path(os.environ["SEEN"])
removal = threading.Thread(target=nodes.remove_node, args=(lost,), kwargs={"allow_graceful": False})
removed = []

def told(answers):
    say("told", {a.name: [[gpu.name, gpu.used, gpu.total, gpu.busy] for gpu in a.gpus] for a in answers})
    names = [answer.name for answer in answers]
    if names == ["a", "lost"] and not removed:
        removed.append(time.monotonic())
        removal.start()
    if names == ["a"] and removed and not seen.exists():
        say("gone", time.monotonic() - removed[0])
        seen.touch()

def left():
    actors = ray._private.state.actors().values()
    return [actor for actor in actors if "Asker" in actor["ActorClassName"] and actor["State"] != "DEAD"]

with Cluster.attached(nodes.address) as cluster:
    with Ledger.open(path) as ledger:
        ledger.append(Driver(host="h", pid=os.getpid(), trials=config.sweep.trials))
        search = Search(config, ledger)
        run_sweep(search, cluster=cluster, folder=path.parent, train=patient_trials.patient, note=print, on_gpus=told)
        say("ended", time.time() - max(event.time for event in read_events(path)[0] if event.name == "end"))
    deadline = time.monotonic() + 30
    while left() and time.monotonic() < deadline:
        time.sleep(0.1)
    say("left", len(left()))
removal.join()
"""


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(400)
def test_of_a_cluster_s_nodes_those_that_answer_are_told_and_nothing_waits_for_the_others(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(FAKE_LIBRARY)
    (tmp_path / "patient_trials.py").write_text(TRIALS)
    begun(tmp_path / "s", sweep={"trials": 8, "asha": None, "max_concurrent": None, "gpus_per_trial": 1.0})[1].close()
    paths = os.pathsep.join([str(tmp_path), str(HERE), str(HERE.parent)])
    environment = os.environ | {"PYTHONPATH": paths, "SEEN": str(tmp_path / "seen")}
    lines = printed(NODES, tmp_path / "s", ON_NODES, environment=environment, timeout=300)

    def said_after(word):
        return [json.loads(line.removeprefix(f"{word} ")) for line in lines if line.startswith(f"{word} ")]

    told = said_after("told")
    assert {"a": [["H200", 40, 100, 87], ["H200", 60, 100, 97]], "lost": [["H200", 1, 2, 3]]} in told
    assert set().union(*told) == {"a", "lost"}, "no line for one that hangs, or has no library"
    assert told[-1].keys() == {"a"}
    assert said_after("gone")[0] < 60
    assert said_after("ended")[0] < 60, "the end waits for no node"
    assert said_after("left") == [0]
    state = read_state(tmp_path / "s" / "ledger.jsonl")
    assert state.stop_reason == "finished"
    assert state.counts()["completed"] == 8
