"""Several sweeps on one real cluster of eight CPUs: their shares, a third one, a killed driver, a killed broker."""

import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import ray
from servers import RayHead

from tune_topkd.config import load_config
from tune_topkd.execution import Cluster
from tune_topkd.execution import broker
from tune_topkd.ledger import read_events
from tune_topkd.search import audit_decisions

TESTS = Path(__file__).parent
SLOTS = 8
TRIAL = 6.0
"""Seconds that a trial sleeps."""
WINDOW = 120.0
"""Seconds over which the shares are measured."""
LONGEST_BROKER = 60.0
"""Seconds that a broker and a sweep's first answer may take on a loaded machine."""
LONGEST_START = 600.0
"""Seconds that a driver and its first worker may take to start on a loaded machine."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.ray,
    pytest.mark.timeout(3000),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning", "ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


class There(RayHead):
    """The cluster, and the sweeps on it: each a process with a ledger."""

    def __init__(self, folder):
        super().__init__(folder, f"--num-cpus={SLOTS}")
        self.drivers = {}

    def stop(self):
        super().stop(*self.drivers.values())

    def begin(self, name, priority=1.0, *words):
        command = [sys.executable, str(TESTS / "sharing_sweep.py"), str(self.folder / name)]
        command += ["--address", self.address, "--priority", str(priority), "--seconds", str(TRIAL), *words]
        with (self.folder / f"{name}.log").open("w") as log:
            self.drivers[name] = subprocess.Popen(command, env=self.environment, stdout=log, stderr=log)
        return time.time()

    def events(self, name):
        path = self.folder / name / "ledger.jsonl"
        return read_events(path)[0] if path.exists() else []

    def times(self, name, event, events=None):
        """When each of a sweep's trials was first proposed, begun or ended, by its ledger or by these events of it."""
        found = {}
        for line in self.events(name) if events is None else events:
            if line.name == event:
                found.setdefault(getattr(line.content, "key", None), line.time)
        return found

    def at_work(self, name):
        """Trials that run now, and those that wait for a worker."""
        events = self.events(name)  # read once: between two readings a trial may end and another one be proposed
        proposed, begun, ended = (self.times(name, event, events).keys() for event in ("suggest", "start", "end"))
        return len(begun - ended), len(proposed - begun)

    def held(self, name, began, until):
        """Place-seconds that a sweep's trials had in a time, those included in which their workers were starting."""
        ended = self.times(name, "end")
        spans = [(max(at, began), min(ended.get(key, until), until)) for key, at in self.times(name, "suggest").items()]
        return sum(max(end - start, 0.0) for start, end in spans)

    def wait_until(self, what, seconds, holds):
        began = time.monotonic()
        while not holds():
            told = {name: self.at_work(name) for name in self.drivers}
            logs = [(self.folder / f"{name}.log").read_text()[-3000:] for name in self.drivers]
            assert time.monotonic() - began < seconds, (what, told, *logs)
            assert all(driver.poll() is None for driver in self.drivers.values()), (what, *logs)
            time.sleep(0.2)
        return time.monotonic() - began

    def wait_for_all(self, name):
        """Until a sweep has all places, and so many of its trials have begun since now."""
        before = len(self.times(name, "start"))

        def has_all():
            return sum(self.at_work(name)) == SLOTS and len(self.times(name, "start")) >= before + SLOTS

        return self.wait_until(f"{name} has all places", LONGEST_START, has_all)

    def end(self, name):
        """Stop a sweep as Ctrl-C does: its exit code."""
        self.drivers[name].send_signal(signal.SIGINT)
        code = self.drivers.pop(name).wait(timeout=60)
        assert self.events(name)[-1].data["reason"] == "interrupted"
        return code


@pytest.fixture(scope="module")
def there():
    with There(Path(tempfile.mkdtemp(dir="/tmp"))).running() as there:  # a socket's path may not be long
        yield there


@pytest.mark.long
def test_sweeps_share_by_priority_and_a_third_comes_in(there):
    two_sweeps(there)
    began = time.time()
    time.sleep(WINDOW)
    until = time.time()
    held = [there.held(name, began, until) for name in "ab"]
    a, b = (sum(began < at < until for at in there.times(name, "end").values()) for name in "ab")
    sys.stdout.write(f"in {until - began:.0f} s: place-seconds {held[0]:.0f} and {held[1]:.0f}, trials {a} and {b}\n")
    assert held[0] / held[1] == pytest.approx(3, rel=0.15)
    assert (a + 1) / b > 3 * 0.85, "trials, to within one that ended a moment too late"
    assert a / (b + 1) < 3 * 1.15, "trials, to within one that ended a moment too late"
    assert most_at_once(there, began, until) == SLOTS, "proposals are drawn for free places only"

    there.begin("c", 1)
    there.wait_until("c's first trial", LONGEST_START + 2 * TRIAL, lambda: there.times("c", "start"))
    driver, proposed, started = (min(there.times("c", what).values()) for what in ("driver", "suggest", "start"))
    sys.stdout.write(
        f"third sweep: a proposal after {proposed - driver:.1f} s, at work after {started - driver:.1f} s\n"
    )
    lengths = [at - there.times(name, "start")[key] for name in "ab" for key, at in there.times(name, "end").items()]
    assert proposed - driver < 2 * max(lengths) + LONGEST_BROKER
    there.end("c")
    there.wait_until("its places are used", 60, lambda: sum(places(there)) == SLOTS)
    assert audit(there, "c") == []


@pytest.mark.long
def test_after_a_driver_s_kill_the_other_sweep_has_all_places(there):
    two_sweeps(there)
    there.drivers["a"].kill()
    there.drivers.pop("a").wait()
    took = there.wait_until("b has all places", 60, lambda: sum(there.at_work("b")) == SLOTS)
    sys.stdout.write(f"from the SIGKILL until the other has all places: {took:.1f} s\n")
    there.wait_for_all("b")
    assert [audit(there, name) for name in "ab"] == [[], []]


@pytest.mark.long
def test_a_broker_that_is_killed_is_begun_again_and_harms_nothing(there):
    if "b" not in there.drivers:  # this test alone
        there.begin("b", 1)
        there.wait_for_all("b")
    before = there.times("b", "end")
    with Cluster.attached(there.address):
        ray.kill(ray.get_actor(broker.NAME, namespace=broker.NAMESPACE), no_restart=True)
        began = time.time()
        time.sleep(4 * TRIAL)
        until = time.time()
        another = ray.get_actor(broker.NAME, namespace=broker.NAMESPACE)
        stand = {"size": (1.0, 0.0), "priority": 1.0, "at_work": 0, "most": 0, "used": 0.0, "ended": 0}
        assert ray.get(another.report.remote("somebody", **stand), timeout=60)[:2] == (0, 2)
        ray.get(another.leave.remote("somebody"), timeout=60)
    assert there.drivers["b"].poll() is None
    assert most_at_once(there, began, until) == SLOTS, "no more proposals than places"
    assert len(there.times("b", "end")) - len(before) >= 2 * SLOTS
    there.end("b")
    assert audit(there, "b") == []


@pytest.mark.long
def test_without_a_broker_a_sweep_goes_on_as_if_it_were_alone(there):
    for name in list(there.drivers):
        there.end(name)
    there.begin("d", 1, "--no-broker", "--trials", "10")
    code = there.drivers.pop("d").wait(timeout=2 * LONGEST_START)
    assert code == 0, (there.folder / "d.log").read_text()
    assert there.events("d")[-1].data["reason"] == "finished"
    assert len(there.times("d", "end")) == 10
    assert (there.folder / "d.log").read_text().count("no broker shares it: RuntimeError: there is no broker") == 1, (
        "said once"
    )
    assert audit(there, "d") == []


def two_sweeps(there):
    """One that takes all places, then a second one that has its part, with a worker at each of them."""
    if "a" not in there.drivers:
        there.begin("a", 3)
        there.wait_for_all("a")  # alone it takes all
    if "b" not in there.drivers:
        there.begin("b", 1)
    there.wait_until(
        "both have their parts", LONGEST_START, lambda: [there.at_work(name) for name in "ab"] == [(6, 0), (2, 0)]
    )


def most_at_once(there, began, until):
    """The most proposals of all sweeps that had no end at one moment."""
    spans = []
    for name in there.drivers:
        ended = there.times(name, "end")
        spans += [(at, ended.get(key, until)) for key, at in there.times(name, "suggest").items()]
    return max(sum(one <= at < other for one, other in spans) for at, _ in spans if began < at < until)


def places(there):
    return [sum(there.at_work(name)) for name in "ab"]


def audit(there, name):
    return audit_decisions(load_config(there.folder / name / "sweep.yaml"), there.events(name))[0]
